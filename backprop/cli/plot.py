"""`backprop plot`: learning curves from files."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from backprop.history import History, plot
from backprop.resume import history_of


def run(options: Namespace) -> None:
    """Draw the runs into one picture."""
    paths = [Path(path) for path in options.runs]
    histories = [_history(path) for path in paths]
    names = options.runs if len(paths) > 1 else [""]
    output = options.output or paths[0].with_name(paths[0].resolve().name.split(".")[0] + ".png")
    plot(dict(zip(names, histories, strict=True)), output)
    print(f"wrote {output}")


def _history(path: Path) -> History:
    """The history of this run, wherever it is."""
    if path.is_dir():
        file = path / "history.json"
        return History.read(file) if file.exists() else history_of(path)
    if path.suffix == ".safetensors":
        file = path.with_suffix(".history.json")
        return History.read(file) if file.exists() else history_of(path)
    return History.read(path)
