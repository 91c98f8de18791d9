"""NumPy's namespace for formulas: erf against mpmath, the complex step of every function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.special
from backprop_kernels.reference import array_math as m

STEP = 1e-200


def test_erf_is_within_two_ulp() -> None:
    rng = np.random.default_rng(0)
    near_breakpoint = 0.84 + np.arange(-5, 6) * 1.1e-16
    x = np.concatenate(
        [
            rng.uniform(-6.2, 6.2, 3000),
            rng.uniform(0.7, 1.1, 1000),  # where it is at its worst, 1.5 ulp
            near_breakpoint,
            rng.choice([-1, 1], 500) * np.exp(rng.uniform(-700, 0, 500)),
        ]
    )
    with mpmath.workprec(120):
        for value, result in zip(x.tolist(), m.erf(x).tolist(), strict=True):
            true = mpmath.erf(value)
            ulp = mpmath.mpf(2) ** (mpmath.frexp(true)[1] - 53)
            assert abs(result - true) <= 2 * ulp, value


def test_erf_of_float32_is_the_rounded_float64() -> None:
    x = np.linspace(-4, 4, 10_001, dtype=np.float32)
    y = m.erf(x)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, scipy.special.erf(x.astype(np.float64)).astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_erf_of_special_values(dtype: str) -> None:
    tiny = np.finfo(dtype).smallest_subnormal
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, tiny, -tiny, 30.0, -30.0], dtype)
    expected = np.array([0.0, -0.0, 1, -1, np.nan, tiny, -tiny, 1, -1], dtype)
    y = m.erf(x)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(np.signbit(y[:4]), [False, True, False, True])


def test_erf_of_complex_numbers_to_first_order() -> None:
    x = np.linspace(-5, 5, 1001)
    y, expected = m.erf(x + 1j * STEP), scipy.special.erf(x + 1j * STEP)
    np.testing.assert_array_equal(y.real, m.erf(x))
    np.testing.assert_allclose(y.imag, expected.imag, rtol=2e-15)


DERIVATIVES: dict[str, tuple[Callable[[Any], Any], tuple[float, float]]] = {
    "exp": (np.exp, (-20, 20)),
    "expm1": (np.exp, (-20, 20)),
    "log": (lambda x: 1 / x, (1e-3, 50)),
    "log1p": (lambda x: 1 / (1 + x), (-0.9, 50)),
    "tanh": (lambda x: 1 / np.cosh(x) ** 2, (-15, 15)),
    "erf": (lambda x: 2 / np.sqrt(np.pi) * np.exp(-x * x), (-5, 5)),
    "sin": (np.cos, (-1.5, 1.5)),
    "cos": (lambda x: -np.sin(x), (0.1, 3)),
    "sqrt": (lambda x: 0.5 / np.sqrt(x), (1e-3, 50)),
    "abs": (np.sign, (-2, 2)),
    "sign": (np.zeros_like, (-2, 2)),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_complex_step_is_the_derivative(name: str) -> None:
    """The real part is the function's own value, the imaginary part its slope: 1e-14 relative."""
    slope, (low, high) = DERIVATIVES[name]
    x = np.linspace(low, high, 1000)  # an even number: 0, the kink of abs, is not among them
    function = getattr(m, name)
    y = function(x + 1j * STEP)
    assert y.dtype == np.complex128
    np.testing.assert_allclose(y.real, function(x), rtol=4e-15, atol=0)
    np.testing.assert_allclose(y.imag / STEP, slope(x), rtol=1e-14, atol=0)


def test_log1p_of_small_complex_numbers_keeps_its_digits() -> None:
    x = np.array([1e-18, -1e-18, 3e-10])
    np.testing.assert_array_equal(m.log1p(x + 1j * STEP).real, np.log1p(x))


def test_choices_go_by_the_real_part() -> None:
    z = np.array([2.0, -2.0, 2.0, -2.0]) + 1j * np.array([-STEP, STEP, STEP, -STEP])
    np.testing.assert_array_equal(m.abs(z), [z[0], -z[1], z[2], -z[3]])
    np.testing.assert_array_equal(m.sign(z), [1, -1, 1, -1])
    np.testing.assert_array_equal(m.where(z > 0, z, 0.0), [z[0], 0, z[2], 0])
    at_zero = np.array([-1j * STEP])
    np.testing.assert_array_equal(m.abs(at_zero), at_zero)


def test_at_a_kink_the_step_chooses_the_side() -> None:
    """As the module's docstring says: equal real parts compare by the imaginary parts."""
    z = np.array([1j * STEP, -1j * STEP])
    np.testing.assert_array_equal(m.where(z > 0, z, 0.0).imag, [STEP, 0.0])


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_dtype_stays(dtype: str, name: str) -> None:
    """Constants are weak: float32 arrays give float32, and the values of float64."""
    x = np.array([0.25, 0.5, 2.0], dtype)
    y = m.where(x > 0.3, getattr(m, name)(x), 1.0)
    assert y.dtype == dtype
    exact = getattr(m, name)(np.array([0.5, 2.0]))
    epsilon = np.finfo(dtype).eps
    np.testing.assert_allclose(y, [1.0, *exact], rtol=4 * float(epsilon))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sign_and_abs_of_special_values(dtype: str) -> None:
    x = np.array([-3.0, -0.0, 0.0, 5.0, np.inf, -np.inf, np.nan], dtype)
    np.testing.assert_array_equal(m.sign(x), np.array([-1, 0, 0, 1, 1, -1, np.nan], dtype))
    np.testing.assert_array_equal(m.abs(x), np.array([3, 0, 0, 5, np.inf, np.inf, np.nan], dtype))
