"""Watching one number of the history: is it still getting better, and what to do when it is not."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, isfinite
from typing import Any

from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.errors import OptionError

from backprop.callbacks import Callback, Training
from backprop.evaluation import METRICS

MODES = {"auto": None, "min": -1, "max": 1}


class Monitor:
    """The best value so far of one key of the history, and how many epochs ago that was."""

    def __init__(self, where: str, monitor: str, mode: str, min_delta: float) -> None:
        checks.choice(where, "mode", mode, MODES)
        number = isinstance(min_delta, int | float) and not isinstance(min_delta, bool)
        if not (number and 0 <= min_delta < inf):
            raise OptionError(f"{where}: min_delta: expected a number ≥ 0, got {min_delta!r}")
        self.where, self.key, self.min_delta = where, monitor, min_delta
        metric = METRICS.get(monitor) or METRICS.get(monitor.partition("_")[2])
        auto = "min" if metric is None else metric.better
        self.sign = MODES[auto if mode == "auto" else mode] or 0
        self.best: float | None = None
        self.epochs_since = 0

    def check(self, training: Training) -> None:
        """Refuse a key that the history of this fit will not have."""
        validated = any(name.startswith("val_") for name in training.names)
        if self.key.startswith("val_") and not validated:
            raise OptionError(
                f"{self.where}: monitor: expected validation rows for {self.key!r}, got none; give "
                'fit an eval_set or a validation_fraction, or monitor "loss"'
            )
        checks.choice(self.where, "monitor", self.key, dict.fromkeys(training.names))

    def improved(self, training: Training) -> bool:
        """Take the epoch's value; whether it beats the best by more than `min_delta`."""
        value = training.history[self.key][-1]
        good = isfinite(value) and (
            self.best is None or self.sign * (value - self.best) > self.min_delta
        )
        if good:
            self.best = value
        self.epochs_since = 0 if good else self.epochs_since + 1
        return good

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"best": self.best, "epochs_since": self.epochs_since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.best, self.epochs_since = state["best"], state["epochs_since"]


class EarlyStopping(Callback):
    """Ends a fit once `monitor` has not improved for `patience` epochs.

    Args:
        monitor: a key of the history.
        patience: epochs without improvement before the end.
        min_delta: what counts as an improvement: more than this.
        mode: "min", "max", or "auto": by the metric; a loss is to be small.
        restore_best: give the model its parameters of the best epoch at the end, however it ends.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        patience: int = 5,
        min_delta: float = 0.0,
        mode: str = "auto",
        restore_best: bool = True,
    ) -> None:
        checks.integer("EarlyStopping", "patience", patience, 1)
        self.monitor = Monitor("EarlyStopping", monitor, mode, min_delta)
        self.patience = int(patience)
        self.restore_best = restore_best
        self.best_epoch: int | None = None  # from 0
        self._best: dict[str, Array] = {}

    def fit_begin(self, training: Training) -> None:
        self.monitor.check(training)

    def epoch_end(self, training: Training) -> None:
        if self.monitor.improved(training):
            self.best_epoch = training.epoch
            if self.restore_best:
                self._best = training.model.state_dict()
        elif self.monitor.epochs_since >= self.patience:
            training.stop = True

    def fit_end(self, training: Training) -> None:
        if self._best:
            training.model.load_state_dict(self._best)

    def state_dict(self) -> dict[str, Any]:
        return {
            "monitor": self.monitor.state_dict(), "best_epoch": self.best_epoch,
            "best": self._best,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.monitor.load_state_dict(state["monitor"])
        self.best_epoch, self._best = state["best_epoch"], dict(state["best"])


def resolve_early_stopping(value: Any) -> EarlyStopping | None:
    """An `EarlyStopping`, from one, from True or from its patience."""
    if value is None or value is False:
        return None
    if isinstance(value, EarlyStopping):
        return value
    if value is True:
        return EarlyStopping()
    if isinstance(value, int):
        return EarlyStopping(patience=value)
    raise OptionError(
        f"fit: early_stopping: expected True, a number of epochs or an EarlyStopping, got {value!r}"
    )
