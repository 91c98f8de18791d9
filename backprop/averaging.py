"""An exponential moving average of the parameters: smoother than the last step's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backprop_kernels.arrays import Array
from backprop_kernels.errors import OptionError

from backprop.callbacks import Callback, Training
from backprop.optimizers import share


class EMA(Callback):
    """After every step: average ← decay · average + (1 − decay) · parameters.

    From the end of an epoch until the next begins, the model holds the average: it is what is
    validated, what other callbacks see, and what remains after the fit. Training goes on from its
    own parameters. The average starts as the parameters before the first step.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not share(decay):
            raise OptionError(f"EMA: decay: expected a number in [0, 1), got {decay!r}")
        self.decay = decay
        self.other: Array = None  # the average; while the model holds that, its own parameters
        self.exchanged = False
        self._steps = 0

    def fit_begin(self, training: Training) -> None:
        model = training.model
        start = model.parameters if self.other is None else self.other
        self.other = model.memory.zeros(model.parameters.shape, model.dtype)
        model.memory.fill(self.other, start)
        self._steps = training.step.steps
        self._scratch = self.other.copy()

    def step_begin(self, training: Training) -> None:
        if self.exchanged:
            self._exchange(training.model.parameters)

    def step_end(self, training: Training) -> None:
        if training.step.steps > self._steps:
            self._steps = training.step.steps
            self._scratch[...] = training.model.parameters
            self._scratch -= self.other
            self._scratch *= self.other.dtype.type(1 - self.decay)
            self.other += self._scratch

    def validation_begin(self, training: Training) -> None:
        self._exchange(training.model.parameters)

    def _exchange(self, parameters: Array) -> None:
        self._scratch[...] = parameters
        parameters[...] = self.other
        self.other[...] = self._scratch
        self.exchanged = not self.exchanged

    def state_dict(self) -> dict[str, Any]:
        return {"other": self.other, "exchanged": self.exchanged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.other, self.exchanged = state["other"], state["exchanged"]
