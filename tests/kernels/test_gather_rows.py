"""gather_rows moves bits: every dtype, width and order, exactly."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from backprop_kernels.errors import KindError, ShapeError

from tests.guarded import Guards

SHAPES = [(1,), (7,), (5, 1), (40, 3), (200, 155), (33, 16), (70, 2, 3)]


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_is_the_row_asked_for(
    backend: ModuleType, shape: tuple[int, ...], dtype: str
) -> None:
    rng = np.random.default_rng(0)
    X = rng.integers(-(2**31), 2**31, shape).astype(dtype)
    for count in (0, 1, 31, 32, 33, 500):
        index = rng.integers(0, len(X), count)
        guards = Guards(count)
        Y = guards.output((count, *shape[1:]), np.dtype(dtype))
        assert backend.gather_rows(X, index, out=Y) is Y
        guards.check()
        np.testing.assert_array_equal(Y, X[index])
        np.testing.assert_array_equal(backend.gather_rows(X, index), X[index])


def test_bits_of_nan_and_denormals_survive(backend: ModuleType) -> None:
    bits = np.array([[0x7F800001, 1], [0xFFC12345, 0x80000001]], np.uint32)
    X = bits.view(np.float32)
    Y = backend.gather_rows(X, np.array([1, 0, 1]))
    np.testing.assert_array_equal(Y.view(np.uint32), bits[[1, 0, 1]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])  # rows of one word, and of more
def test_indices_beyond_take_the_nearest_row(backend: ModuleType, dtype: str) -> None:
    X = np.arange(4, dtype=dtype)
    index = np.array([-1, 4, 2**62, -(2**62), 2])
    np.testing.assert_array_equal(backend.gather_rows(X, index), [0, 3, 3, 0, 2])


def test_refusals_name_the_argument(backend: ModuleType) -> None:
    X = np.zeros((3, 2), np.float32)
    with pytest.raises(KindError, match=r"^gather_rows: index: expected dtype int64, got int32$"):
        backend.gather_rows(X, np.zeros(1, np.int32))
    with pytest.raises(KindError, match=r"^gather_rows: X: expected rows of float32, float64, "):
        backend.gather_rows(X.astype(np.float16), np.zeros(1, np.int64))
    with pytest.raises(ShapeError, match=r"^gather_rows: X: expected at least one row, got shape"):
        backend.gather_rows(X[:0], np.zeros(1, np.int64))
    with pytest.raises(ShapeError, match=r"^gather_rows: out Y: expected shape \(n=1, columns=2\)"):
        backend.gather_rows(X, np.zeros(1, np.int64), out=np.zeros((2, 2), np.float32))
