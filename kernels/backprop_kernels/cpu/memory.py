"""What kernels say to memory: typed pointers, atomics, calls by address, waiting for one another.

Kernels get addresses as integers; these Numba intrinsics turn them into instructions.
"""

from __future__ import annotations

import time
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once, get_or_insert_function
from numba.extending import intrinsic

from backprop_kernels.cpu.threads import CONDITION, COUNT, GENERATION, MUTEX, SLEEPERS

INT64 = ir.IntType(64)
SPINS = 4000  # a spin is ~50 ns; past this the partner has lost its core: let it have this one


def pointer(dtype: Any) -> Any:
    """An intrinsic that makes a typed pointer of an address: `f32 = pointer(float32)`."""

    @intrinsic
    def cast(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = context.get_value_type(types.CPointer(dtype))
            return builder.inttoptr(arguments[0], kind)

        return types.CPointer(dtype)(types.int64), generate

    return cast


int64s = pointer(types.int64)
float64s = pointer(types.float64)


@intrinsic
def atomic_add(typing_context: Any, words: Any, index: Any, value: Any) -> Any:
    """Add to `words[index]` and return what it held."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.gep(arguments[0], [arguments[1]])
        return builder.atomic_rmw("add", place, arguments[2], "seq_cst")

    return types.int64(types.CPointer(types.int64), types.int64, types.int64), generate


@intrinsic
def atomic_exchange(typing_context: Any, words: Any, index: Any, value: Any) -> Any:
    """Store to `words[index]` and return what it held."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.gep(arguments[0], [arguments[1]])
        return builder.atomic_rmw("xchg", place, arguments[2], "seq_cst")

    return types.int64(types.CPointer(types.int64), types.int64, types.int64), generate


@intrinsic
def atomic_load(typing_context: Any, words: Any, index: Any) -> Any:
    """Read `words[index]` as it is now, and after it everything written before it was set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.gep(arguments[0], [arguments[1]])
        return builder.load_atomic(place, "seq_cst", 8)

    return types.int64(types.CPointer(types.int64), types.int64), generate


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Fetch the line at an address into the caches; one beyond memory does no harm."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, where = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, where, where, where])
        function = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        line = builder.inttoptr(arguments[0], byte)
        builder.call(function, [line, *(ir.Constant(where, n) for n in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def pause(typing_context: Any) -> Any:
    """Tell the core that this is a spin loop."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if builder.module.triple.startswith("x86_64"):
            name, hint = "llvm.x86.sse2.pause", []
        else:
            name, hint = "llvm.aarch64.hint", [ir.Constant(ir.IntType(32), 1)]
        kind = ir.FunctionType(ir.VoidType(), [x.type for x in hint])
        builder.call(get_or_insert_function(builder.module, kind, name), hint)
        return context.get_dummy_value()

    return types.void(), generate


def posix(name: str) -> Any:
    """An intrinsic that calls a function of the C library on two addresses; 0 for none."""

    @intrinsic
    def call(typing_context: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.FunctionType(ir.IntType(32), [INT64, INT64])
            builder.call(get_or_insert_function(builder.module, kind, name), arguments)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return call


new_mutex, lock, unlock = (posix(f"pthread_mutex_{n}") for n in ("init", "lock", "unlock"))
new_condition, sleep, wake_all = (posix(f"pthread_cond_{n}") for n in ("init", "wait", "broadcast"))


@intrinsic
def address_of(typing_context: Any, words: Any) -> Any:
    """A pointer as a number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ptrtoint(arguments[0], INT64)

    return types.int64(words), generate


@intrinsic
def clock(typing_context: Any) -> Any:
    """Nanoseconds since some moment in the past, the same for all threads."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        timespec = ir.LiteralStructType([INT64, INT64])
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32), timespec.as_pointer()])
        read = get_or_insert_function(builder.module, kind, "clock_gettime")
        now = alloca_once(builder, timespec)
        builder.call(read, [ir.Constant(ir.IntType(32), time.CLOCK_MONOTONIC), now])
        seconds, rest = (builder.extract_value(builder.load(now), i) for i in range(2))
        return builder.add(builder.mul(seconds, ir.Constant(INT64, 10**9)), rest)

    return types.int64(), generate


