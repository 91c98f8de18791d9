"""What kernels say to memory: typed pointers, atomics, calls by address, the barrier.

Kernels get addresses as integers; these Numba intrinsics turn them into instructions.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once, get_or_insert_function
from numba.extending import intrinsic

INT64 = ir.IntType(64)
SPINS = 4000  # a spin is ~50 ns; past this the partner has lost its core: let it run
COUNT, GENERATION = 0, 8  # the barrier's two words, a cache line apart


def pointer(dtype: Any) -> Any:
    """An intrinsic that makes a typed pointer of an address: `f32 = pointer(float32)`."""

    @intrinsic
    def cast(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = context.get_value_type(types.CPointer(dtype))
            return builder.inttoptr(arguments[0], kind)

        return types.CPointer(dtype)(types.int64), generate

    return cast


int32s = pointer(types.int32)
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


@intrinsic
def yield_core(typing_context: Any) -> Any:
    """Let the operating system run another thread on this core."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        yielder = get_or_insert_function(builder.module, kind, "sched_yield")
        builder.call(yielder, [])
        return context.get_dummy_value()

    return types.void(), generate


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

    @intrinsic
    def call5(context: Any, entry: Any, a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
        return types.void(*[types.int64] * 6), generate

    return call5


call_kernel = caller(4)  # (entry, args, sync, thread, threads)
call_epilogue = caller(5)  # (entry, args, row, rows, column, columns)


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
        return
    spins = 0
    while atomic_load(words, GENERATION) == generation:
        pause()
        spins += 1
        if spins > SPINS:
            yield_core()


@numba.njit(error_model="numpy", _nrt=False)
def ticket(args, slot, threads):
    """The next piece of work of a kernel: 0, 1, 2, … over all threads.

    Taken in turn, not dealt out: a core that another process slows takes fewer. Results do not
    depend on who did what. The runner sets the counters back.
    """
    if threads == 1:
        t = args[slot]
        args[slot] = t + 1
        return t
    return atomic_add(args, slot, 1)


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


def rule_of(formula: Any) -> Any:
    """An intrinsic for an update rule: (p, g, state 0, state 1, scalars) → (p, state 0, state 1).

    `formula` takes the same as `ir.Value`s and returns (p, (state, …)).
    """
    from backprop_kernels.cpu.ir import Value

    @intrinsic
    def update(typing_context: Any, p: Any, g: Any, s0: Any, s1: Any, scalars: Any) -> Any:
        result = types.UniTuple(p, 3)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            values = [Value(builder, a) for a in arguments[:4]]
            constants = [
                Value(builder, builder.extract_value(arguments[4], i)) for i in range(scalars.count)
            ]
            new_p, state = formula(*values, constants)
            outputs = [new_p, *state, values[3]][:3]
            return context.make_tuple(builder, result, [values[0].constant(x).ir for x in outputs])

        return result(p, g, s0, s1, scalars), generate

    return update
