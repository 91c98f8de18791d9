"""THE loss table. One entry is one loss; to add an elementwise one, add an entry.

Every loss is a weighted mean, L = Σᵢ wᵢ lᵢ / Σᵢ wᵢ with lᵢ the mean over row i's outputs, so a
row of weight 2 counts exactly as two rows. `loss` makes ∂L/∂Z in the same pass.

`value(m, y, t, *options)` and `gradient(...) = ∂value/∂y` are formulas in the sense of
`activations.py`, with one output y, its target t and the options in the table's order.
Losses of a whole row (cross_entropy, gaussian_nll) have no such formula: each backend's `loss`
file spells them out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import log
from typing import Any

from backprop_kernels.activations import sigmoid, softplus


@dataclass(frozen=True)
class Loss:
    """One loss. `targets` names what the target array must hold: see `TARGETS`."""

    formula: str
    targets: str
    value: Callable[..., Any] | None
    gradient: Callable[..., Any] | None
    options: dict[str, Any] = field(default_factory=dict)  # name: default


# What a target may hold. The text ends "expected …" in error messages.
TARGETS = {
    "real": "finite numbers",
    "counts": "numbers ≥ 0",
    "probability": "numbers in [0, 1]",
    "binary": "0 or 1",
    "sign": "-1 or +1 (for labels 0 and 1 pass 2*y - 1)",
    "classes": "class ids 0 … classes - 1, or rows of class probabilities",
}


def _huber(m: Any, y: Any, t: Any, delta: Any) -> Any:
    a = m.abs(y - t)
    return m.where(a <= delta, 0.5 * a * a, delta * (a - 0.5 * delta))


def _huber_gradient(m: Any, y: Any, t: Any, delta: Any) -> Any:
    d = y - t
    return m.where(m.abs(d) <= delta, d, delta * m.sign(d))


def _log_cosh(m: Any, y: Any, t: Any) -> Any:
    a = m.abs(y - t)
    return a + m.log1p(m.exp(-2.0 * a)) - log(2)


def _quantile(m: Any, y: Any, t: Any, q: Any) -> Any:
    e = t - y
    return m.where(e <= 0, (q - 1.0) * e, q * e)


def _bce(m: Any, z: Any, t: Any, pos_weight: Any) -> Any:
    return (1.0 - t) * softplus(m, z) + pos_weight * t * softplus(m, -z)


def _bce_gradient(m: Any, z: Any, t: Any, pos_weight: Any) -> Any:
    # sigmoid(z) and sigmoid(−z) apart, not 1 − sigmoid(z): no cancellation in either tail.
    return (1.0 - t) * sigmoid(m, z) - pos_weight * t * sigmoid(m, -z)


def _focal(m: Any, z: Any, t: Any, alpha: Any, gamma: Any) -> Any:
    # (1 − p)^γ = exp(−γ softplus(z)) for p = sigmoid(z), and mirrored for the negatives.
    positive = alpha * m.exp(-gamma * softplus(m, z)) * softplus(m, -z)
    negative = (1.0 - alpha) * m.exp(-gamma * softplus(m, -z)) * softplus(m, z)
    return t * positive + (1.0 - t) * negative


def _focal_gradient(m: Any, z: Any, t: Any, alpha: Any, gamma: Any) -> Any:
    p, q = sigmoid(m, z), sigmoid(m, -z)
    up, down = softplus(m, z), softplus(m, -z)
    positive = -alpha * m.exp(-gamma * up) * (gamma * p * down + q)
    negative = (1.0 - alpha) * m.exp(-gamma * down) * (gamma * q * up + p)
    return t * positive + (1.0 - t) * negative


LOSSES: dict[str, Loss] = {
    "mse": Loss(
        "(y − t)²", "real",
        lambda m, y, t: (y - t) * (y - t),
        lambda m, y, t: 2.0 * (y - t),
    ),
    "mae": Loss(
        "|y − t|", "real",
        lambda m, y, t: m.abs(y - t),
        lambda m, y, t: m.sign(y - t),
    ),
    "huber": Loss(
        "(y − t)²/2 where |y − t| ≤ delta, else delta (|y − t| − delta/2)", "real",
        _huber,
        _huber_gradient,
        {"delta": 1.0},
    ),
    "log_cosh": Loss(
        "log cosh(y − t)", "real",
        _log_cosh,
        lambda m, y, t: m.tanh(y - t),
    ),
    "poisson": Loss(
        "exp(y) − t y", "counts",
        lambda m, y, t: m.exp(y) - t * y,
        lambda m, y, t: m.exp(y) - t,
    ),
    "quantile": Loss(
        "q (t − y) where y < t, else (1 − q) (y − t)", "real",
        _quantile,
        lambda m, y, t, q: m.where(y < t, -q, m.where(y > t, 1.0 - q, 0.0)),
        {"q": 0.5},
    ),
    "cross_entropy": Loss(
        "−Σ_c weight_c p_c log softmax(z)_c, p smoothed: (1 − s) p + s/classes", "classes",
        None,
        None,
        {"label_smoothing": 0.0, "class_weight": None, "ignore_index": -100},
    ),
    "bce_with_logits": Loss(
        "−pos_weight t log sigmoid(z) − (1 − t) log sigmoid(−z)", "probability",
        _bce,
        _bce_gradient,
        {"pos_weight": 1.0},
    ),
    "focal": Loss(
        "−alpha (1 − p)^gamma log p for t = 1, −(1 − alpha) p^gamma log(1 − p) for t = 0; "
        "p = sigmoid(z)", "binary",
        _focal,
        _focal_gradient,
        {"alpha": 0.25, "gamma": 2.0},
    ),
    "hinge": Loss(
        "max(0, 1 − t y)", "sign",
        lambda m, y, t: m.where(1.0 - t * y <= 0, 0.0, 1.0 - t * y),
        lambda m, y, t: m.where(1.0 - t * y <= 0, 0.0, -t),
    ),
    "gaussian_nll": Loss(
        "(s + (mu − t)² exp(−s))/2; outputs are [mu, s = log variance], two per target", "real",
        None,
        None,
    ),
}  # fmt: skip