def caller(parameters: int) -> Any:
    """An intrinsic that calls a compiled kernel by address with int64 arguments."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(
            ir.IntType(32), [word.as_pointer(), word.as_pointer(), *[INT64] * parameters]
        )
        result = alloca_once(builder, word)
        function = builder.inttoptr(arguments[0], kind.as_pointer())
        builder.call(function, [result, result, *arguments[1:]])
        return context.get_dummy_value()

    if parameters == 4:

        @intrinsic
        def call4(context: Any, entry: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
            return types.void(*[types.int64] * 5), generate

        return call4

    if parameters == 5:

        @intrinsic
        def call5(context: Any, entry: Any, a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
            return types.void(*[types.int64] * 6), generate

        return call5

    @intrinsic
    def call6(context: Any, entry: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
        return types.void(*[types.int64] * 7), generate

    return call6


call_kernel = caller(4)  # (entry, args, sync, thread, threads)
call_epilogue = caller(5)  # (entry, args, row, rows, column, columns)
call_pack = caller(6)  # (entry, args, first, count, k, steps, panels)


@numba.njit(error_model="numpy", _nrt=False)
def wait(sync, words, index, value, spins):
    """Until `words[index]` is no longer `value`; after so many spins asleep.

    A thread that sleeps gives its core away, to the very one it waits for where others crowd in.
    """
    for _ in range(spins):
        if atomic_load(words, index) != value:
            return
        pause()
    # Say so first, look after: who changes the word in between sees that it must wake someone.
    atomic_add(int64s(sync), SLEEPERS, 1)
    mutex, condition = sync + 8 * MUTEX, sync + 8 * CONDITION
    lock(mutex, 0)
    while atomic_load(words, index) == value:
        sleep(condition, mutex)
    unlock(mutex, 0)
    atomic_add(int64s(sync), SLEEPERS, -1)


@numba.njit(error_model="numpy", _nrt=False)
def wake(sync):
    """All who sleep in `wait`: after a word was changed."""
    if atomic_load(int64s(sync), SLEEPERS) != 0:
        lock(sync + 8 * MUTEX, 0)  # by now each sleeps, or has seen the word
        unlock(sync + 8 * MUTEX, 0)
        wake_all(sync + 8 * CONDITION, 0)


@numba.njit(error_model="numpy", _nrt=False)
def barrier(sync, threads):
    """Wait until all `threads` are here; what each wrote before is then seen by all."""
    if threads == 1:
        return
    words = int64s(sync)
    generation = atomic_load(words, GENERATION)
    if atomic_add(words, COUNT, 1) == threads - 1:
        atomic_exchange(words, COUNT, 0)
        atomic_add(words, GENERATION, 1)
        wake(sync)
        return
    wait(sync, words, GENERATION, generation, SPINS)


@numba.njit(error_model="numpy", _nrt=False)
def take(args, slot, count, thread, threads, taken):
    """The next of a kernel's `count` pieces of work, or −1; `taken` is how many this thread had.

    Pieces are taken in turn, not dealt out: a core that another process slows takes fewer. Two
    threads start from the two ends, so that from kernel to kernel each finds in its own cache the
    rows it wrote. Results do not depend on who did what. The runner sets the counters back; a
    program that is stopped sets them past every count.
    """
    if threads == 1:
        return taken if taken < count and atomic_load(args, slot) == 0 else -1
    turn = atomic_add(args, slot, 1)
    if turn >= count:
        return -1
    if threads == 2:
        return taken if thread == 0 else count - 1 - taken
    return turn


def numbers(kind: Any, count: int) -> Any:
    """An intrinsic that reads `count` float64 at an address as a tuple of `kind`."""

    @intrinsic
    def read(typing_context: Any, address: Any) -> Any:
        result = types.UniTuple(kind, count)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            base = builder.inttoptr(arguments[0], ir.DoubleType().as_pointer())
            values = []
            for i in range(count):
                value = builder.load(builder.gep(base, [ir.Constant(INT64, i)]))
                if kind == types.float32:
                    value = builder.fptrunc(value, ir.FloatType())
                values.append(value)
            return context.make_tuple(builder, result, values)

        return result(types.int64), generate

    return read
