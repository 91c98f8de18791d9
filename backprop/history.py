"""What happened during a fit, epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

from backprop_kernels.errors import DataError

from backprop.extras import need

NOT_CURVES = ("lr", "seconds", "epoch")  # of a picture: they share no scale with the losses
LABELS = {"loss": "training", "val_loss": "validation"}


class History(dict[str, list[float]]):
    """Keras's keys: `loss`, `val_loss`, `lr`, and `seconds`; one entry per epoch.

    `loss` is the mean over the epoch's steps, as each step found it before its update.
    """

    interrupted = False  # whether Ctrl-C or SIGTERM ended the fit

    def append(self, **values: float) -> None:
        """Add one epoch."""
        for name, value in values.items():
            self.setdefault(name, []).append(value)

    @property
    def epochs(self) -> int:
        """How many epochs are recorded."""
        return len(self.get("loss", []))

    def save(self, path: str | PathLike[str]) -> None:
        """Write JSON."""
        import json  # here and below, what `import backprop` would wait 7 ms for
        from pathlib import Path

        Path(path).write_text(json.dumps(self, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | PathLike[str]) -> History:
        """The history in a file that `save`, `CSVLog` or `JSONLog` wrote.

        Raises DataError for any other content.
        """
        import json
        from pathlib import Path

        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".csv":
                rows = [{k: float(v) for k, v in row.items()} for row in _csv_rows(text)]
            elif path.suffix == ".jsonl":
                rows = [json.loads(line) for line in text.splitlines()]
            else:
                return cls(_checked(json.loads(text)))
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("lines that are no objects")
            names = dict.fromkeys(name for row in rows for name in row if name != "epoch")
            return cls(_checked({name: [row[name] for row in rows] for name in names}))
        except (ValueError, TypeError, KeyError) as problem:
            raise DataError(
                f"History: {path}: expected a history (.json) or a log (.csv, .jsonl) of one "
                f"number per epoch and name, got {problem!r}"
            ) from problem

    def plot(self, path: str | PathLike[str] | None = None, title: str = "") -> Any:
        """Draw the losses by epoch, and other metrics below them; returns Matplotlib's axes.

        With a path, into that PNG, SVG or PDF file; without, into a figure of `pyplot`, which a
        notebook shows and `pyplot.show()` opens. Needs the extra `plot`.
        """
        return plot({"": self}, path, title)


def plot(
    histories: Mapping[str, History], path: str | PathLike[str] | None = None, title: str = ""
) -> Any:
    """Draw several histories, by name, into one picture, as `History.plot` does one."""
    where = "History.plot"
    figures = need("matplotlib.figure" if path else "matplotlib.pyplot", "plot", where)
    names = dict.fromkeys(k for h in histories.values() for k in h if k not in NOT_CURVES)
    losses = [name for name in names if name in LABELS]
    panels = [panel for panel in (losses, [n for n in names if n not in LABELS]) if panel]
    if not panels:
        raise DataError(f"{where}: expected a history with losses, got none")
    size = {"figsize": (7, 1 + 3 * len(panels)), "layout": "constrained"}
    figure = figures.Figure(**size) if path else figures.figure(**size)
    all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        for i, (run, history) in enumerate(histories.items()):
            for name in filter(history.__contains__, panel):
                label = " ".join(filter(None, (run, LABELS.get(name, name))))
                style = {"color": f"C{i}", "ls": "--" if name == "val_loss" else "-"} if run else {}
                axes.plot(range(1, len(history[name]) + 1), history[name], label=label, **style)
        axes.set(ylabel="loss" if panel is losses else "")
        axes.grid(alpha=0.3)
        axes.legend()
    all_axes[0].set_title(title)
    all_axes[-1].set_xlabel("epoch")
    if path:
        figure.savefig(fspath(path), dpi=150)
    return all_axes[0] if len(panels) == 1 else all_axes


def _csv_rows(text: str) -> list[dict[str, Any]]:
    import csv

    rows: list[dict[str, Any]] = list(csv.DictReader(text.splitlines(), strict=True))
    return rows


def _checked(values: Any) -> dict[str, list[float]]:
    """Names and lists of numbers of one length, or a ValueError."""
    if not isinstance(values, dict) or not all(isinstance(v, list) for v in values.values()):
        raise ValueError("no lists by name")
    if len({len(v) for v in values.values()}) > 1:
        raise ValueError("lists of different lengths")
    if not all(type(x) in (int, float) for v in values.values() for x in v):
        raise ValueError("something else than numbers")
    return values
