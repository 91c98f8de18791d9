"""Elementary functions of float32 and float64 `Value`s: the namespace `m` of every formula.

Each is written once, without branches, for a scalar or a vector. Polynomials are our own minimax
fits (Remez exchange in 60 digits, weighted by the relative error of the function).
Largest error in ulp, with FMA or without (float32: every argument with FMA; the rest: samples):

              exp  expm1  log  log1p  tanh  erf  sin, cos
    float32   1.0  1.5    0.9  1.4    2.0   1.3  1.6 for |x| ≤ 1e5
    float64   1.0  2.0    0.9  1.5    2.2   1.3  1.6 for |x| ≤ 1e9

Denormals, signed zeros, infinities and NaN are treated as IEEE and C ask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, nan
from typing import Any

from llvmlite import ir

from backprop_kernels.cpu.ir import (
    Value,
    abs,
    copysign,
    fma,
    inline,
    muladd,
    sqrt,
    where,
)

__all__ = [
    "abs",
    "cos",
    "elementwise",
    "erf",
    "exp",
    "expm1",
    "log",
    "log1p",
    "sign",
    "sin",
    "sqrt",
    "tanh",
    "where",
]

_LOG2_E = 1.4426950408889634
_2_OVER_PI = 0.6366197723675814


@dataclass(frozen=True)
class _Format:
    """What the functions need to know of a float type. Coefficients: constant term first."""

    width: int  # bits in all
    digits: int  # of them, the significand's
    bias: int  # of the exponent
    sqrt_half: int  # bits of √½
    exp_range: tuple[float, float]  # rounds to 0 below, overflows above
    expm1_range: tuple[float, float]  # rounds to −1 below, overflows above
    tanh_end: float  # rounds to 1 from here on
    erf_end: float
    ln2: tuple[float, float]  # the first part is short: its product with an exponent is exact
    half_pi: tuple[float, float, float]  # π/2 in three parts
    exp: tuple[float, ...]  # (eʳ − 1 − r)/r² in r, |r| ≤ ln 2/2
    log: tuple[float, ...]  # (log((1 + s)/(1 − s)) − 2s)/s³ in s², |s| ≤ 3 − 2√2
    sin: tuple[float, ...]  # (sin r − r)/r³ in r², |r| ≤ π/4
    cos: tuple[float, ...]  # (cos r − 1 + r²/2)/r⁴ in r², |r| ≤ π/4
    erf: tuple[float, ...]  # erf(x)/x − 1 in x², |x| ≤ 0.84
    erfc: tuple[float, ...]  # −log(1 − erf(x)) in x, 0.84 ≤ x ≤ erf_end

    @property
    def one(self) -> int:
        """Bits of 1.0."""
        return self.bias << self.digits

    @property
    def integer(self) -> float:
        """Adding it rounds to an integer and leaves that in the low bits: 1.5 · 2^digits."""
        return 1.5 * 2.0**self.digits

    @property
    def integer_bits(self) -> int:
        """Bits of `integer`."""
        return (self.bias + self.digits << self.digits) + (1 << self.digits - 1)


_FLOAT32 = _Format(
    width=32,
    digits=23,
    bias=127,
    sqrt_half=0x3F3504F3,
    exp_range=(-104.0, 89.0),
    expm1_range=(-18.0, 88.73),
    tanh_end=10.0,
    erf_end=3.95,
    ln2=(0.693145751953125, 1.4286068203094173e-06),
    half_pi=(1.5707963705062866, -4.371138828673793e-08, -1.7151245100058819e-15),
    exp=(
        0.5, 0.1666666567325592, 0.04166646674275398, 0.008333643898367882, 0.001393503975123167,
        0.00019662559498101473,
    ),
    log=(0.6666677594184875, 0.39977553486824036, 0.2987212836742401),
    sin=(-0.16666653752326965, 0.00833209790289402, -0.00019506023090798408),
    cos=(0.04166664555668831, -0.0013887290842831135, 2.4428643882856704e-05),
    erf=(
        0.12837916612625122, -0.3761259615421295, 0.11282958835363388, -0.026811733841896057,
        0.00506585743278265, -0.0006399478879757226,
    ),
    erfc=(
        5.685584983439185e-05, 1.1282713413238525, 0.6361420750617981, 0.10487651079893112,
        -0.022697487846016884, 0.003164934227243066, -0.0002087056200252846,
    ),
)  # fmt: skip

_FLOAT64 = _Format(
    width=64,
    digits=52,
    bias=1023,
    sqrt_half=0x3FE6A09E667F3BCD,
    exp_range=(-746.0, 710.0),
    expm1_range=(-38.0, 709.79),
    tanh_end=20.0,
    erf_end=5.95,
    ln2=(0.6931471803691238, 1.9082149292705877e-10),
    half_pi=(1.5707963267948966, 6.123233995736766e-17, -1.4973849048591698e-33),
    exp=(
        0.5, 0.16666666666666677, 0.04166666666666662, 0.008333333333321234, 0.0013888888888908752,
        0.00019841269887462774, 2.4801587281538445e-05, 2.7557242622435667e-06,
        2.7557305069609647e-07, 2.5109649259621347e-08, 2.0906756511408946e-09,
    ),
    log=(
        0.6666666666666735, 0.3999999999940875, 0.28571428744002847, 0.22222198378656433,
        0.1818357578689567, 0.15313726183467063, 0.14799479335059754,
    ),
    sin=(
        -0.1666666666666663, 0.008333333333321787, -0.00019841269829276906, 2.755731349867895e-06,
        -2.5050726640035928e-08, 1.589491065412258e-10,
    ),
    cos=(
        0.041666666666666595, -0.0013888888888873292, 2.4801587288935282e-05,
        -2.755731418730385e-07, 2.087569997790945e-09, -1.1358400867695984e-11,
    ),
    erf=(
        0.12837916709551256, -0.3761263890318325, 0.11283791670927765, -0.026866170639330837,
        0.005223977562330247, -0.0008548323013006561, 0.00012055173818514485,
        -1.4921580966628317e-05, 1.6394892172754686e-06, -1.5668113453144936e-07,
        1.0591433987622933e-08,
    ),
    erfc=(
        4.858404631981703e-08, 1.1283786504190274, 0.6366222705928424, 0.1027654135390746,
        -0.019115059126045046, -0.00022504355410530864, 0.001705105361933077,
        -0.0005833507793059323, 3.101307213908362e-06, 9.459720497380654e-05,
        -5.641970940515416e-05, 2.0842124141270517e-05, -5.654871475912477e-06,
        1.1765972463785778e-06, -1.8887564858491518e-07, 2.3070053323368428e-08,
        -2.0761782414597213e-09, 1.298007240420144e-10, -5.031775981199056e-12,
        9.100159282787121e-14,
    ),
)  # fmt: skip


def elementwise(formula: Callable[..., Any], n_args: int = 1) -> Any:
    """Return `formula(m, *values)` as a function for Numba code: see `ir.inline`.

    `act = elementwise(lambda m, z: z / (1.0 + m.exp(-z)))`, then `Y[j] = act(Z[j] + b[j])`.
    """
    return inline(lambda *values: formula(sys.modules[__name__], *values), n_args)


def exp(x: Value) -> Value:
    """eˣ: rounds into the denormals, 0 and ∞ as IEEE asks."""
    f = _format(x)
    low, high = f.exp_range
    # 2ⁿ may lie outside the normal numbers where eˣ does not: scale in two steps.
    half = f.bias // 2
    p, scale = _exp_parts(_clamp(x, low, high), where(x < 0, half, -half))
    return muladd(p, scale, scale) * where(x < 0, 2.0**-half, 2.0**half)


def expm1(x: Value) -> Value:
    """eˣ − 1, accurate for small x."""
    low, high = _format(x).expm1_range
    p, half = _exp_parts(_clamp(x, low, high), -1)  # 2ⁿ⁻¹: 2ⁿ overflows too early
    y = 2.0 * muladd(half, p, half - 0.5)
    return copysign(where(half == 0.5, p, y), x)  # halving would lose a denormal's last bit


def tanh(x: Value) -> Value:
    """tanh |x| = (1 − t)/(1 + t) with t = e^−2|x|, and 1 − t = −expm1: nothing cancels."""
    p, scale = _exp_parts(-2.0 * _at_most(abs(x), _format(x).tanh_end), 0)
    difference = muladd(scale, p, scale - 1.0)
    total = muladd(scale, p, scale + 1.0)
    return copysign(difference / total, x)


def log(x: Value) -> Value:
    """Natural logarithm: −∞ for ±0, NaN below."""
    f = _format(x)
    tiny = x < 2.0 ** (1 - f.bias)
    normal = where(tiny, x * 2.0**f.digits, x)
    exponent = _exponent(normal)
    significand = (normal.bits - (exponent << f.digits)).as_float()
    n = _to_float(exponent) - where(tiny, float(f.digits), 0.0)
    y = _log_of(significand - 1.0, n)
    return _log_special(y, x, x)


def log1p(x: Value) -> Value:
    """log(1 + x), accurate for small x: −∞ for −1, NaN below."""
    f = _format(x)
    u = 1.0 + x
    exponent = _exponent(u)
    shift = exponent << f.digits
    # (1 + x)/2ⁿ − 1 from x, as u has lost its last bits; 2⁻ⁿ comes as 4 · 2⁻ⁿ/4, never denormal.
    scaled = (x.bits - shift).as_float()
    inverse = (x.constant(4.0).bits - shift).as_float()
    y = _log_of(scaled + muladd(inverse, 0.25, -1.0), _to_float(exponent))
    return copysign(_log_special(y, u, x), x)


def erf(x: Value) -> Value:
    """The error function: x plus a polynomial near 0, then 1 − e^−polynomial."""
    f = _format(x)
    a = abs(x)
    near = muladd(_polynomial(x * x, f.erf), a, a)
    p, scale = _exp_parts(-_polynomial(_at_most(a, f.erf_end), f.erfc), 0)
    far = 1.0 - muladd(p, scale, scale)
    return copysign(where(a < 0.84, near, far), x)


def sin(x: Value) -> Value:
    """sin x: accurate for |x| ≤ 1e5 in float32 and 1e9 in float64, beyond that only in [−1, 1]."""
    return _sine(x, 0)


def cos(x: Value) -> Value:
    """cos x: accurate where `sin` is."""
    return _sine(x, 1)


def sign(x: Value) -> Value:
    """−1, 0 or 1; NaN for NaN."""
    return where(x > 0, 1.0, where(x < 0, -1.0, x))


def _format(x: Value) -> _Format:
    return _FLOAT32 if isinstance(x.element, ir.FloatType) else _FLOAT64


def _polynomial(x: Value, coefficients: tuple[float, ...]) -> Value:
    """Horner's rule."""
    y = x.constant(coefficients[-1])
    for c in coefficients[-2::-1]:
        y = muladd(y, x, c)
    return y


