"""`backprop plot`: learning curves from files."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from backprop_kernels.errors import DataError

from backprop.history import History, plot


def run(options: Namespace) -> None:
    """Draw the runs into one picture."""
    files = [_history_file(Path(path)) for path in options.runs]
    histories = [History.read(file) for file in files]
    names = options.runs if len(files) > 1 else [""]
    output = options.output or files[0].with_name(files[0].name.split(".")[0] + ".png")
    plot(dict(zip(names, histories, strict=True)), output)
    print(f"wrote {output}")


def _history_file(path: Path) -> Path:
    """Where the history of this run is."""
    if path.is_dir():
        if not (path / "history.json").exists():
            raise DataError(f"plot: {path}: expected history.json in this folder, got none")
        return path / "history.json"
    return path.with_suffix(".history.json") if path.suffix == ".safetensors" else path
