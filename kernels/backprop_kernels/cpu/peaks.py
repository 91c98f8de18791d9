"""What this machine can do at most, measured by kernels that do nothing else.

Yardsticks for profiles and benchmarks: multiplications and additions in registers, and bytes from
and to memory, on as many threads as programs run on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import numpy as np

from backprop_kernels.cpu.compile import Code, code
from backprop_kernels.cpu.program import FLOPS_PER_THREAD, Arguments, Kernel, Program
from backprop_kernels.cpu.threads import get_num_threads

CHAINS, LENGTH = 12, 64  # enough independent sums for the latency of an FMA; few enough registers
REGISTER_ELEMENTS = 2048  # of a thread's array: it stays in the first-level cache
MEMORY_BYTES = 2**28  # of each of three arrays: more than a last-level cache holds
CHUNK = 2**14  # elements per piece of work
PAUSE, ENOUGH = 0.02, 0.05  # seconds, between measurements and of each

(UNUSED, TICKET, A_, B_, C_, COUNT, REPEATS) = range(7)


def flops(dtype: str) -> float:
    """Floating-point operations a second that all threads reach together, an FMA counting two."""
    return _flops(dtype, get_num_threads())


def bandwidth() -> float:
    """Bytes a second that all threads read and write together where nothing is in a cache."""
    return _bandwidth(get_num_threads())


@cache
def _flops(dtype: str, threads: int) -> float:
    repeats = 100
    X = np.full((threads, REGISTER_ELEMENTS), 0.5, dtype)
    run = _program(threads, code(_fma_kernel, 4, dtype), X, X, X, REGISTER_ELEMENTS, repeats)
    return 2 * CHAINS * LENGTH * X.size * repeats / _fastest(run)


@cache
def _bandwidth(threads: int) -> float:
    A, B, C = (np.zeros(MEMORY_BYTES // 4, np.float32) for _ in range(3))
    run = _program(threads, code(_add_kernel, 4), A, B, C, A.size, 1)
    return 3 * MEMORY_BYTES / _fastest(run)


def _program(threads: int, entry: Code, *arguments: object) -> Program:
    program = Program()
    flops = FLOPS_PER_THREAD * (threads - 1)
    program.kernels.append(Kernel(entry, Arguments((0, 0, *arguments)), flops))
    return program.seal()


def _fastest(run: Program) -> float:
    seconds: list[float] = []
    for _ in range(5):
        # A host may run two virtual CPUs on the hyperthreads of one core, at half this rate, for
        # as long as both are busy.
        time.sleep(PAUSE)
        until = time.perf_counter() + ENOUGH
        while True:
            started = time.perf_counter()
            run()
            ended = time.perf_counter()
            seconds.append(ended - started)
            if ended > until:
                break
    return min(seconds)


def _fma_kernel(dtype: str) -> Callable[..., None]:
    from backprop_kernels.cpu.ir import muladd
    from backprop_kernels.cpu.vector_loop import vector_loop

    def formula(x):
        sums = [x * (i + 1.0) for i in range(CHAINS)]
        for _ in range(LENGTH):
            sums = [muladd(s, x, x) for s in sums]
        total = sums[0]
        for s in sums[1:]:
            total = total + s
        return (total,)

    work = vector_loop(formula, dtype, 1)
    size = 4 if dtype == "float32" else 8

    def kernel(args, sync, thread, threads):
        X = args[A_] + thread * args[COUNT] * size
        for _ in range(args[REPEATS]):
            work((X, X), (), args[COUNT])

    return kernel


def _add_kernel() -> Callable[..., None]:
    from backprop_kernels.cpu.memory import take
    from backprop_kernels.cpu.vector_loop import vector_loop

    add = vector_loop(lambda a, b: (a + b,), "float32", 2)

    def kernel(args, sync, thread, threads):
        chunks = (args[COUNT] + CHUNK - 1) // CHUNK
        taken = 0
        while True:
            t = take(args, TICKET, chunks, thread, threads, taken)
            if t < 0:
                break
            taken += 1
            at = t * CHUNK * 4
            count = min(CHUNK, args[COUNT] - t * CHUNK)
            add((args[A_] + at, args[B_] + at, args[C_] + at), (), count)

    return kernel
