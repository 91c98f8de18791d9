"""What looks at a fit from outside: told of its steps, or breaking them off."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import backprop as bp


class Watches(bp.Callback):
    """Is told of every step, which is then a call of its own."""

    def step_end(self, training: Any) -> None:
        pass


class SignalAtLine:
    """SIGINT at the `at`-th line that runs of the frames that are wanted; `lines` counts them."""

    def __init__(self, at: int) -> None:
        self.left, self.lines = at, 0
        self.place = ""  # of the signal

    def wanted(self, frame: Any) -> bool:
        """Whether the lines of this call count."""
        raise NotImplementedError

    def call(self, frame: Any, event: str, argument: Any) -> Any:
        return self.line if self.wanted(frame) else None

    def line(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines += 1
            self.left -= 1
            if self.left == 0:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                os.kill(os.getpid(), signal.SIGINT)
        return self.line

    def __enter__(self) -> SignalAtLine:
        sys.settrace(self.call)
        return self

    def __exit__(self, *problem: object) -> None:
        sys.settrace(None)
