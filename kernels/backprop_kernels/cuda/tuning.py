"""The fastest kernel for a product on this GPU: measured once, and remembered in a private file.

Inside `autotuned()` every choice of `tiles.choose` is the fastest of its candidates. Each runs on
N(0, 1) numbers, bare of activation and dropout, REPEATS times in a CUDA graph. What was measured
holds for this GPU's name, these sources, NVRTC and cuBLASLt; other machines measure for themselves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from statistics import median
from typing import Any

import numpy as np

from backprop_kernels import machine_code_cache
from backprop_kernels.arrays import Array
from backprop_kernels.cuda import compile as nvrtc
from backprop_kernels.cuda import cublaslt
from backprop_kernels.cuda.launch import capture, copy, cupy, empty
from backprop_kernels.cuda.linear_dgrad import dgrad
from backprop_kernels.cuda.linear_forward import forward
from backprop_kernels.cuda.linear_wgrad import wgrad
from backprop_kernels.cuda.tiles import DECIDE, Choice
from backprop_kernels.cuda.transpose import padded
from backprop_kernels.errors import DeviceMemoryError, DeviceUnavailableError
from backprop_kernels.precisions import round_to

REPEATS, ROUNDS = 10, 5
DRAWN = 1 << 20  # numbers; larger matrices repeat them
FILES = (
    "linear_forward.cu", "linear_dgrad.cu", "linear_wgrad.cu", "column_sums.cu", "cast.cu",
    "transpose.cu",
)  # fmt: skip


@contextmanager
def autotuned() -> Iterator[None]:
    """Let this thread's choices be the fastest here, measured now where nobody has before."""
    with deciding(_fastest):
        yield


@contextmanager
def deciding(decide: Callable[[Sequence[Choice]], Choice]) -> Iterator[None]:
    """Let this thread's choices be what `decide` picks of the candidates."""
    token = DECIDE.set(decide)
    try:
        yield
    finally:
        DECIDE.reset(token)


def _fastest(candidates: Sequence[Choice]) -> Choice:
    first = candidates[0]
    question, by_name = first.question, {c.name: c for c in candidates}
    known = remembered()
    times = known.get(question, {})
    if not by_name.keys() <= times.keys():
        times = known[question] = {name: measured(c) for name, c in by_name.items()}
        remember(known)
    ranked = sorted(by_name, key=lambda name: times[name])
    shown = ", ".join(f"{name} {times[name] * 1e6:.1f} µs" for name in ranked)
    if times[ranked[0]] == np.inf:
        return first
    return by_name[ranked[0]]._replace(reason=f"the fastest measured here, {shown}")


def measured(choice: Choice) -> float:
    """Seconds of one product by this kernel; infinite where it cannot be had."""
    try:
        with deciding(lambda _: choice):
            run = _operator(choice)

            def often() -> None:
                for _ in range(REPEATS):
                    run()

            program = capture(often)
    except (DeviceMemoryError, DeviceUnavailableError):
        return np.inf
    wait = cupy().cuda.Device().synchronize
    times = []
    for _ in range(1 + ROUNDS):  # the first warms up
        wait()
        started = time.perf_counter()
        program()
        wait()
        times.append((time.perf_counter() - started) / REPEATS)
    return median(times[1:])


def _operator(choice: Choice) -> Callable[[], Any]:
    """The operator on matrices of the sizes that were chosen for, its outputs preallocated."""
    row, rows, columns, terms = choice.precision, choice.rows, choice.columns, choice.terms
    precision = row.name if row.tensor_cores else None
    numbers = _normal(row.name)

    def drawn(*shape: int) -> Array:
        array = empty(shape, row.stored)
        flat = array.reshape(-1)
        for start in range(0, flat.size, DRAWN):
            part = flat[start : start + DRAWN]
            copy(part, numbers[: part.size])
        return array

    if choice.operator == "linear_forward":
        X, W, Y = drawn(rows, terms), drawn(columns, terms), empty((rows, columns), row.stored)
        return lambda: forward(precision, X, W, out=(Y, None), X_rounded=True)
    if choice.operator == "linear_dgrad":
        dZ, W, dX = drawn(rows, terms), drawn(terms, columns), empty((rows, columns), row.stored)
        db = empty((columns,), row.real)
        return lambda: dgrad(precision, None, dZ, W, out=(dX, db), dZ_rounded=True)
    dZ, X, dW = drawn(terms, rows), drawn(terms, columns), empty((rows, columns), row.real)
    copies = None, None
    if choice.along_k:  # which come with dZ and X
        copies = tuple(drawn(n, padded(terms))[:, :terms] for n in (rows, columns))
    return lambda: wgrad(precision, None, dZ, X, dW, copies)


@cache
def _normal(precision: str) -> Array:
    numbers = np.random.default_rng(0).standard_normal(DRAWN, np.float32)
    return round_to(numbers, precision)


def remembered() -> dict[str, dict[str, float]]:
    """Seconds by question and kernel, as this machine's processes have measured them."""
    data = machine_code_cache.found("cuda", _file())
    return {} if data is None else dict(json.loads(data))


def remember(known: dict[str, dict[str, float]]) -> None:
    """Keep it, beside what other processes have measured meanwhile."""
    merged = remembered() | known
    machine_code_cache.keep("cuda", _file(), json.dumps(merged).encode())


def _file() -> str:
    device = cupy().cuda.Device().id
    return _name(device, cupy())


@cache
def _name(device: int, cupy: Any) -> str:
    """Of the file for this GPU and these sources."""
    library = cublaslt.version() if cublaslt.available() else 0
    name = cupy.cuda.runtime.getDeviceProperties(device)["name"].decode()
    digest = machine_code_cache.DIGEST()
    texts = *nvrtc.headers().values(), *(nvrtc.text(file) for file in FILES)
    for part in (name, nvrtc.nvrtc_version(), str(library), *texts):
        digest.update(part.encode() + b"\0")
    return f"choices_{digest.hexdigest()[:32]}"
