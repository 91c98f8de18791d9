"""What happened during a fit, epoch by epoch."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path


class History(dict[str, list[float]]):
    """Keras's keys: `loss`, `val_loss`, `lr`, and `seconds`; one entry per epoch.

    `loss` is the mean over the epoch's steps, as each step found it before its update.
    """

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
        Path(path).write_text(json.dumps(self, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | PathLike[str]) -> History:
        """The history in a file that `save` wrote."""
        return cls(json.loads(Path(path).read_text(encoding="utf-8")))

    def plot(self, path: str | PathLike[str], title: str = "") -> None:
        """Draw training and validation loss by epoch to a PNG, SVG or PDF file."""
        try:
            from matplotlib.figure import Figure
        except ImportError as problem:
            raise ImportError(
                'History.plot needs matplotlib: pip install "fused-backprop[plot]"'
            ) from problem
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        epochs = range(1, self.epochs + 1)
        axes.plot(epochs, self["loss"], label="training")
        if "val_loss" in self:
            axes.plot(epochs, self["val_loss"], label="validation")
        axes.set(xlabel="epoch", ylabel="loss", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=150)
