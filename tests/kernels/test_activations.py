"""The activation table against independent formulas and against its own derivatives."""

from __future__ import annotations

import numpy as np
import pytest
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.arrays import Array
from backprop_kernels.reference import array_math

from tests import oracles

STEP = 1e-200


def points() -> Array:
    """Both tails, both sides of every kink, and small numbers; no kink itself."""
    magnitudes = np.concatenate([np.geomspace(1e-12, 20, 200), np.linspace(0.05, 8, 161)])
    return np.concatenate([-magnitudes, magnitudes])


def test_table_and_oracles_have_the_same_names() -> None:
    assert list(ACTIVATIONS) == list(oracles.ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_forward_is_the_published_function(name: str) -> None:
    z = points()
    value = ACTIVATIONS[name].forward(array_math, z)
    # 0.5 z (1 + erf z) and its kin lose digits of the value, never of z.
    bound = 1e-15 * (np.abs(z) + np.abs(oracles.ACTIVATIONS[name][0](z)))
    assert (np.abs(value - oracles.ACTIVATIONS[name][0](z)) <= bound).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivative_is_the_complex_step_of_forward(name: str) -> None:
    row = ACTIVATIONS[name]
    z = points()
    if name in ("relu6", "hardtanh", "hardsigmoid", "hardswish"):
        z = z[~np.isin(np.abs(z), (1, 3, 6))]
    stepped = row.forward(array_math, z + STEP * 1j)
    exact = np.imag(stepped + 0j * z) / STEP
    saved = {"Y": row.forward(array_math, z), "Z": z, "": None}[row.saves]
    slope = row.derivative(array_math, saved)
    # Where act' follows from Y, the rounding of Y near saturation is all that is left of it.
    assert (np.abs(slope - exact) <= 1e-13 * np.maximum(1, np.abs(exact))).all()
    assert (np.abs(exact - oracles.ACTIVATIONS[name][1](z)) <= 1e-13 * (1 + np.abs(exact))).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_two_slopes_are_all_of_a_derivative(name: str) -> None:
    """Those of the table, told apart by Y and by Z alike; where it names none there are more."""
    row = ACTIVATIONS[name]
    z = np.concatenate([points(), [-6.0, -3.0, -1.0, -0.0, 0.0, 1.0, 3.0, 6.0, np.inf, -np.inf]])
    if row.slopes is None:
        assert not row.saves or len(np.unique(row.derivative(array_math, points()))) > 2
        return
    assert row.slopes[0] != row.slopes[1]
    slope = row.derivative(array_math, z)
    assert set(slope) == set(row.slopes)
    if row.saves == "Y":
        assert np.array_equal(row.derivative(array_math, row.forward(array_math, z)), slope)
    assert row.derivative(array_math, np.array([np.nan])) == row.slopes[1]


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "softplus", "silu", "squareplus", "exp"])
def test_derivative_from_saved_y_keeps_its_digits_in_the_left_tail(name: str) -> None:
    z = -np.geomspace(1e-3, 15, 50)
    row = ACTIVATIONS[name]
    saved = row.forward(array_math, z) if row.saves == "Y" else z
    exact = oracles.ACTIVATIONS[name][1](z)
    if name == "tanh":  # 1 − y² cancels here by design: y is what is saved
        assert (np.abs(row.derivative(array_math, saved) - exact) <= 4e-16).all()
    else:
        np.testing.assert_allclose(row.derivative(array_math, saved), exact, rtol=1e-13)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_float32_stays_float32(name: str) -> None:
    assert ACTIVATIONS[name].forward(array_math, points().astype(np.float32)).dtype == np.float32