def _at_most(x: Value, high: float) -> Value:
    """min(x, high); NaN stays."""
    return where(x > high, high, x)


def _clamp(x: Value, low: float, high: float) -> Value:
    """`x` within the bounds; NaN stays."""
    return _at_most(where(x < low, low, x), high)


def _exp_parts(x: Value, offset: Any) -> tuple[Value, Value]:
    """Split eˣ = 2ⁿ (1 + p), |p| < 0.42; return p and 2^(n + offset), to be a normal number."""
    f = _format(x)
    magic = offset + (f.integer + f.bias)
    shifted = muladd(x, _LOG2_E, magic)
    n = shifted - magic
    r = muladd(n, -f.ln2[1], muladd(n, -f.ln2[0], x))
    p = muladd(r * r, _polynomial(r, f.exp), r)
    return p, (shifted.bits << f.digits).as_float()


def _exponent(x: Value) -> Value:
    """The integer n for which x/2ⁿ is in [√½, √2); x normal and positive."""
    f = _format(x)
    return ((x.bits + (f.one - f.sqrt_half)) >> f.digits) - f.bias


def _to_float(n: Value) -> Value:
    """A small integer as a float; AVX2 cannot convert 64-bit integers."""
    f = _FLOAT32 if n.element.width == 32 else _FLOAT64
    return (n + f.integer_bits).as_float() - f.integer


