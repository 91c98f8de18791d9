"""What watches and steers a fit: a schedule, early stopping, averaging, and whatever a user adds.

A callback is a function of (epoch, history), called after every epoch, that may return True to end
the training; or an object with some of the methods of `Callback`. Whatever it needs to go on after
an interruption it gives and takes as plain data: numbers, text, arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from backprop_kernels.errors import KindError

from backprop.history import History
from backprop.model import Sequential
from backprop.queue import LossSum, PendingLoss
from backprop.step import TrainStep

EpochFunction: TypeAlias = Callable[[int, History], Any]


@dataclass
class Training:
    """A fit in progress. Set `stop` to end it after this epoch."""

    model: Sequential
    step: TrainStep
    history: History
    epochs: int  # asked for
    rows: int  # of an epoch
    names: tuple[str, ...]  # what the history will hold: loss, lr, val_loss, …
    seed: int = 0
    epoch: int = 0  # from 0
    batch: int = 0  # batches of this epoch that were trained on
    done: int = 0  # and rows
    coming: int = 1  # batches that the next call trains on
    losses: LossSum = field(default_factory=LossSum)  # each times its rows
    loss: float | PendingLoss = field(default=float("nan"))  # of the last batch
    validating: bool = False
    stop: bool = False

    @property
    def total(self) -> float:
        """The losses of this epoch so far, each times its rows. Waits for the last step."""
        return float(self.losses)

    @total.setter
    def total(self, value: float) -> None:
        self.losses = LossSum(value)

    def count(self, rows: int, losses: Sequence[float | PendingLoss]) -> None:
        """Batches of so many rows were trained on, with these losses."""
        for loss in losses:
            self.losses = self.losses.plus(rows, loss)
        self.loss = losses[-1]
        self.batch += len(losses)
        self.done += rows * len(losses)

    @property
    def position(self) -> float:
        """Epochs since the start, a fraction within an epoch."""
        return self.position_of(0)

    def position_of(self, coming: int) -> float:
        """That before one of the batches to come, which are full where they are several."""
        return self.epoch + (self.done + coming * self.step.gradients.batch_size) / self.rows


class Callback:
    """Override what you need. All are given the `Training`; the model may be read and changed.

    `step_begin` comes before each batch and `step_end` after it; while gradients accumulate,
    `training.step.pending` batches wait for their step. `epoch_end` comes once the epoch is in the
    history, validation included.

    On a CPU one call can train on several batches, unless `step_begin` or `step_end` is overridden.
    """

    def fit_begin(self, training: Training) -> None:
        """Before the first step. Refuse here what cannot work."""

    def steps_begin(self, training: Training) -> None:
        """Before the `training.coming` batches of one call."""

    def step_begin(self, training: Training) -> None:
        """Before a batch."""

    def step_end(self, training: Training) -> None:
        """After a batch."""

    def validation_begin(self, training: Training) -> None:
        """After the last step of an epoch, before it is validated."""

    def epoch_end(self, training: Training) -> None:
        """After an epoch and its validation."""

    def fit_end(self, training: Training) -> None:
        """After the last epoch, also where a callback or an error ended the training."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit needs to go on."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


class _Function(Callback):
    """A plain function as a callback."""

    def __init__(self, function: EpochFunction) -> None:
        self.function = function

    def epoch_end(self, training: Training) -> None:
        if self.function(training.epoch, training.history):
            training.stop = True


class Callbacks:
    """`tell("step_end")`: an event to all callbacks that have a method for it, in order."""

    EVENTS = (
        "fit_begin", "steps_begin", "step_begin", "step_end", "validation_begin", "epoch_end",
        "fit_end",
    )  # fmt: skip

    def __init__(self, callbacks: Iterable[Callback], training: Training) -> None:
        self.training = training
        self.callbacks = list(callbacks)
        self._methods = {
            event: [
                getattr(callback, event)
                for callback in self.callbacks
                if getattr(type(callback), event) is not getattr(Callback, event)
            ]
            for event in self.EVENTS
        }

    def __contains__(self, event: str) -> bool:
        return bool(self._methods[event])

    def tell(self, event: str) -> None:
        """Call the methods of this name."""
        for method in self._methods[event]:
            method(self.training)


def as_callbacks(callbacks: Iterable[Callback | EpochFunction]) -> list[Callback]:
    """Functions wrapped, everything else checked."""
    if not isinstance(callbacks, Iterable):
        raise KindError(f"fit: callbacks: expected a list, got {type(callbacks).__name__}")
    found: list[Callback] = []
    for i, callback in enumerate(callbacks):
        if isinstance(callback, Callback):
            found.append(callback)
        elif callable(callback) and not isinstance(callback, type):
            found.append(_Function(callback))
        else:
            got = callback.__name__ if isinstance(callback, type) else type(callback).__name__
            raise KindError(
                f"fit: callbacks[{i}]: expected a Callback or a function of (epoch, history), "
                f"got {got}"
            )
    return found
