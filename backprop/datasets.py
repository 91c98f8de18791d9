"""Data to try things on, without a download: two real sets and generators of any size.

A generator draws rows in blocks, block k from (seed, k) alone. So the first rows are the same
whatever their number, and `streamed=True` gives matrices that are drawn as they are read, for
sizes that no memory holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.errors import MissingExtraError, OptionError

if TYPE_CHECKING:
    from backprop.flights import FlightsData

BLOCK = 4096  # rows drawn at a time
Draw = Callable[["np.random.Generator", int], tuple[Array, Array]]


def flights(split: Literal["date", "random"] = "date", seed: int = 0) -> FlightsData:
    """New York's flights of 2013: will one arrive late? See `backprop.flights`.

    X_train and y_train, X_valid and y_valid, on disjoint days by default. Needs the extra `demo`.
    """
    from backprop.flights import load

    return load(split, seed)


def digits() -> tuple[Array, Array]:
    """1,797 handwritten digits: X (rows, 64), grey values 0 … 1 of 8 × 8 pixels, and class ids y.

    The file is part of scikit-learn, which is not imported. Needs the extra `sklearn`.
    """
    import gzip

    spec = find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            "datasets.digits: expected scikit-learn, whose file it is, got none installed; "
            'pip install "fused-backprop[sklearn]"'
        )
    folder = Path(spec.submodule_search_locations[0])
    with gzip.open(folder / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    return (table[:, :-1] / 16).astype(np.float32), table[:, -1].astype(np.int64)


def blobs(
    rows: int = 1000, features: int = 2, classes: int = 3, *, spread: float = 1.0, seed: int = 0,
    streamed: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """Normal clouds: X (rows, features) and class ids y, centres 4 apart on average."""
    _sizes("blobs", features=features, classes=classes)
    shape = (classes, features)
    centres = np.random.default_rng(seed).normal(0, 4 / np.sqrt(2 * features), shape)

    def draw(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        y = rng.integers(0, classes, count)
        return centres[y] + spread * rng.standard_normal((count, features)), y

    return _generated("blobs", draw, rows, seed, streamed)


def moons(
    rows: int = 1000, *, noise: float = 0.1, seed: int = 0, streamed: bool = False
) -> tuple[Any, Any]:
    """Two interleaved half circles: X (rows, 2) and y, 0 or 1."""

    def draw(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        y = rng.integers(0, 2, count)
        angle = np.pi * rng.random(count)
        x0, x1 = np.cos(angle), np.sin(angle)
        X = np.stack([np.where(y, 1 - x0, x0), np.where(y, 0.5 - x1, x1)], axis=1)
        return X + noise * rng.standard_normal(X.shape), y

    return _generated("moons", draw, rows, seed, streamed)


def spirals(
    rows: int = 1000, classes: int = 2, *, turns: float = 1.0, noise: float = 0.05, seed: int = 0,
    streamed: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """Spiral arms around one centre: X (rows, 2) within radius 1, and class ids y."""
    _sizes("spirals", classes=classes)

    def draw(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        y, radius = rng.integers(0, classes, count), np.sqrt(rng.random(count))
        angle = 2 * np.pi * (turns * radius + y / classes)
        X = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return X + noise * rng.standard_normal(X.shape), y

    return _generated("spirals", draw, rows, seed, streamed)


def friedman(
    rows: int = 1000, features: int = 10, *, noise: float = 1.0, seed: int = 0,
    streamed: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """Friedman's first regression: y = 10 sin(π x₀x₁) + 20 (x₂ − ½)² + 10 x₃ + 5 x₄ + noise.

    X (rows, features ≥ 5) is uniform in 0 … 1; columns from x₅ on tell nothing.
    """
    _sizes("friedman", features=features)
    if features < 5:
        raise OptionError(f"datasets.friedman: features: expected 5 or more, got {features}")

    def draw(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        X = rng.random((count, features))
        y = 10 * np.sin(np.pi * X[:, 0] * X[:, 1]) + 20 * (X[:, 2] - 0.5) ** 2
        return X, y + 10 * X[:, 3] + 5 * X[:, 4] + noise * rng.standard_normal(count)

    return _generated("friedman", draw, rows, seed, streamed)


def teacher(
    rows: int = 1000, features: int = 64, outputs: int = 1, *, hidden: int = 64,
    noise: float = 0.0, seed: int = 0, streamed: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """What a random network answers: normal X (rows, features), y (rows, outputs) of variance ≈ 1.

    The regression of benchmarks: any width, and a network of `hidden` tanh neurons fits it exactly.
    """
    _sizes("teacher", features=features, outputs=outputs, hidden=hidden)
    weights = np.random.default_rng(seed)
    V = weights.normal(0, 1 / np.sqrt(features), (features, hidden))
    W = weights.normal(0, 1.6 / np.sqrt(hidden), (hidden, outputs))  # tanh halves a deviation of 1

    def draw(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        X = rng.standard_normal((count, features))
        y = np.tanh(X @ V) @ W
        return X, y + noise * rng.standard_normal(y.shape)

    return _generated("teacher", draw, rows, seed, streamed)


class Drawn:
    """X or y of a generator: rows are drawn when they are read, `matrix[start:stop]`."""

    def __init__(self, block: Callable[[int], Array], rows: int) -> None:
        self._block = block
        sample = block(0)[:0]
        self.shape: tuple[int, ...] = (rows, *sample.shape[1:])
        self.dtype = sample.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self[:], dtype)

    def __getitem__(self, part: slice) -> Array:
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise OptionError(f"datasets: expected rows as [start:stop], got [{part}]")
        start, stop, _ = part.indices(len(self))
        rows = np.empty((max(stop - start, 0), *self.shape[1:]), self.dtype)
        for k in range(start // BLOCK, -(-stop // BLOCK)):
            first, last = max(start, k * BLOCK), min(stop, (k + 1) * BLOCK)
            if first < last:
                drawn = self._block(k)
                rows[first - start : last - start] = drawn[first - k * BLOCK : last - k * BLOCK]
        return rows


def _generated(where: str, draw: Draw, rows: int, seed: int, streamed: bool) -> tuple[Any, Any]:
    checks.integer(f"datasets.{where}", "rows", rows, 1)
    checks.integer(f"datasets.{where}", "seed", seed, 0)

    def block(which: int, k: int) -> Array:
        drawn = draw(np.random.default_rng((seed, k + 1)), BLOCK)[which]
        return drawn if drawn.dtype.kind == "i" else drawn.astype(np.float32)

    X, y = (Drawn(partial(block, which), rows) for which in (0, 1))
    return (X, y) if streamed else (X[:], y[:])


def _sizes(where: str, **sizes: int) -> None:
    for name, size in sizes.items():
        checks.integer(f"datasets.{where}", name, size, 1)
