"""The learning-rate range test: a step at each of many rates, and how the loss took it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from backprop_kernels import checks
from backprop_kernels.errors import DataError, NonFiniteError, OptionError

from backprop.batches import Batches
from backprop.extras import need
from backprop.losses import Loss, resolve_loss
from backprop.model import Sequential
from backprop.optimizers import Optimizer, resolve_optimizer
from backprop.step import TrainStep
from backprop.validation import DataSet

SMOOTHING = 0.9  # of the losses: a batch is noisy, about ten say where it goes
FALL = 0.9  # a loss that stays above this share of the first quarter's has not fallen
GIVEN_UP = 4.0  # times the lowest loss so far: it has diverged


@dataclass
class LRCurve:
    """`rates` and the smoothed `losses` met at them; `suggestion` is a rate to start with."""

    rates: list[float]
    losses: list[float]

    @property
    def suggestion(self) -> float:
        """A tenth of the rate at which the loss was lowest: there it was about to diverge."""
        lowest = int(np.argmin(self.losses))
        if self.losses[lowest] > FALL * np.median(self.losses[: max(len(self.losses) // 4, 1)]):
            raise DataError(
                f"find_lr: losses: expected a fall within {self.rates[0]:g} … {self.rates[-1]:g}, "
                "got none; take a wider range, or scale inputs and targets"
            )
        return self.rates[lowest] / 10

    def plot(self, path: str | PathLike[str], title: str = "") -> None:
        """Draw loss by learning rate to a PNG, SVG or PDF file."""
        Figure = need("matplotlib.figure", "plot", "LRCurve.plot").Figure
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.rates, self.losses)
        axes.axvline(self.suggestion, color="tab:green", label=f"lr = {self.suggestion:.1e}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="smoothed loss", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=90)


def find_lr(
    model: Sequential,
    X: Any,
    y: Any,
    loss: str | Loss = "mse",
    optimizer: str | Optimizer = "Adam",
    batch_size: int = 32,
    *,
    low: float = 1e-5,
    high: float = 10.0,
    steps: int = 200,
    seed: int = 0,
) -> LRCurve:
    """Train with a rate that rises from `low` to `high` by a constant factor; take all of it back.

    Ends early once the loss has diverged (Smith 2017). Batches are drawn as `fit` draws them.
    """
    checks.integer("find_lr", "batch_size", batch_size, 1)
    checks.integer("find_lr", "steps", steps, 10)
    if not 0 < low < high < math.inf:
        raise OptionError(f"find_lr: low, high: expected 0 < low < high, got {low!r}, {high!r}")
    loss, rule = resolve_loss(loss), resolve_optimizer(optimizer)
    data = DataSet.checked(model, loss, X, y, None, "find_lr")
    batches = Batches(model.backend, data.columns, batch_size, True, seed, model.memory)
    step = TrainStep(model, loss, rule, batches.size, seed=seed)
    before, lr = model.state_dict(), rule.lr
    curve, average = LRCurve([], []), 0.0
    endless = (batch for epoch in range(steps) for batch in batches.epoch(epoch))
    try:
        for i, batch in zip(range(steps), endless, strict=False):
            rule.lr = low * (high / low) ** (i / (steps - 1))
            average = SMOOTHING * average + (1 - SMOOTHING) * float(step.run(*batch))
            curve.rates.append(rule.lr)
            curve.losses.append(average / (1 - SMOOTHING ** (i + 1)))
            if curve.losses[-1] > GIVEN_UP * min(curve.losses):
                break
    except NonFiniteError:
        pass  # the end of the range
    finally:
        model.load_state_dict(before)
        rule.lr = lr
    return curve
