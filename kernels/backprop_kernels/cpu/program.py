"""Programs: kernels with their arguments, in order, run by one call into compiled code.

A kernel is `kernel(args, sync, thread, threads)`: every thread enters it, takes work by ticket and
leaves; the runner puts a barrier after it. Called alone an operator is a program of one kernel;
`capture` collects a whole training step.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from backprop_kernels.arrays import Array
from backprop_kernels.cpu import threads
from backprop_kernels.cpu.compile import address

# A second thread costs ~2 us to join in; below this much work it does not pay.
FLOPS_PER_THREAD = 1_500_000
_recording = threading.local()


class Arguments:
    """The arguments of a kernel as int64 words; arrays become their addresses and stay alive."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.keep = [v for v in values if not isinstance(v, int | np.integer)]
        self.words = np.array([word(v) for v in values], np.int64)


def word(value: Any) -> int:
    """An int64 for a kernel: a number itself, an array its address, None 0."""
    if value is None:
        return 0
    if isinstance(value, Arguments):
        return int(value.words.ctypes.data)
    return int(value.ctypes.data) if isinstance(value, np.ndarray) else int(value)


class Program:
    """A list of kernels that replays with `program()`."""

    def __init__(self) -> None:
        self._entries: list[tuple[int, Arguments]] = []
        self._flops = 0
        self._table = np.zeros(0, np.int64)
        self._sync = np.zeros(32, np.int64)

    def append(self, entry: int, arguments: Arguments, flops: int) -> None:
        self._entries.append((entry, arguments))
        self._flops += flops

    def seal(self) -> Program:
        """Fix the list; returns the program."""
        words = [len(self._entries)]
        for entry, arguments in self._entries:
            words += [entry, word(arguments)]
        self._table = np.array(words, np.int64)
        self._addresses = self._table.ctypes.data, self._sync.ctypes.data
        self._threads = 1 + self._flops // FLOPS_PER_THREAD
        return self

    def __call__(self) -> None:
        threads.run(address(_runner, 4), *self._addresses, self._threads)


def submit(entry: int, arguments: Arguments, flops: int) -> None:
    """Run a kernel now, or add it to the program that this thread is capturing."""
    program: Program | None = getattr(_recording, "program", None)
    if program is not None:
        program.append(entry, arguments, flops)
        return
    single = Program()
    single.append(entry, arguments, flops)
    single.seal()()


def capture(operators: Callable[[], None]) -> Callable[[], None]:
    """Turn a function that calls operators with preallocated outputs into a program.

    Nothing is computed yet. What the function does besides calling operators is not replayed.
    """
    program = Program()
    outer = getattr(_recording, "program", None)
    _recording.program = program
    try:
        operators()
    finally:
        _recording.program = outer
    return program.seal()


def scratch(shape: Any, dtype: Any) -> Array:
    """Uninitialised memory for a kernel, on a cache line."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape))
    raw = np.empty(count * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)


def check_compiler() -> None:
    """Raise where Numba is missing or broken, before anything is trained with half of the kernels.

    Where this very Numba has compiled the runner before, its cached code is proof enough.
    """
    if importlib.util.find_spec("numba") is None:
        raise ImportError("numba is not installed")
    address(_runner, 4)


def _runner() -> Callable[..., None]:
    from backprop_kernels.cpu.memory import barrier, call_kernel, int64s

    def run(table, sync, thread, threads):
        for i in range(table[0]):
            args = table[2 + 2 * i]
            call_kernel(table[1 + 2 * i], args, sync, thread, threads)
            barrier(sync, threads)
            if thread == 0:
                counters = int64s(args)  # every kernel's first two words are ticket counters
                counters[0] = 0
                counters[1] = 0

    return run
