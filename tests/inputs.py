"""Shapes and operands that kernels get wrong, shared by the operators' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from typing import Any

import numpy as np
from backprop_kernels.arrays import Array

from backprop.model import Sequential
from tests.cuda_host.backend import backend as emulated

# Around every tile, vector and leaf size in use: 0, 1, primes, 2ⁿ and 2ⁿ ± 1.
SIZES = (0, 1, 2, 3, 7, 8, 9, 13, 14, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97,
         127, 128, 129, 257)  # fmt: skip
LONG_SIZES = (*SIZES, 255, 256, 1000, 4097)
# Past the sizes where a matrix is packed, a sum is split and threads share the work.
LARGE = [
    (a, b, c) for sizes in ((1553, 530, 13), (1024, 97, 33)) for a, b, c in permutations(sizes)
]

Pair = tuple[Array, Array]


def shapes(sizes: Sequence[int], backend: Any = None) -> Iterator[tuple[int, int, int]]:
    """Triples in which each pair of sizes meets once in each pair of places, then the large ones.

    A Latin square: the third size is a function of the first two and runs over all of them. The
    emulator, much slower than a kernel, gets every other size.
    """
    if backend is emulated:
        sizes = sizes[::2]
    for i, first in enumerate(sizes):
        for j, second in enumerate(sizes):
            yield first, second, sizes[(i + j) % len(sizes)]
    yield from LARGE


def integers(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, low: int = -8
) -> Array:
    """Whole numbers in [low, 8], whose products and sums every dtype here holds exactly."""
    return rng.integers(low, 9, shape).astype(dtype)


def _normal(rng: np.random.Generator, rows: int, columns: int, terms: int) -> Pair:
    return rng.standard_normal((rows, terms)), rng.standard_normal((columns, terms))


def _log_uniform(rng: np.random.Generator, rows: int, columns: int, terms: int) -> Pair:
    def draw(n: int) -> Array:  # 30 binades, as float32 still squares them without underflow
        return np.exp2(rng.uniform(-15, 15, (n, terms))) * rng.choice([-1.0, 1.0], (n, terms))

    return draw(rows), draw(columns)


def _cancelling(rng: np.random.Generator, rows: int, columns: int, terms: int) -> Pair:
    """The second half of each sum takes back the first, all but one part in a thousand."""
    A, B = _normal(rng, rows, columns, terms)
    half = terms // 2
    A[:, half : 2 * half] = A[:, :half]
    B[:, half : 2 * half] = -B[:, :half] * (1 + 1e-3 * rng.standard_normal((columns, half)))
    B[:, 2 * half :] *= 1e-3
    return A, B


def _positive(rng: np.random.Generator, rows: int, columns: int, terms: int) -> Pair:
    return rng.uniform(0.5, 1.5, (rows, terms)), rng.uniform(0.5, 1.5, (columns, terms))


def _constant(rng: np.random.Generator, rows: int, columns: int, terms: int) -> Pair:
    return np.full((rows, terms), rng.uniform(1, 2)), np.full((columns, terms), rng.uniform(1, 2))


# Each makes A (rows, terms) and B (columns, terms), for the product A Bᵀ.
OPERANDS: dict[str, Callable[[np.random.Generator, int, int, int], Pair]] = {
    "normal": _normal,
    "log_uniform": _log_uniform,
    "cancelling": _cancelling,
    "positive": _positive,
    "constant": _constant,
}


def operands(kind: str, rows: int, columns: int, terms: int, dtype: np.dtype) -> Pair:
    """A (rows, terms) and B (columns, terms) of a kind in `OPERANDS`."""
    A, B = OPERANDS[kind](np.random.default_rng(rows + columns + terms), rows, columns, terms)
    return A.astype(dtype), B.astype(dtype)


def on_host(model: Sequential) -> Array:
    """The flat parameters as NumPy reads them."""
    return model.memory.numpy(model.parameters)


def exact_dtype(dtype: np.dtype) -> np.dtype:
    """A wider dtype to compute the truth in: float64 for float32, long double for float64."""
    return np.dtype(np.float64 if dtype == np.float32 else np.longdouble)
