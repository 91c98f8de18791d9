"""NumPy arrays as the namespace `m` of every formula: float32, float64 and, for proofs, complex128.

A complex array carries a value and, in a tiny imaginary part (1e-200), a derivative: the complex
step. So each function here is exact to first order in the imaginary part, and choices go by the
real part. Formulas compare with NumPy's own operators, which agree but for one case: where the real
parts are equal they look at the imaginary parts. At a kink the complex step therefore gives the
one-sided derivative along the step, and proofs keep away from kinks.

Callers silence floating-point warnings with `np.errstate(all="ignore")`.
"""

from __future__ import annotations

from math import pi
from typing import Any

import numpy as np

exp, expm1, log, tanh = np.exp, np.expm1, np.log, np.tanh
sin, cos, sqrt = np.sin, np.cos, np.sqrt
where = np.where  # of two Python numbers it makes float64

_TWO_OVER_ROOT_PI = 2 / pi**0.5

# Our own minimax fits (Remez exchange in 60 digits), constant term first.
_ERF_NEAR = (  # erf(x)/x − 1 in x², |x| ≤ 0.84, to 2⁻⁵⁶
    0.12837916709551256,
    -0.3761263890318325,
    0.11283791670927765,
    -0.026866170639330837,
    0.005223977562330247,
    -0.0008548323013006561,
    0.00012055173818514485,
    -1.4921580966628317e-05,
    1.6394892172754686e-06,
    -1.5668113453144936e-07,
    1.0591433987622933e-08,
)
_ERF_FAR = (  # (1 − erf(x)) e^x²/u in u = 2/(2 + x), 0.84 ≤ x ≤ 6, to 2⁻⁵⁶ of erf
    0.2821173805717393,
    0.28155773488239355,
    0.2526612284690522,
    0.13819946689220214,
    0.25045191474282924,
    -0.5155098639588087,
    1.0580830509380448,
    -1.7630883190117457,
    1.7531559027185708,
    -1.0217139913366127,
    0.330626996344329,
    -0.04654183185700009,
)


def abs(x: Any) -> Any:
    """|x|, or ±x by the sign of the real part."""
    return np.where(x.real < 0, -x, x) if np.iscomplexobj(x) else np.abs(x)


def sign(x: Any) -> Any:
    """−1, 0 or 1 of the real part; NaN for NaN."""
    return np.sign(x.real).astype(x.dtype)


def log1p(x: Any) -> Any:
    """log(1 + x), accurate for small x; NumPy's complex one is not."""
    if np.iscomplexobj(x):
        return np.log1p(x.real) + 1j * (x.imag / (1.0 + x.real))
    return np.log1p(x)


def erf(x: Any) -> Any:
    """The error function, within 2 ulp in float64; float32 is rounded from that."""
    if np.iscomplexobj(x):
        slope = _TWO_OVER_ROOT_PI * np.exp(-x.real * x.real)
        return erf(x.real) + 1j * (slope * x.imag)
    a = np.abs(x).astype(np.float64)
    square = a * a
    u = 2.0 / (2.0 + a)
    near = a + a * _polynomial(square, _ERF_NEAR)
    far = 1.0 - np.exp(-square) * u * _polynomial(u, _ERF_FAR)
    return np.copysign(np.where(a < 0.84, near, far), x).astype(x.dtype)


def _polynomial(x: Any, coefficients: tuple[float, ...]) -> Any:
    """Horner's rule."""
    y = coefficients[-1]
    for c in coefficients[-2::-1]:
        y = y * x + c
    return y
