from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from backprop_kernels import cpu, reference
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cpu import program, threads
from backprop_kernels.cpu.sparse_input import entries

from tests import saved as kept
from tests.guarded import Guards
from tests.inputs import OPERANDS, SIZES, exact_dtype, integers, operands, shapes
from tests.tolerances import assert_within, sum_bound

DENSITIES = (0.0, 0.1, 0.5, 1.0)


def thin(X: Array, density: float, seed: int = 0) -> Array:
    """X with elements set to 0, some of them −0, until this share is left."""
    rng = np.random.default_rng(seed)
    lost = rng.random(X.shape) >= density
    X[lost] = np.where(rng.random(X.shape) < 0.5, 0.0, -0.0)[lost]
    return X


def forward(
    backend: ModuleType, X: Array, W: Array, b: Array | None, activation: str = "identity",
    dropout: Dropout | None = None, phase: int = 0,
) -> tuple[Array, Array | None]:  # fmt: skip
    """sparse_input_forward on guarded arrays."""
    guards = Guards(phase)
    shape = (len(X), len(W))
    Y = guards.output(shape, X.dtype)
    saved = kept.output(guards, backend, activation, shape, X.dtype)
    arguments = [guards.input(a) for a in (X, W, b)]
    got = backend.sparse_input_forward(*arguments, activation, dropout, out=(Y, saved))
    guards.check()
    assert got[0] is Y
    return Y, saved


def wgrad(backend: ModuleType, dZ: Array, X: Array, phase: int = 0) -> Array:
    """sparse_input_wgrad on guarded arrays."""
    guards = Guards(phase)
    dW = guards.output((dZ.shape[1], X.shape[1]), dZ.dtype)
    assert backend.sparse_input_wgrad(guards.input(dZ), guards.input(X), out=dW) is dW
    guards.check()
    return dW


def test_whole_numbers_are_exact(backend: ModuleType, dtype: np.dtype) -> None:
    rng = np.random.default_rng(0)
    sizes = (0, *SIZES[1::2]) if backend is cpu else SIZES[::5]  # others run the dense kernels
    for number, (batch, out, columns) in enumerate(shapes(sizes, backend)):
        X = thin(integers(rng, (batch, columns), dtype), DENSITIES[number % 4], number)
        W, b = integers(rng, (out, columns), dtype), integers(rng, (out,), dtype)
        dZ = integers(rng, (batch, out), dtype)
        Z = X.astype(float) @ W.T.astype(float) + b
        Y, _ = forward(backend, X, W, b, "relu", phase=number % 2)
        assert np.array_equal(Y, Z.clip(0)), (batch, columns, out)
        dW = wgrad(backend, dZ, X, phase=number % 2)
        assert np.array_equal(dW, dZ.T.astype(float) @ X.astype(float)), (batch, columns, out)


@pytest.mark.parametrize("kind", OPERANDS)
def test_sums_are_within_their_bounds(backend: ModuleType, dtype: np.dtype, kind: str) -> None:
    wide = exact_dtype(dtype)
    for batch, out, columns in ((1, 1, 2), (7, 65, 64), (34, 16, 257), (257, 49, 17)):
        X, W = operands(kind, batch, out, columns, dtype)
        dZ = operands("normal", batch, out, columns, dtype)[0][:, :1].repeat(out, 1)
        thin(X, 0.3)
        Y, _ = forward(backend, X, W, None)
        exact = X.astype(wide) @ W.T.astype(wide)
        magnitude = np.abs(X).astype(wide) @ np.abs(W).T.astype(wide)
        assert_within(Y, exact, sum_bound(columns, magnitude, exact, dtype), kind)
        exact = dZ.T.astype(wide) @ X.astype(wide)
        magnitude = np.abs(dZ).T.astype(wide) @ np.abs(X).astype(wide)
        assert_within(wgrad(backend, dZ, X), exact, sum_bound(batch, magnitude, exact, dtype), kind)


@pytest.mark.parametrize("activation", ["tanh", "gelu", "identity"])
def test_what_leaves_with_the_product_is_linear_forwards(
    backend: ModuleType, dtype: np.dtype, activation: str
) -> None:
    rng = np.random.default_rng(1)
    # Whole numbers, so that both orders of summation give the same Z.
    X, W, b = (integers(rng, shape, dtype, -2) for shape in ((77, 20), (70, 20), (70,)))
    thin(X, 0.2)
    dropout = Dropout(0.4, np.array([3, 5], np.int64), 1)
    for drop in (None, dropout):
        Y, saved = backend.sparse_input_forward(X, W, b, activation, drop)
        expected, others = backend.linear_forward(X, W, b, activation, drop)
        assert np.array_equal(Y, expected)
        assert (saved is None) == (others is None)
        assert saved is None or np.array_equal(saved, others)


