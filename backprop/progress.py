"""The progress line of a fit: redrawn in a terminal, one line an epoch elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

REDRAW = 0.1  # seconds between redraws: fast enough to read, slow enough to cost nothing


class Progress:
    """Prints epoch, share, rate, losses and the time left to `stream` (stderr)."""

    def __init__(self, epochs: int, rows: int, enabled: bool, stream: TextIO | None = None) -> None:
        self.epochs, self.rows = epochs, rows
        self.stream = sys.stderr if stream is None else stream
        self.enabled = enabled
        self.live = enabled and self.stream.isatty()
        self.started = self.drawn = time.monotonic()

    def update(self, epoch: int, done: int, loss: float, val_loss: float | None) -> None:
        """During epoch `epoch` (from 0), after `done` rows."""
        now = time.monotonic()
        if self.live and now - self.drawn >= REDRAW:
            self.drawn = now
            self._draw(epoch, done, loss, val_loss, "\r", "")

    def end_epoch(self, epoch: int, loss: float, val_loss: float | None) -> None:
        """After the validation of epoch `epoch`."""
        if self.enabled:
            self._draw(epoch, self.rows, loss, val_loss, "\r" if self.live else "", "\n")

    def _draw(
        self, epoch: int, done: int, loss: float, val_loss: float | None, start: str, end: str
    ) -> None:
        seconds = max(time.monotonic() - self.started, 1e-9)
        total = epoch * self.rows + done
        left = (self.epochs * self.rows - total) * seconds / max(total, 1)
        validation = "" if val_loss is None else f"  val_loss {val_loss:.4f}"
        text = (
            f"epoch {epoch + 1}/{self.epochs} {100 * done // max(self.rows, 1):3d}%  "
            f"{total / seconds:,.0f} rows/s  loss {loss:.4f}{validation}  ETA {_clock(left)}"
        )
        self.stream.write(f"{start}{text:<78}{end}" if self.live else f"{text}{end}")
        self.stream.flush()


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"
