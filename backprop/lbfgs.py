"""L-BFGS: few parameters, all rows at once, many digits (Nocedal & Wright 2006, ch. 3 and 7)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.errors import NonFiniteError, OptionError

from backprop.gradients import Gradients
from backprop.history import History
from backprop.losses import Loss, resolve_loss
from backprop.model import Sequential
from backprop.validation import DataSet

DECREASE, CURVATURE = 1e-4, 0.9  # the Wolfe conditions' constants
TRIALS = 30  # of one line search
ROUNDING = 4 * float(np.finfo(np.float64).eps)
Objective = Callable[[Array], tuple[float, Array]]


@dataclass
class Point:
    """A place, the loss there, its gradient, and the slope along the line that led there."""

    x: Array
    value: float
    gradient: Array
    length: float = 0.0
    slope: float = 0.0


def minimize(
    model: Sequential,
    X: Any,
    y: Any,
    loss: str | Loss = "mse",
    *,
    steps: int = 200,
    memory: int = 10,
    l2: float = 0.0,
    tolerance: float = 1e-6,
    sample_weight: Any = None,
    seed: int = 0,
) -> History:
    """Train `model` on all rows at once until the gradient is gone; returns loss and its norm.

    For small problems: a step costs one pass over all rows or a few, and there are no moments to
    tune. Dropout, if any, keeps one mask, and batch norm sees all rows.

    Args:
        steps: at most so many.
        memory: pairs of steps and gradient changes that stand for the curvature.
        l2: adds l2/2 Σw² over the weights of Linear layers.
        tolerance: ends once no element of the gradient is larger.
    """
    for name, value, low in (("steps", steps, 1), ("memory", memory, 1), ("seed", seed, 0)):
        checks.integer("minimize", name, value, low)
    for name, number in (("l2", l2), ("tolerance", tolerance)):
        if not (isinstance(number, int | float) and 0 <= number < math.inf):
            raise OptionError(f"minimize: {name}: expected a number ≥ 0, got {number!r}")
    loss = resolve_loss(loss)
    data = DataSet.checked(model, loss, X, y, sample_weight, "minimize")
    objective = _objective(model, loss, data, l2, seed)
    history = History()
    point = Point(model.memory.numpy(model.parameters).astype(np.float64), 0.0, np.zeros(0))
    point.value, point.gradient = objective(point.x)
    if not math.isfinite(point.value):
        raise NonFiniteError(f"minimize: expected a finite loss at the start, got {point.value}")
    pairs: list[tuple[Array, Array, float]] = []
    try:
        for _ in range(steps):
            if np.abs(point.gradient).max() <= tolerance:
                break
            direction = _direction(point.gradient, pairs)
            first = 1.0 if pairs else min(1.0, 1 / np.abs(point.gradient).sum())
            new = _search(objective, point, direction, first)
            if new is None:
                if not pairs:
                    break  # not even downhill: the digits are used up
                pairs.clear()
                continue
            change, turn = new.x - point.x, new.gradient - point.gradient
            if change @ turn > 1e-10 * (turn @ turn):
                pairs = [*pairs, (change, turn, 1 / float(change @ turn))][-memory:]
            at_rest = new.value >= point.value and (
                np.linalg.norm(new.gradient) >= np.linalg.norm(point.gradient)
            )
            if at_rest:
                break
            point = new
            history.append(loss=point.value, gradient_norm=float(np.linalg.norm(point.gradient)))
    finally:
        model.memory.fill(model.parameters, point.x.astype(model.dtype))
    return history


def _objective(model: Sequential, loss: Loss, data: DataSet, l2: float, seed: int) -> Objective:
    """parameters → (loss, gradient), in float64 outside the kernels."""
    frozen = np.ones(model.layout.size, bool)
    penalty = np.zeros(model.layout.size)
    for name, view in model.layout.views(frozen).items():
        view[...] = name in model.frozen
    for view in model.layout.views(penalty).values():
        view[...] = l2 if view.ndim == 2 else 0.0
    rows = len(data)
    gradients = Gradients(model, loss, rows, seed, model.frozen)
    memory = model.memory
    with memory:
        columns = [
            memory.place(c if isinstance(c, np.ndarray) else c.read(0, rows)) for c in data.columns
        ]
        program = model.backend.capture(gradients.operators(rows), *columns)

    def objective(x: Array) -> tuple[float, Array]:
        memory.fill(model.parameters, x.astype(model.dtype))
        with memory, np.errstate(all="ignore"):
            program(*columns)
        g = memory.numpy(gradients.flat).astype(np.float64)
        g[frozen] = 0
        value = float(gradients.value) + 0.5 * float(penalty @ (x * x))
        return value, g + np.where(frozen, 0, penalty * x)

    return objective


def _direction(gradient: Array, pairs: list[tuple[Array, Array, float]]) -> Array:
    """−H g by the two loops (Algorithm 7.4)."""
    q, shares = -gradient, []
    for change, turn, inverse in reversed(pairs):
        share = inverse * float(change @ q)
        q = q - share * turn
        shares.append(share)
    if pairs:
        change, turn, inverse = pairs[-1]
        q = q / (inverse * float(turn @ turn))
    for (change, turn, inverse), share in zip(pairs, reversed(shares), strict=True):
        q = q + (share - inverse * float(turn @ q)) * change
    return q


def _search(objective: Objective, start: Point, d: Array, length: float) -> Point | None:
    """A point along d that meets the strong Wolfe conditions (Algorithms 3.5 and 3.6), or None."""
    start.length, start.slope = 0.0, float(start.gradient @ d)
    if not start.slope < 0:
        return None
    low, high, best = start, None, None
    for _ in range(TRIALS):
        x = start.x + length * d
        value, gradient = objective(x)
        new = Point(x, value, gradient, length, float(gradient @ d))
        # Near the end the loss has no digits left to fall by; its gradient still has.
        enough = start.value + max(DECREASE * length * start.slope, -ROUNDING * abs(start.value))
        enough += ROUNDING * abs(start.value)
        finite = math.isfinite(value) and math.isfinite(new.slope)
        if not finite or value > enough or (low is not start and value >= low.value):
            high = new
        elif abs(new.slope) <= -CURVATURE * start.slope:
            return new
        else:
            if new.slope * (1 if high is None else high.length - low.length) >= 0:
                high = low
            low = best = new
        length = 2 * length if high is None else _between(low, high)
        if high is not None and abs(high.length - low.length) < 1e-12 * max(low.length, 1e-12):
            break
    return best


def _between(low: Point, high: Point) -> float:
    """The least point of the parabola through both, kept away from the ends."""
    width = high.length - low.length
    share = 0.5
    if math.isfinite(high.value):
        bend = high.value - low.value - low.slope * width
        if bend > 0:
            share = -low.slope * width / (2 * bend)
    return low.length + min(max(share, 0.1), 0.9) * width