def test_nan_is_not_zero(backend: ModuleType, dtype: np.dtype) -> None:
    X, W = operands("normal", 20, 70, 23, dtype)
    thin(X, 0.1)
    X[11, 5] = np.nan
    Y, _ = forward(backend, X, W, None)
    assert np.isnan(Y[11]).all()
    dW = wgrad(backend, np.ones((20, 70), dtype), X)
    assert np.array_equal(np.isnan(dW), np.tile(np.arange(23) == 5, (70, 1)))
    X[11, 5], X[3, 2] = 0, np.inf
    W[:, 2] = 1
    assert np.isinf(forward(backend, X, W, None)[0][3]).all()


def test_program_lists_an_input_once_and_anew_in_every_run(dtype: np.dtype) -> None:
    rng = np.random.default_rng(2)
    X, W = thin(integers(rng, (601, 30), dtype), 0.2), integers(rng, (70, 30), dtype)
    dZ, Y, dW = integers(rng, (601, 70), dtype), np.empty((601, 70), dtype), np.empty_like(W)

    def step(X: Array) -> None:
        cpu.sparse_input_forward(X, W, out=(Y, None))
        cpu.sparse_input_wgrad(dZ, X, out=dW)

    replay = cpu.capture(step, X)
    assert isinstance(replay, program.Program)
    assert len(replay.kernels) == 3
    for other in (X, thin(integers(rng, X.shape, dtype), 0.9), np.zeros_like(X)):
        replay(other)
        assert np.array_equal(Y, other @ W.T) and np.array_equal(dW, dZ.T @ other)


def test_entries_stand_for_their_rows(dtype: np.dtype) -> None:
    """Columns from the left, as many of each row: what is left over is a 0 in no column."""
    rng = np.random.default_rng(4)
    X = thin(rng.standard_normal((301, 70)).astype(dtype), 0.2)
    X[17] = 0
    X[18, 3] = np.nan
    found = entries(X)
    assert found is not None and found.shape == (301, np.count_nonzero(X, axis=1).max())
    for row, listed in zip(X, found, strict=True):
        (columns,) = np.nonzero(row)
        rest = len(listed) - len(columns)
        assert np.array_equal(listed["column"], [*columns, *[70] * rest])
        assert np.array_equal(listed["value"], [*row[columns], *[0.0] * rest], equal_nan=True)


def test_entries_give_the_bits_of_what_they_stand_for(dtype: np.dtype) -> None:
    rng = np.random.default_rng(5)
    for batch, out in ((1, 1), (3, 70), (601, 130), (1030, 64)):
        X, W, b = (rng.standard_normal(s).astype(dtype) for s in ((batch, 40), (out, 40), (out,)))
        dZ, dW = rng.standard_normal((batch, out)).astype(dtype), np.empty_like(W)
        thin(X, 0.2)
        W[0, 5], X[:, 5] = np.inf, 0  # 0 · ∞ of a short row would be NaN
        found = entries(X)
        assert found is not None
        dense, listed = (cpu.sparse_input_forward(A, W, b, "gelu") for A in (X, found))
        assert np.isfinite(dense[0]).all()
        for one, other in zip(dense, listed, strict=True):
            assert one is not None and other is not None and one.tobytes() == other.tobytes()
        dZ[0] = np.inf
        cpu.sparse_input_wgrad(dZ, found, out=dW)
        assert cpu.sparse_input_wgrad(dZ, X).tobytes() == dW.tobytes()
        assert np.isfinite(dW[:, X[0] == 0]).all()


def test_entries_are_smaller_than_their_rows_or_none(dtype: np.dtype) -> None:
    X = np.zeros((50, 40), dtype)
    X[:, :20] = 1
    found = entries(X)
    assert found is not None and found.nbytes <= X.nbytes
    X[49, 20] = 1
    assert entries(X) is None
    nothing = entries(np.zeros((50, 40), dtype))
    assert nothing is not None and nothing.shape == (50, 0)
    no_rows = entries(np.zeros((0, 40), dtype))
    assert no_rows is not None and no_rows.shape == (0, 0)
    W = np.ones((3, 40), dtype)
    assert not cpu.sparse_input_forward(nothing, W)[0].any()


def test_no_bit_depends_on_the_number_of_threads(dtype: np.dtype) -> None:
    X, W = operands("normal", 1031, 200, 155, dtype)
    thin(X, 0.15)
    dZ = np.ascontiguousarray(W[:, :1].T.repeat(1031, 0) * X[:, 1:2])
    before, results = threads.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            threads.set_num_threads(count)
            found = entries(X)
            assert found is not None
            outputs = cpu.sparse_input_forward(found, W)[0], cpu.sparse_input_wgrad(dZ, X)
            results.append((*outputs, found))
    finally:
        threads.set_num_threads(before)
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert one.tobytes() == other.tobytes()
    assert np.allclose(results[0][1], reference.sparse_input_wgrad(dZ, X), rtol=1e-3, atol=1e-2)
