"""`python -m backprop` is the `backprop` command."""

from backprop.cli import main

raise SystemExit(main())
