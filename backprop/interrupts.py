"""Ctrl-C and SIGTERM during a fit: noted, and answered where everything is consistent.

A first signal ends the training after the step; a step or a validation that takes long is broken
off (a step is then applied whole or not at all). A second one is the usual exception at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """`with Interrupts(breakable, terminate=…) as interrupts:`; then look at `received`.

    breakable: whether what runs now may be broken off by KeyboardInterrupt.
    terminate: whether to answer SIGTERM too.
    Only the main thread is asked by signals, and only those that nobody else answers are taken.
    """

    def __init__(self, breakable: Callable[[], bool], terminate: bool) -> None:
        self.breakable = breakable
        self.received: int | None = None
        self.insisted = False  # whether a second signal came
        self._handlers = {signal.SIGINT: signal.default_int_handler}
        if terminate:
            self._handlers[signal.SIGTERM] = signal.SIG_DFL  # type: ignore[assignment]
        self._replaced: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number, usual in self._handlers.items():
                if signal.getsignal(number) is usual:
                    self._replaced[number] = usual
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, usual in self._replaced.items():
            signal.signal(number, usual)
        self._replaced = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self.insisted = True
            self.__exit__(None, None, None)
            os.kill(os.getpid(), number)
            return
        self.received = number
        if self.breakable():
            raise KeyboardInterrupt
