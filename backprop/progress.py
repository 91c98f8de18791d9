"""The progress line of a fit: redrawn where someone watches, absent elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from backprop_kernels.errors import OptionError

REDRAW = 0.1  # seconds between redraws: fast enough to read, slow enough to cost nothing


class Progress:
    """Prints epoch, share, rate, losses and the time left to `stream` (stderr).

    `shown` is True (one line, redrawn, in a terminal or a notebook; nothing where output goes to a
    file or a log), "lines" (there one line an epoch), or False. `before` counts the rows that an
    interrupted fit had done.
    """

    def __init__(
        self,
        epochs: int,
        rows: int,
        shown: bool | str,
        stream: TextIO | None = None,
        before: int = 0,
    ) -> None:
        if shown not in (True, False, "lines"):
            raise OptionError(f'fit: progress: expected True, False or "lines", got {shown!r}')
        self.epochs, self.rows, self.before = epochs, rows, before
        self.stream = sys.stderr if stream is None else stream
        self.notebook = type(self.stream).__module__.startswith("ipykernel")
        self.live = bool(shown) and (self.notebook or self.stream.isatty())
        self.enabled = self.live or shown == "lines"
        self.started = self.drawn = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to redraw the line."""
        return self.live and time.monotonic() - self.drawn >= REDRAW

    def update(self, epoch: int, done: int, loss: float, val_loss: float | None) -> None:
        """During epoch `epoch` (from 0), after `done` rows."""
        now = time.monotonic()
        if self.live and now - self.drawn >= REDRAW:
            self.drawn = now
            self._draw(epoch, done, loss, val_loss, "")

    def end_epoch(self, epoch: int, loss: float, val_loss: float | None) -> None:
        """After the validation of epoch `epoch`."""
        if self.enabled:
            # A terminal scrolls; a notebook would keep every line in its file.
            again = self.notebook and epoch + 1 < self.epochs
            self._draw(epoch, self.rows, loss, val_loss, "" if again else "\n")

    def _draw(self, epoch: int, done: int, loss: float, val_loss: float | None, end: str) -> None:
        seconds = max(time.monotonic() - self.started, 1e-9)
        total = epoch * self.rows + done
        rate = max(total - self.before, 1) / seconds
        left = (self.epochs * self.rows - total) / rate
        validation = "" if val_loss is None else f"  val_loss {val_loss:.4f}"
        text = (
            f"epoch {epoch + 1}/{self.epochs} {100 * done // max(self.rows, 1):3d}%  "
            f"{rate:,.0f} rows/s  loss {loss:.4f}{validation}  ETA {_clock(left)}"
        )
        self.stream.write(f"\r{text:<78}{end}" if self.live else f"{text}{end}")
        self.stream.flush()


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"
