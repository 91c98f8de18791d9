"""Training steps that a device works on while Python goes on.

A step on a GPU is launched and not waited for; its loss is a `PendingLoss`. What became of a step
is looked at when its loss is read, when its place is needed again, or when a state is saved. After
a step that was refused the device applies none, so the model is then that of the step before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from math import nan
from types import ModuleType
from typing import Any

import numpy as np
from backprop_kernels.arrays import Array

from backprop.memory import Memory
from backprop.update import Update


class PendingLoss(np.lib.mixins.NDArrayOperatorsMixin):
    """The loss of a step that may not be over: `float(loss)` waits for it, and so does arithmetic.

    Raises what the step would have raised, where it was refused.
    """

    def __init__(self, number: int, arrays: Sequence[Array], wait: Callable[[], None]) -> None:
        self.number = number  # of the step, from 1
        self.arrays: Sequence[Array] = arrays  # until its outcome is known
        self.value: float | None = None
        self.problem: Exception | None = None
        self._wait = wait

    def __float__(self) -> float:
        while self.value is None:
            if self.problem is not None:
                raise self.problem
            self._wait()
        return self.value

    def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
        return np.asarray(float(self), dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        values = (float(x) if isinstance(x, PendingLoss) else x for x in inputs)
        return getattr(ufunc, method)(*values, **options)

    def __format__(self, form: str) -> str:
        return format(float(self), form)

    def __repr__(self) -> str:
        return "PendingLoss()" if self.value is None else repr(self.value)


class LossSum:
    """Σ rows · loss of steps; what is not known yet is waited for when the sum is read.

    Never changed: `plus` makes another.
    """

    def __init__(self, value: float = 0.0, later: Sequence[tuple[int, Any]] = ()) -> None:
        self._value, self._later = value, later

    def plus(self, rows: int, loss: float | PendingLoss) -> LossSum:
        if not self._later and isinstance(loss, float):
            return LossSum(self._value + rows * loss)
        value, later = self._value, deque([*self._later, (rows, loss)])
        while later and not (isinstance(later[0][1], PendingLoss) and later[0][1].value is None):
            rows, known = later.popleft()
            value += rows * float(known)
        return LossSum(value, later)

    def __float__(self) -> float:
        value = self._value
        for rows, loss in self._later:  # in order: the bits must not depend on when it is read
            value += rows * float(loss)
        return value


class Queue:
    """The steps of one `TrainStep` on their way, oldest first, and what the device was told.

    `refused(arrays, loss, norm)` is the error of a step that was not applied.
    """

    def __init__(
        self, update: Update, memory: Memory, device: Any, rows: int,
        refused: Callable[[int, Sequence[Array], float, float], Exception],
    ) -> None:  # fmt: skip
        self.update, self.memory, self.device = update, memory, device
        self.steps = 0  # launched, and applied unless one of those on their way is refused
        self._refused = refused
        self._feed = memory.feed(rows)
        self._launched = 0
        self._on_their_way: deque[PendingLoss] = deque()
        self._told: dict[str, Any] = {}

    def operators(self, gradients: Callable[..., None], backend: ModuleType) -> Callable[..., None]:
        """A whole step, to be captured: one that counts itself."""
        device = self.device

        def step(*inputs: Array) -> None:
            device.remember()
            gradients(*inputs)
            device.scalars()
            self.update.operators(backend, device)
            device.end()

        return step

    def expect(self, arrays: Sequence[Array]) -> None:
        """Make room for batches like this one."""
        if isinstance(arrays[0], np.ndarray):
            self._feed.expect(arrays)

    def run(self, program: Callable[..., None], arrays: Sequence[Array]) -> PendingLoss:
        """Launch a step on `arrays`, of the host or of the device."""
        if len(self._on_their_way) == self.device.depth:
            self._look()
        self._tell()
        loss = PendingLoss(self.steps + 1, arrays, self._look)
        turn = self._feed.send(arrays) if isinstance(arrays[0], np.ndarray) else None
        program(*(arrays if turn is None else turn.take()))
        if turn is not None:
            turn.release()
        self.device.fetch(self._launched)
        self._launched += 1
        self.steps += 1
        self._on_their_way.append(loss)
        return loss

    def settle(self) -> None:
        """Wait for all steps."""
        while self._on_their_way:
            self._look()

    def restart(self, steps: int) -> None:
        """Count from `steps` on, whatever becomes of the steps on their way."""
        for loss in self._on_their_way:
            loss.value, loss.arrays = nan, ()
        self._on_their_way.clear()
        self.device.go_on()
        self.steps = steps
        self._told.pop("steps", None)

    def _tell(self) -> None:
        """What the host decides, where it has changed."""
        if "steps" not in self._told:
            self.device.set_steps(self.steps)
            self._told["steps"] = True
        if self.update.lr != self._told.get("rate"):
            self._told["rate"] = self.update.lr
            self.device.set_rate(self.update.lr)
        options = {n: v for n, v in self.update.optimizer.options.items() if n != "lr"}
        if options != self._told.get("options"):
            self._told["options"] = options
            self.device.set_options(self.update.treated)

    def _look(self) -> None:
        """Wait for the oldest step. Raises where it was refused."""
        loss = self._on_their_way.popleft()
        outcome = self.device.outcome(self._launched - len(self._on_their_way) - 1)
        arrays, loss.arrays = loss.arrays, ()
        if outcome.applied:
            loss.value = outcome.loss
            return
        problem = self._refused(loss.number, arrays, outcome.loss, outcome.norm)
        for one in (loss, *self._on_their_way):
            one.problem, one.arrays = problem, ()
        self._on_their_way.clear()
        self.restart(loss.number - 1)
        raise problem
