"""THE optimizer table. One entry is one update rule; to add one, add an entry.

`update(m, p, g, state, *scalars)` is a formula in the sense of `activations.py`: one parameter,
its gradient and its state values in, the new parameter and state values out.
`scalars(step, lr, **options)` are the numbers that are the same for all parameters of a step;
they are computed once a step in float64, by arithmetic alone (x ** 0.5 is a root), so that a GPU
can be given them as a formula too. Options, defaults and arithmetic are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Optimizer:
    """One update rule; `state` names one array per entry, each like the parameters."""

    formula: str
    state: tuple[str, ...]
    options: dict[str, Any]  # name: default, `lr` first
    scalars: Callable[..., tuple[float, ...]]  # (step from 1, **options)
    update: Callable[..., tuple[Any, tuple[Any, ...]]]


def regularised(update: Callable[..., Any]) -> Callable[..., Any]:
    """`update` behind clipping by value and the gradients of l1 Σ|p| and l2/2 Σp²."""

    def formula(
        m: Any, p: Any, g: Any, state: Any, max_value: Any, l1: Any, l2: Any, *scalars: Any
    ) -> Any:
        g = m.where(g > max_value, max_value, m.where(g < -max_value, -max_value, g))
        return update(m, p, g + l1 * m.sign(p) + l2 * p, state, *scalars)

    return formula


def _sgd_scalars(
    step: int, lr: float, momentum: float, nesterov: bool, weight_decay: float
) -> tuple[float, ...]:
    # Plain, momentum and Nesterov are one line: p − lr (own g + carried buf).
    own, carried = (1.0, momentum) if nesterov else (0.0, 1.0)
    return lr, momentum, weight_decay, own, carried


def _sgd(m: Any, p: Any, g: Any, state: Any, *scalars: Any) -> Any:
    lr, momentum, weight_decay, own, carried = scalars
    g = g + weight_decay * p
    buf = momentum * state[0] + g
    return p - lr * (own * g + carried * buf), (buf,)


def _rmsprop(m: Any, p: Any, g: Any, state: Any, *scalars: Any) -> Any:
    lr, alpha, one_minus_alpha, eps, weight_decay, momentum = scalars
    g = g + weight_decay * p
    square_avg = alpha * state[0] + one_minus_alpha * g * g
    buf = momentum * state[1] + g / (m.sqrt(square_avg) + eps)
    return p - lr * buf, (square_avg, buf)


def _adam_scalars(
    step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> tuple[float, ...]:
    beta1, beta2 = betas
    step_size = lr / (1 - beta1**step)
    root_correction = (1 - beta2**step) ** 0.5
    return beta1, 1 - beta1, beta2, 1 - beta2, step_size, 1 / root_correction, eps, weight_decay


def _adam(m: Any, p: Any, g: Any, state: Any, *scalars: Any) -> Any:
    beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, correction, eps, decay = scalars
    g = g + decay * p
    exp_avg = beta1 * state[0] + one_minus_beta1 * g
    exp_avg_sq = beta2 * state[1] + one_minus_beta2 * g * g
    return p - step_size * exp_avg / (m.sqrt(exp_avg_sq) * correction + eps), (exp_avg, exp_avg_sq)


def _adamw_scalars(
    step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> tuple[float, ...]:
    return (*_adam_scalars(step, lr, betas, eps, 0.0), 1 - lr * weight_decay)


def _adamw(m: Any, p: Any, g: Any, state: Any, *scalars: Any) -> Any:
    return _adam(m, p * scalars[-1], g, state, *scalars[:-1])


def _adagrad(m: Any, p: Any, g: Any, state: Any, *scalars: Any) -> Any:
    lr, eps, weight_decay = scalars
    g = g + weight_decay * p
    total = state[0] + g * g
    return p - lr * g / (m.sqrt(total) + eps), (total,)


def _lion(m: Any, p: Any, g: Any, state: Any, *scalars: Any) -> Any:
    lr, beta1, one_minus_beta1, beta2, one_minus_beta2, shrink = scalars
    direction = m.sign(beta1 * state[0] + one_minus_beta1 * g)
    return shrink * p - lr * direction, (beta2 * state[0] + one_minus_beta2 * g,)


_ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}

OPTIMIZERS: dict[str, Optimizer] = {
    "SGD": Optimizer(
        "buf ← momentum buf + g;  p ← p − lr buf  (Nesterov: − lr (g + momentum buf))",
        ("momentum_buffer",),
        {"lr": 1e-3, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0},
        _sgd_scalars,
        _sgd,
    ),
    "RMSprop": Optimizer(
        "s ← alpha s + (1 − alpha) g²;  buf ← momentum buf + g/(√s + eps);  p ← p − lr buf",
        ("square_avg", "momentum_buffer"),
        {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.0},
        lambda step, lr, alpha, eps, weight_decay, momentum: (
            lr, alpha, 1 - alpha, eps, weight_decay, momentum
        ),
        _rmsprop,
    ),
    "Adam": Optimizer(
        "m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  p ← p − lr m̂/(√v̂ + eps)",
        ("exp_avg", "exp_avg_sq"),
        _ADAM,
        _adam_scalars,
        _adam,
    ),
    "AdamW": Optimizer(
        "p ← (1 − lr weight_decay) p, then Adam",
        ("exp_avg", "exp_avg_sq"),
        {**_ADAM, "weight_decay": 1e-2},
        _adamw_scalars,
        _adamw,
    ),
    "Adagrad": Optimizer(
        "s ← s + g²;  p ← p − lr/(1 + (step − 1) lr_decay) g/(√s + eps)",
        ("sum",),
        {"lr": 1e-2, "lr_decay": 0.0, "weight_decay": 0.0, "eps": 1e-10},
        lambda step, lr, lr_decay, weight_decay, eps: (
            lr / (1 + (step - 1) * lr_decay), eps, weight_decay
        ),
        _adagrad,
    ),
    "Lion": Optimizer(
        "p ← (1 − lr weight_decay) p − lr sign(β₁m + (1 − β₁)g);  m ← β₂m + (1 − β₂)g",
        ("exp_avg",),
        {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0},
        lambda step, lr, betas, weight_decay: (
            lr, betas[0], 1 - betas[0], betas[1], 1 - betas[1], 1 - lr * weight_decay
        ),
        _lion,
    ),
}  # fmt: skip
