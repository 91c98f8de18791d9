"""THE activation table. One entry is one activation; to add one, add an entry.

A formula is written once, as a plain function of a math namespace `m` and a value, and read by
every backend: with NumPy arrays by `reference/`, as LLVM IR by `cpu/`. So formulas use operators
and `m.<function>` only, choose with `m.where`, and never branch.

`derivative` takes what forward saved: Y where act'(Z) follows from Y without loss (no second
array is kept then), else Z. At a kink it is PyTorch's choice. Where it has but two values these are
`slopes`, and a backend may save one bit for each element (`saved_beside`).
Comparisons are written so that NaN passes through: `where(z <= 0, 0, z)`, not `maximum(z, 0)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi, sqrt
from typing import Any

from backprop_kernels.arrays import Array, Dropout

Formula = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Activation:
    """One activation: `forward(m, z)`, and `derivative(m, y)` or `(m, z)` as `saves` says."""

    formula: str
    saves: str  # "Y", "Z", or "" for nothing
    init: str  # the initialiser that `auto` picks for the layer below
    forward: Formula
    derivative: Formula
    slopes: tuple[float, float] | None = None  # flat, steep: all that `derivative` can give


def sigmoid(m: Any, z: Any) -> Any:
    """1/(1 + e⁻ᶻ), by the branch whose exponential cannot overflow."""
    e = m.exp(-m.abs(z))
    return m.where(z >= 0, 1.0, e) / (1.0 + e)


def softplus(m: Any, z: Any) -> Any:
    """log(1 + eᶻ), without overflow, and accurate for z → −∞."""
    return m.where(z <= 0, 0.0, z) + m.log1p(m.exp(-m.abs(z)))


def _gelu_tanh_argument(z: Any) -> Any:
    return sqrt(2 / pi) * (z + 0.044715 * z * z * z)


def _gelu_tanh_derivative(m: Any, z: Any) -> Any:
    t = m.tanh(_gelu_tanh_argument(z))
    slope = sqrt(2 / pi) * (1.0 + 3 * 0.044715 * z * z)
    return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * slope


def _silu_derivative(m: Any, z: Any) -> Any:
    s = sigmoid(m, z)
    return s * (1.0 + z * (1.0 - s))


def _mish_derivative(m: Any, z: Any) -> Any:
    t = m.tanh(softplus(m, z))
    return t + z * sigmoid(m, z) * (1.0 - t * t)


def _squareplus(m: Any, z: Any) -> Any:
    a = m.abs(z)
    large, small = m.where(a > 2.0, a, 2.0), m.where(a > 2.0, 2.0, a)
    root = large * m.sqrt(1.0 + (small / large) * (small / large))  # √(z² + 4), z² unformed
    # For z < 0, z + √(z² + 4) cancels; its conjugate does not.
    return m.where(z < 0, 2.0 / (root + a), 0.5 * (z + root))


SELU_SCALE, SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717

ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(
        "z", "", "glorot_uniform",
        lambda m, z: z,
        lambda m, s: 1.0,
    ),
    "relu": Activation(
        "max(z, 0)", "Y", "he_uniform",
        lambda m, z: m.where(z <= 0, 0.0, z),
        lambda m, y: m.where(y <= 0, 0.0, 1.0),
        slopes=(0.0, 1.0),
    ),
    "leaky_relu": Activation(
        "z if z > 0 else 0.01 z", "Y", "he_uniform",
        lambda m, z: m.where(z <= 0, 0.01 * z, z),
        lambda m, y: m.where(y <= 0, 0.01, 1.0),
        slopes=(0.01, 1.0),
    ),
    "relu6": Activation(
        "min(max(z, 0), 6)", "Y", "he_uniform",
        lambda m, z: m.where(z <= 0, 0.0, m.where(z >= 6, 6.0, z)),
        lambda m, y: m.where(y <= 0, 0.0, m.where(y >= 6, 0.0, 1.0)),
        slopes=(0.0, 1.0),
    ),
    "elu": Activation(
        "z if z > 0 else exp(z) − 1", "Y", "he_uniform",
        lambda m, z: m.where(z <= 0, m.expm1(z), z),
        lambda m, y: m.where(y <= 0, 1.0 + y, 1.0),
    ),
    "celu": Activation(
        "max(z, 0) + min(exp(z) − 1, 0)", "Y", "he_uniform",
        lambda m, z: m.where(z <= 0, m.expm1(z), z),
        lambda m, y: m.where(y <= 0, 1.0 + y, 1.0),
    ),
    "selu": Activation(
        "1.0507 (z if z > 0 else 1.6733 (exp(z) − 1))", "Y", "lecun_normal",
        lambda m, z: SELU_SCALE * m.where(z <= 0, SELU_ALPHA * m.expm1(z), z),
        lambda m, y: m.where(y <= 0, SELU_SCALE * SELU_ALPHA + y, SELU_SCALE),
    ),
    "gelu": Activation(
        "z Φ(z) = z (1 + erf(z/√2))/2", "Z", "he_uniform",
        lambda m, z: 0.5 * z * (1.0 + m.erf(sqrt(0.5) * z)),
        lambda m, z: 0.5 * (1.0 + m.erf(sqrt(0.5) * z))
        + z * m.exp(-0.5 * z * z) * (1 / sqrt(2 * pi)),
    ),
    "gelu_tanh": Activation(
        "z (1 + tanh(√(2/π) (z + 0.044715 z³)))/2", "Z", "he_uniform",
        lambda m, z: 0.5 * z * (1.0 + m.tanh(_gelu_tanh_argument(z))),
        _gelu_tanh_derivative,
    ),
    "silu": Activation(
        "z sigmoid(z)", "Z", "he_uniform",
        lambda m, z: z * sigmoid(m, z),
        _silu_derivative,
    ),
    "mish": Activation(
        "z tanh(softplus(z))", "Z", "he_uniform",
        lambda m, z: z * m.tanh(softplus(m, z)),
        _mish_derivative,
    ),
    "softplus": Activation(
        "log(1 + exp(z))", "Y", "he_uniform",
        softplus,
        lambda m, y: -m.expm1(-y),
    ),
    # Saves Z: 1 − |Y| would cancel for large |Z|.
    "softsign": Activation(
        "z/(1 + |z|)", "Z", "glorot_uniform",
        lambda m, z: z / (1.0 + m.abs(z)),
        lambda m, z: 1.0 / ((1.0 + m.abs(z)) * (1.0 + m.abs(z))),
    ),
    "tanh": Activation(
        "tanh(z)", "Y", "glorot_uniform",
        lambda m, z: m.tanh(z),
        lambda m, y: 1.0 - y * y,
    ),
    "sigmoid": Activation(
        "1/(1 + exp(−z))", "Y", "glorot_uniform",
        sigmoid,
        lambda m, y: y * (1.0 - y),
    ),
    "hardtanh": Activation(
        "min(max(z, −1), 1)", "Y", "glorot_uniform",
        lambda m, z: m.where(z <= -1, -1.0, m.where(z >= 1, 1.0, z)),
        lambda m, y: m.where(y <= -1, 0.0, m.where(y >= 1, 0.0, 1.0)),
        slopes=(0.0, 1.0),
    ),
    # Saves Z: z/6 + 1/2 rounds to the kinks before z reaches them.
    "hardsigmoid": Activation(
        "min(max(z/6 + 1/2, 0), 1)", "Z", "glorot_uniform",
        lambda m, z: m.where(z <= -3, 0.0, m.where(z >= 3, 1.0, z * (1 / 6) + 0.5)),
        lambda m, z: m.where(z <= -3, 0.0, m.where(z >= 3, 0.0, 1 / 6)),
        slopes=(0.0, 1 / 6),
    ),
    "hardswish": Activation(
        "z hardsigmoid(z)", "Z", "he_uniform",
        lambda m, z: m.where(z <= -3, 0.0, m.where(z >= 3, z, z * (z * (1 / 6) + 0.5))),
        lambda m, z: m.where(z <= -3, 0.0, m.where(z >= 3, 1.0, z * (1 / 3) + 0.5)),
    ),
    "squareplus": Activation(
        "(z + √(z² + 4))/2", "Y", "he_uniform",
        _squareplus,
        lambda m, y: 1.0 / (1.0 + 1.0 / (y * y)),
    ),
    "sin": Activation(
        "sin(z)", "Z", "glorot_uniform",
        lambda m, z: m.sin(z),
        lambda m, z: m.cos(z),
    ),
    "exp": Activation(
        "exp(z)", "Y", "lecun_normal",
        lambda m, z: m.exp(z),
        lambda m, y: y,
    ),
}  # fmt: skip


WORD = 32  # bits are saved in words of uint32, column j in bit j % 32; a row starts with a word


def saved_as_bits(activation: str, bits: bool) -> bool:
    """Whether what is saved is a bit for each element, set where the slope is the steep one.

    `bits`: whether the backend saves any.
    """
    return bits and ACTIVATIONS[activation].slopes is not None


def saved_beside(
    activation: str, columns: int, dtype: Any, dropped: bool, bits: bool
) -> tuple[int, Any] | None:
    """(columns, dtype) of the array that forward writes for backward, where Y is not enough."""
    if saved_as_bits(activation, bits):
        return -(-columns // WORD), "uint32"
    saves = ACTIVATIONS[activation].saves
    return (columns, dtype) if saves == "Z" or (saves == "Y" and dropped) else None


def saved_output(
    Y: Array,
    kept: Array | None,
    activation: str,
    dropout: Dropout | None,
    empty: Callable[[tuple[int, ...], Any], Array] | None,
    bits: bool = False,
) -> tuple[Array | None, Array | None]:
    """(what the caller gets as `saved`, what the kernel writes besides Y).

    `kept` is the caller's array for it; without one, `empty(shape, dtype)` makes it, if given.
    """
    if not ACTIVATIONS[activation].saves:
        return None, None
    dropped = dropout is not None and dropout.rate > 0
    beside = saved_beside(activation, Y.shape[1], Y.dtype, dropped, bits)
    if kept is Y or (kept is None and beside is None):
        return Y, None
    if kept is None and empty is not None and beside is not None:
        kept = empty((len(Y), beside[0]), beside[1])
    return kept, kept
