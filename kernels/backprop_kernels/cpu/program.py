"""Programs: kernels with their arguments, in order, run by one call into compiled code.

A kernel is `kernel(args, sync, thread, threads)`: every thread enters it, takes work in turn and
leaves; the runner puts a barrier after it. Called alone an operator is a program of one kernel;
`capture` collects a whole training step, and `Turns` runs several of them by one call.

Python answers signals only between calls into compiled code. A long program therefore runs on
another thread, and a signal that raises (Ctrl-C) stops it: work not yet taken is left, kernels not
yet begun are skipped. What it wrote by then is undefined, except that a kernel submitted as `whole`
either runs to its end or not at all.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from backprop_kernels import host_memory
from backprop_kernels.arrays import Array
from backprop_kernels.cpu import threads
from backprop_kernels.cpu.compile import Code, code, compile_together
from backprop_kernels.errors import KindError

# A second thread costs each kernel one or two microseconds: below this much work a kernel, in the
# mean, it does not pay.
FLOPS_PER_THREAD = 1_000_000
LONG = 5e9  # flops: 20 ms of a fast CPU, a second of a very slow one
PATIENCE = 0.2  # seconds: what ran in less is not long; another thread costs ~0.2 ms
AT_ONCE = 3e9  # flops of one call's turns, at most: a signal is answered after them
# Of a program's table: kernels to run, whether to stop, where to note nanoseconds, after which
# kernel to halt; turns to run, those that were run, (word, stride) of what moves in between, the
# numbers that must be finite; then the kernels.
COUNT, STOP, TIMES, HALT, TURNS, DONE, MOVES, MOVING, RESULTS, ENDING, ENTRIES = range(11)
ENDED = -1  # in HALT: after a turn
_recording = threading.local()


class Arguments:
    """The arguments of a kernel as int64 words; arrays become their addresses and stay alive.

    What a kernel calls, `Code`, may have yet to be compiled: its word is set by `Program.seal`.
    """

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = values
        self.words = np.array([0 if isinstance(v, Code) else word(v) for v in values], np.int64)

    def called(self) -> Iterator[tuple[Array, int, Code]]:
        """(words, place, code) of each `Code` among these, and among arguments among them."""
        for i, value in enumerate(self.values):
            if isinstance(value, Arguments):
                yield from value.called()
            elif isinstance(value, Code):
                yield self.words, i, value


def word(value: Any) -> int:
    """An int64 for a kernel: a number itself, an array its address, None 0."""
    if value is None:
        return 0
    if isinstance(value, Arguments):
        return int(value.words.ctypes.data)
    if isinstance(value, np.ndarray):
        return int(value.__array_interface__["data"][0])  # twice as fast as value.ctypes
    return int(value)


class Kernel(NamedTuple):
    """One kernel of a program: its code, what it is called with, and how much work that is.

    `tickets` count the kernel's work as it is taken, from 0 in every run: without them, the first
    two words of its arguments. `most_threads`: how many it has buffers for. `whole`: once begun it
    is not stopped, for it changes its inputs in place.
    """

    entry: Code
    arguments: Arguments
    flops: int
    tickets: Array | None = None
    most_threads: int = sys.maxsize
    whole: bool = False

    def counters(self) -> Array:
        return self.arguments.words[:2] if self.tickets is None else self.tickets


class Program:
    """A list of kernels that replays with `program(*inputs)`."""

    def __init__(self, inputs: Sequence[Array] = ()) -> None:
        # Views of our own, so that one array given twice still counts as two inputs.
        self.inputs = [array.view() for array in inputs]
        self.kernels: list[Kernel] = []
        self.shared: dict[int, Any] = {}  # by input: what `shared` made of it
        self._brief = False  # whether a run has shown that it takes less than PATIENCE

    def seal(self) -> Program:
        """Fix the list and compile what is missing; returns the program."""
        kernels = self.kernels
        called = [found for kernel in kernels for found in kernel.arguments.called()]
        codes = [*(kernel.entry for kernel in kernels), *(callee for *_, callee in called)]
        compile_together(codes, threads.core_to_spare)
        for where, place, callee in called:
            where[place] = callee.address()
        words = [0] * ENTRIES
        words[COUNT], words[TURNS] = len(kernels), 1
        for kernel in kernels:
            tickets = kernel.counters()
            words += [kernel.entry.address(), word(kernel.arguments), word(tickets), len(tickets)]
        self._table = np.array(words, np.int64)
        self._stoppable = [kernel.counters() for kernel in kernels if not kernel.whole]
        self._flops = sum(kernel.flops for kernel in kernels)
        busy = 1 + self._flops // (FLOPS_PER_THREAD * max(len(kernels), 1))
        most_threads = min([busy, *(kernel.most_threads for kernel in kernels)])
        self._call = code(_runner, 4).address(), word(self._table), most_threads
        self._bound = [word(array) for array in self.inputs]
        self._given = list(self.inputs)
        self._places = [
            [
                (kernel.arguments.words, i)
                for kernel in kernels
                for i, value in enumerate(kernel.arguments.values)
                if value is array
            ]
            for array in self.inputs
        ]
        if not all(self._places):
            lost = [bool(places) for places in self._places].index(False)
            raise KindError(
                f"capture: inputs[{lost}]: expected an array that an operator reads as it is, got "
                "one that is read through a view or not at all; replaying could not replace it"
            )
        return self

    def __call__(self, *inputs: Array) -> None:
        for i, array in enumerate(inputs):
            if array is self._given[i]:
                continue  # asking NumPy for its address takes as long as waking a thread
            self._given[i] = array
            where = word(array)
            if where != self._bound[i]:
                self._bound[i] = where
                for words, place in self._places[i]:
                    words[place] = where
        brief = self._brief or self._flops < LONG
        if brief or threading.current_thread() is not threading.main_thread():
            threads.run(*self._call)
            return
        started = time.perf_counter()
        try:
            threads.run_aside(partial(threads.run, *self._call), self._stop)
            self._brief = time.perf_counter() - started < PATIENCE
        except BaseException:
            self._table[HALT], self._table[STOP] = 0, 0
            self._set_tickets(0)
            raise

    def timed(self, *inputs: Array) -> Array:
        """Replay, and return the nanoseconds of each kernel, up to the barrier after it."""
        times = np.zeros(len(self.kernels), np.int64)
        self._table[TIMES] = word(times)
        try:
            self(*inputs)
        finally:
            self._table[TIMES] = 0
        return times

    def turns(self, columns: Sequence[Array], results: Sequence[Array]) -> Turns:
        """Itself, to be run several times by one call."""
        return Turns(self, columns, results)

    def _stop(self) -> None:
        """Let no thread begin another kernel, nor take another piece of the one it is in."""
        self._table[STOP] = 1
        self._set_tickets(threads.NO_MORE)

    def _set_tickets(self, value: int) -> None:
        for tickets in self._stoppable:
            tickets[:] = value


class Turns:
    """`turns(4)` runs a program four times by one call, each time on the next row of some arrays.

    columns: arrays (turns, …); the program was captured with parts of their first rows, and turn i
        reads and writes the same parts of row i.
    results: such arrays (turns,) of float64. A turn that leaves a number there that is not finite
        is the last.
    """

    def __init__(
        self, program: Program, columns: Sequence[Array], results: Sequence[Array]
    ) -> None:
        self._program = program
        kept = [kernel.arguments for kernel in program.kernels]
        moves = {
            where: array.strides[0]
            for array in (*columns, *results)
            for where in _reading(kept, array)
        }
        self._moves = np.array(list(moves.items()), np.int64).reshape(-1, 2)
        self._results = np.array([word(array) for array in results], np.int64)
        self._kept_alive = columns, results
        rows = min(len(array) for array in (*columns, *results))
        self.most = int(max(1, min(rows, AT_ONCE // max(program._flops, 1))))

    def __call__(self, turns: int, *inputs: Array) -> int:
        """Run up to `turns` times, `most` at most → how often that was."""
        table = self._program._table
        table[MOVES : ENDING + 1] = (
            word(self._moves),
            len(self._moves),
            word(self._results),
            len(self._results),
        )
        try:
            table[TURNS] = turns
            self._program(*inputs)
        finally:
            table[TURNS] = 1
            table[HALT] = table[MOVING] = table[ENDING] = 0
        return int(table[DONE])


def _reading(every: Iterable[Any], array: Array) -> Iterator[int]:
    """The addresses of the words, among arguments, that lie in the first row of `array`."""
    start, stride = word(array), array.strides[0]
    for arguments in every:
        if not isinstance(arguments, Arguments):
            continue
        yield from _reading(arguments.values, array)
        for i, value in enumerate(arguments.values):
            if isinstance(value, np.ndarray) and start <= word(value) < start + stride:
                yield word(arguments) + 8 * i


def shared(array: Array, make: Callable[[], Any]) -> Any:
    """What kernels make of `array` for others: once in a program that it is an input of."""
    program: Program | None = getattr(_recording, "program", None)
    if program is None or not any(array is given for given in program.inputs):
        return make()
    if id(array) not in program.shared:
        program.shared[id(array)] = make()
    return program.shared[id(array)]


def recorded() -> int:
    """How many kernels are in the program that this thread is capturing."""
    program: Program | None = getattr(_recording, "program", None)
    return 0 if program is None else len(program.kernels)


def submit(kernel: Kernel) -> None:
    """Run a kernel now, or add it to the program that this thread is capturing."""
    program: Program | None = getattr(_recording, "program", None)
    if program is not None:
        program.kernels.append(kernel)
        return
    single = Program()
    single.kernels.append(kernel)
    single.seal()()


def capture(operators: Callable[..., None], *inputs: Array) -> Callable[..., None]:
    """Turn a function of arrays that calls operators into a program; nothing is computed yet.

    Outputs must be preallocated. `inputs` stand for arrays that change from replay to replay:
    `program(*arrays)` takes others of the same shape, dtype and layout. `operators` hands them to
    operators as they are (a view of one would keep its first address: an error), and what else it
    does is not replayed.
    """
    program = Program(inputs)
    outer = getattr(_recording, "program", None)
    _recording.program = program
    try:
        operators(*program.inputs)
    finally:
        _recording.program = outer
    return program.seal()


def scratch(shape: Any, dtype: Any) -> Array:
    """Memory for a kernel, on a cache line; in a program, where it lives on, in huge pages."""
    if getattr(_recording, "program", None) is not None:
        return host_memory.zeros(shape, dtype)
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
    code(_runner, 4).address()


def _runner() -> Callable[..., None]:
    import numba

    from backprop_kernels.cpu.memory import (
        atomic_load,
        barrier,
        call_kernel,
        clock,
        float64s,
        int64s,
    )

    @numba.njit(error_model="numpy", _nrt=False)
    def end_turn(table, turn, turns):
        """Move on to the next row, or after the last turn back to the first; true if this is it."""
        last = turn + 1 == turns
        for i in range(table[ENDING]):
            if not np.isfinite(float64s(int64s(table[RESULTS])[i])[turn]):
                last = True
        moves = int64s(table[MOVES])
        for i in range(table[MOVING]):
            stride = moves[2 * i + 1]
            int64s(moves[2 * i])[0] += -turn * stride if last else stride
        table[DONE] = turn + 1
        return last

    def run(table, sync, thread, threads):
        count, turns = table[COUNT], table[TURNS]
        times = table[TIMES] if thread == 0 else 0
        started = clock() if times != 0 else 0
        for turn in range(turns):
            for i in range(count):
                row = ENTRIES + 4 * i  # entry, arguments, tickets, how many
                call_kernel(table[row], table[row + 1], sync, thread, threads)
                # One thread decides, before the barrier, so that after it all leave or none does.
                if thread == 0 and atomic_load(table, STOP) != 0:
                    table[HALT] = i + 1  # not COUNT, which a thread may have yet to read
                barrier(sync, threads)
                if thread == 0:
                    tickets = int64s(table[row + 2])
                    for ticket in range(table[row + 3]):
                        tickets[ticket] = 0
                if times != 0:
                    now = clock()
                    int64s(times)[i] = now - started
                    started = now
                # After the last kernel of the last turn the table may be gone.
                if i + 1 < count and atomic_load(table, HALT) == i + 1:
                    barrier(sync, threads)  # all have read it
                    return
            over = end_turn(table, turn, turns) if thread == 0 else False
            if turn + 1 < turns:
                if over:
                    table[HALT] = ENDED
                barrier(sync, threads)
                if atomic_load(table, HALT) == ENDED:
                    barrier(sync, threads)
                    return

    return run
