"""Every tolerance of the tests, with its derivation. Nothing is tuned until green.

u is the unit roundoff of the dtype. A sum of K products in any order of additions satisfies, per
element, |computed − exact| ≤ γ_K |A||B| with γ_K = K u/(1 − K u) (Higham 2002, §3.1; a fused
multiply-add only removes roundings). That always holds. With independent roundings the error grows
as √K instead, and 2 √K u |A||B| + u |exact| is what a sound kernel keeps on random operands: tight
enough to see an operand or a result rounded to 16 bits, which γ_K at large K is not.
Constant operands round the same way at every step, so they are held to γ_K alone.
"""

from __future__ import annotations

import numpy as np
from backprop_kernels.arrays import Array

# Roundings within one activation, derivative or loss formula: none has more than 8 operations in
# a chain, and each math function is good to 2 ulp.
FORMULA = 16


def unit(dtype: np.dtype) -> float:
    """Unit roundoff: half the distance from 1 to the next number."""
    return float(np.finfo(dtype).eps) / 2


def gamma(terms: int, dtype: np.dtype) -> float:
    """γ_K, for any order of summation."""
    return terms * unit(dtype) / (1 - terms * unit(dtype))


def sum_bound(
    terms: int, magnitude: Array, exact: Array, dtype: np.dtype, systematic: bool = False
) -> Array:
    """Per-element bound on a sum of `terms` products whose absolute values sum to `magnitude`."""
    always = gamma(terms, dtype) * magnitude
    if systematic:
        return always
    u = unit(dtype)
    return np.minimum(always, 2 * np.sqrt(terms) * u * magnitude + u * np.abs(exact))


def activation_bound(z: Array, error: Array, value: Array, slope: Array, dtype: np.dtype) -> Array:
    """|act(z + error) − act(z)| to first order, plus the roundings of the formula itself.

    The formulas are relative to the larger of z and act(z): 0.5 z (1 + erf z) loses digits of
    act(z), never of z.
    """
    own = FORMULA * unit(dtype) * (np.abs(z) + np.abs(value))
    return 1.1 * slope * error + own


def derivative_bound(
    gradient: Array, error: Array, z: Array, slope: Array, dtype: np.dtype
) -> Array:
    """|g' act'(z) − g act'(z)| for |g' − g| ≤ error.

    act' is good to u times max(1, |z|, |act'|): 1 − tanh² rounds to u, and the chain rule of
    gelu_tanh and mish multiplies it by z.
    """
    steepness = np.maximum(np.maximum(1, np.abs(z)), np.abs(slope))
    own = FORMULA * unit(dtype) * np.abs(gradient) * steepness
    return (np.abs(slope) + FORMULA * unit(dtype)) * error + own


def assert_within(computed: Array, exact: Array, bound: Array, what: str) -> None:
    """Every element within its own bound; the message names the worst."""
    error = np.abs(computed.astype(exact.dtype) - exact)
    # A bound of 0 (an empty sum, a product with 0) asks for equality; NaN fails.
    bad = ~(error <= bound)
    if bad.any():
        with np.errstate(all="ignore"):
            ratio = np.where(bad, np.nan_to_num(error / bound, nan=np.inf, posinf=np.inf), 0)
        place = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.size} elements beyond their bound; at "
            f"{tuple(int(i) for i in place)} got {computed[place]!r}, exact {exact[place]!r}, "
            f"bound {np.broadcast_to(bound, ratio.shape)[place]:.2e}"
        )