def _log_of(t: Value, n: Value) -> Value:
    """log(2ⁿ (1 + t)) for 1 + t in [√½, √2); the leading terms t − t²/2 stay out of the fit."""
    f = _format(t)
    s = t / (2.0 + t)
    z = s * s
    square = 0.5 * t * t
    rest = muladd(s, muladd(z, _polynomial(z, f.log), square), n * f.ln2[1])
    return muladd(n, f.ln2[0], t - (square - rest))


def _log_special(y: Value, u: Value, x: Value) -> Value:
    """`y` for positive finite u, else the limit of log u; `x` is what gives ∞ and NaN."""
    limit = where(u == 0, -inf, where(u < 0, nan, x))
    return where((u > 0) & (u < inf), y, limit)


def _sine(x: Value, quarter: int) -> Value:
    """sin(x + quarter · π/2): Cody and Waite's reduction to |r| ≤ π/4, then sine or cosine."""
    f = _format(x)
    a = abs(x)
    shifted = muladd(a, _2_OVER_PI, f.integer)
    n = shifted - f.integer
    r = a
    for part in f.half_pi:  # the first step is exact, given one rounding
        r = fma(n, -part, r)
    r = _clamp(r, -0.8, 0.8)  # where n is too large to hold
    z = r * r
    sine = muladd(r * z, _polynomial(z, f.sin), r)
    cosine = muladd(z * z, _polynomial(z, f.cos), muladd(z, -0.5, 1.0))
    q = shifted.bits + quarter
    y = where((q & 1) == 0, sine, cosine)
    flip = (q & 2) << (f.width - 2)
    if quarter == 0:
        flip = flip ^ (x.bits & 1 << f.width - 1)
    return (y.bits ^ flip).as_float()
