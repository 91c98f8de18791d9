"""Code run as a program of its own: other things come and go in a process of many tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def outside(code: str, *arguments: str, folder: Path | None = None, **environment: str) -> str:
    """What `code` prints as a program of its own: as a file in `folder` if it must be imported."""
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = ["-c", code]
    if folder is not None:
        file = folder / "script.py"
        file.write_text(code, encoding="utf-8")
        script = [str(file)]
    done = subprocess.run(
        [sys.executable, *script, *arguments], timeout=300, env={**paths, **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
