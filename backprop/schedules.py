"""How the learning rate changes during a fit: a factor of the optimizer's `lr`.

THE schedule table. `factor(t, total, **options)`: t epochs have passed, a fraction within an epoch,
of `total`. The factor of every step is set before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import cos, isfinite, pi
from typing import Any

from backprop_kernels import checks
from backprop_kernels.errors import KindError, OptionError

from backprop.callbacks import Callback, Training
from backprop.monitor import Monitor


@dataclass(frozen=True)
class Curve:
    """One schedule: its formula in words, its options with defaults, and the factor."""

    formula: str
    options: dict[str, Any]
    factor: Callable[..., float]


def _cosine(t: float, total: float, period: float | None, growth: float, end: float) -> float:
    length = total if period is None else period
    if period is None:
        t = min(t, total)
    else:
        while t >= length:
            t, length = t - length, length * growth
    return end + (1 - end) * (1 + cos(pi * t / length)) / 2


def _one_cycle(t: float, total: float, peak: float, start: float, end: float) -> float:
    def ease(a: float, b: float, share: float) -> float:
        return b + (a - b) * (1 + cos(pi * share)) / 2

    share = min(t / total, 1.0)
    if share < peak:
        return ease(start, 1.0, share / peak)
    return ease(1.0, end, (share - peak) / (1 - peak))


SCHEDULES: dict[str, Curve] = {
    "constant": Curve("1", {}, lambda t, total: 1.0),
    "step": Curve(
        "gamma^⌊t/every⌋",
        {"every": 10.0, "gamma": 0.1},
        lambda t, total, every, gamma: gamma ** math.floor(t / every),
    ),
    "exponential": Curve(
        "gamma^t",
        {"gamma": 0.95},
        lambda t, total, gamma: gamma**t,
    ),
    "cosine": Curve(
        "end + (1 − end)(1 + cos(π t/period))/2; then again, each period growth times as long",
        {"period": None, "growth": 1.0, "end": 0.0},
        _cosine,
    ),
    "one_cycle": Curve(
        "by half cosines from start to 1 at the share peak of the epochs, then to end",
        {"peak": 0.3, "start": 0.04, "end": 4e-6},
        _one_cycle,
    ),
}
# Options with an upper limit, and those that may be 0; all are finite and none is negative.
BELOW_ONE = ("peak",)
MAY_BE_ZERO = ("start", "end")
NAMES = {**dict.fromkeys(SCHEDULES), "plateau": None}


class Schedule(Callback):
    """`Schedule("cosine", warmup=2, period=10)`, or of a function of the epochs passed.

    Args:
        curve: a name from `SCHEDULES`, or a function: epochs passed → factor of lr.
        warmup: epochs (0.5 is half of one) over which the factor rises linearly from 0; the curve
            begins behind them, and has the epochs that are left.
        options: of the curve; see docs/optimisation.md.
    """

    def __init__(
        self, curve: str | Callable[[float], float], *, warmup: float = 0.0, **options: Any
    ) -> None:
        self.curve: Callable[..., float]
        if isinstance(curve, str):
            checks.choice("Schedule", "curve", curve, NAMES)
            if curve == "plateau":
                raise OptionError("Schedule: curve: plateau watches the history: use Plateau(…)")
            known = SCHEDULES[curve].options
            self.curve, self.options = SCHEDULES[curve].factor, {**known, **options}
        elif callable(curve):
            known = {}
            self.curve, self.options = lambda t, total: curve(t), {**options}
        else:
            raise KindError(
                f"Schedule: curve: expected a name or a function of the epochs passed, got "
                f"{type(curve).__name__}"
            )
        for name, value in options.items():
            if name not in known:
                raise OptionError(
                    f"Schedule: expected options warmup{''.join(f', {k}' for k in known)}; "
                    f"got {name!r}"
                )
            _positive("Schedule", name, value, name in MAY_BE_ZERO)
            if name in BELOW_ONE and value >= 1:
                raise OptionError(f"Schedule: {name}: expected a number below 1, got {value!r}")
        if options.get("growth", 1.0) < 1:
            raise OptionError(f"Schedule: growth: expected at least 1, got {options['growth']!r}")
        _positive("Schedule", "warmup", warmup, True)
        self.warmup = float(warmup)

    def factor(self, t: float, total: float, step: float = 0.0) -> float:
        """The factor of a step that begins after `t` of `total` epochs and takes `step` of one."""
        if self.warmup >= total:
            raise OptionError(
                f"Schedule: warmup: expected less than the {total:g} epochs of the fit, got "
                f"{self.warmup:g}"
            )
        value = self.curve(max(t - self.warmup, 0.0), total - self.warmup, **self.options)
        if not isinstance(value, int | float) or not (isfinite(value) and value >= 0):
            raise OptionError(
                f"Schedule: curve: expected factors ≥ 0, got {value!r} after {t:g} epochs"
            )
        rising = min((t + step) / self.warmup, 1.0) if t < self.warmup else 1.0
        return float(value) * rising

    def fit_begin(self, training: Training) -> None:
        self.factor(0.0, training.epochs)

    def steps_begin(self, training: Training) -> None:
        batch = training.step.gradients.batch_size * training.step.accumulate
        share, factors = batch / training.rows, training.step.update.lr_factors
        for i in range(training.coming):
            factors[i] = self.factor(training.position_of(i), training.epochs, share)


class Plateau(Callback):
    """Multiplies lr by `factor` whenever `monitor` has not improved for `patience` epochs.

    Args:
        monitor, min_delta, mode: as for EarlyStopping.
        patience: epochs without improvement; they are counted anew after each reduction.
        lowest: the product of all reductions does not go below this.
        warmup: epochs of linear rise from 0 at the start.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 0.1,
        patience: int = 3,
        min_delta: float = 0.0,
        mode: str = "auto",
        lowest: float = 0.0,
        warmup: float = 0.0,
    ) -> None:
        checks.integer("Plateau", "patience", patience, 1)
        _positive("Plateau", "factor", factor, False)
        _positive("Plateau", "lowest", lowest, True)
        if factor >= 1:
            raise OptionError(f"Plateau: factor: expected a number below 1, got {factor!r}")
        self.monitor = Monitor("Plateau", monitor, mode, min_delta)
        self.factor, self.patience, self.lowest = factor, int(patience), lowest
        self.scale = 1.0
        self._warmup = Schedule("constant", warmup=warmup)

    def fit_begin(self, training: Training) -> None:
        self.monitor.check(training)
        self._warmup.fit_begin(training)

    def steps_begin(self, training: Training) -> None:
        self._warmup.steps_begin(training)
        factors = training.step.update.lr_factors
        for i in range(training.coming):
            factors[i] *= self.scale

    def epoch_end(self, training: Training) -> None:
        improved = self.monitor.improved(training)
        if not improved and self.monitor.epochs_since >= self.patience:
            self.scale = max(self.scale * self.factor, self.lowest)
            self.monitor.epochs_since = 0

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.monitor.state_dict(), "scale": self.scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.monitor.load_state_dict(state["monitor"])
        self.scale = state["scale"]


def resolve_schedule(schedule: Any) -> Callback | None:
    """A `Schedule` or `Plateau`, from one, from a name or from a function of the epochs passed."""
    if schedule is None or isinstance(schedule, Schedule | Plateau):
        return schedule
    if isinstance(schedule, str):
        checks.choice("fit", "schedule", schedule, NAMES)
        return Plateau() if schedule == "plateau" else Schedule(schedule)
    return Schedule(schedule)


def _positive(where: str, name: str, value: Any, zero: bool) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    if not (number and (value > 0 or (zero and value == 0))):
        sign = "≥" if zero else ">"
        raise OptionError(f"{where}: {name}: expected a number {sign} 0, got {value!r}")
