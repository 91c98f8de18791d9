"""Training steps that a device works on while Python goes on.

A step on a GPU is launched and not waited for; its loss is a `PendingLoss`. What became of a step
is looked at when its loss is read, when its place is needed again, or when a state is saved. After
a step that was refused the device applies none, so the model is then that of the step before.
Several batches may make one step: each is launched as one is, and the update after the last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import nan
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from backprop_kernels.arrays import Array

from backprop.accumulation import Accumulated
from backprop.memory import Memory
from backprop.update import Update

if TYPE_CHECKING:
    from backprop.gradients import Gradients


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

    `refused(arrays, loss, norm)` is the error of a step that was not applied. A step is made of
    `accumulate` batches of up to `rows` rows.
    """

    def __init__(
        self, update: Update, memory: Memory, device: Any, rows: int,
        refused: Callable[[int, Sequence[Array], float, float], Exception], accumulate: int = 1,
    ) -> None:  # fmt: skip
        self.update, self.memory, self.device = update, memory, device
        self.rows, self.accumulate = rows, accumulate
        self.whole = rows * accumulate
        self.pending = 0  # batches launched towards the next step
        self._lr_factor = 1.0  # when the first of them was
        self._apply: Callable[[], None] | None = None  # the update after the last
        self.steps = 0  # launched, and applied unless one of those on their way is refused
        self._refused = refused
        self._feed = memory.feed(rows)
        self._launched = 0
        self._on_their_way: deque[PendingLoss] = deque()
        self._told: dict[str, Any] = {}

    def fused(self, gradients: Gradients, wanted: bool) -> Any:
        """A backend for one step that updates weights where it makes their gradients, or None."""
        dtype, reason = gradients.model.dtype, ""
        if not wanted:
            reason = "fused_update is False"
        elif self.accumulate > 1:
            reason = "the gradients of several batches are added up first"
        elif not self.update.by_element:
            reason = "clipping needs the whole gradient first"
        elif gradients.recompute > 1:
            reason = "with recompute weight gradients come before all deltas are known"
        elif gradients.keeps_activations:
            reason = "gradients are looked at after a step"
        elif dtype != np.float32:
            reason = f"parameters are {dtype}"
        if reason:
            self.update.why = f"a pass of its own, as {reason}"
            return None
        return self.device.fused(gradients.backend, len(gradients.model.layers))

    def part(self, rows: int) -> AbstractContextManager[Any]:
        """Around the capture of a batch of `rows` rows: what is one of several, where it is."""
        whole = self.accumulate == 1
        return nullcontext() if whole else self.device.part(rows, self.whole)

    def operators(
        self, gradients: Callable[..., None], backend: ModuleType, part: Any
    ) -> Callable[..., None]:
        """A whole step, to be captured: one that counts itself. Or of a `part` the gradients."""
        if part is not None and self._apply is None:
            self._apply = backend.capture(lambda: self._mean_and_update(backend))

        def step(*inputs: Array) -> None:
            self.device.remember()
            gradients(*inputs)
            if part is None:
                self._update(backend)
            else:
                self.device.part_end(part, self.rows)

        return step

    def _mean_and_update(self, backend: ModuleType) -> None:
        self.device.to_mean(self.update.gradient, self.whole)
        self._update(backend)

    def _update(self, backend: ModuleType) -> None:
        self.device.scalars()
        self.update.operators(backend, self.device)
        self.device.end()

    def expect(self, arrays: Sequence[Array]) -> None:
        """Make room for batches like this one."""
        if isinstance(arrays[0], np.ndarray):
            self._feed.expect(arrays)

    def run(self, program: Callable[..., None], arrays: Sequence[Array]) -> PendingLoss:
        """Launch a step on `arrays`, of the host or of the device; the last batch of a step, or
        another one."""
        if len(self._on_their_way) == self.device.depth:
            self._look()
        if not self.pending:
            self._begin()
        loss = PendingLoss(self.steps + 1, arrays, self._look)
        turn = self._feed.send(arrays) if isinstance(arrays[0], np.ndarray) else None
        program(*(arrays if turn is None else turn.take()))
        if turn is not None:
            turn.release()
        self._end(loss, self.pending + 1 == self.accumulate)
        return loss

    def _end(self, loss: PendingLoss, last: bool) -> None:
        """After a batch, or with the update after those that there are."""
        if last and self._apply is not None:
            self._apply()
        self.device.fetch(self._launched)
        self._launched += 1
        self.pending = 0 if last else self.pending + 1
        self.steps += last
        self._on_their_way.append(loss)

    def flush(self) -> bool:
        """Make a step of the batches launched towards one, and wait; False where there are none."""
        self.settle()
        if not self.pending:
            return False
        self._end(PendingLoss(self.steps + 1, (), self._look), True)
        self.settle()
        return True

    def sum(self) -> Accumulated:
        """What the batches towards the next step sum up to; waits for them."""
        self.settle()
        if not self.pending:
            return Accumulated()
        mass, shares = self.device.parts()
        return Accumulated(
            self.update.gradient.copy(), mass, shares * self.whole, self.pending,
            self._lr_factor, self.whole,
        )  # fmt: skip

    def resume(self, total: Accumulated) -> None:
        """Go on from there, at the learning rate of its first batch. After `restart`."""
        total = total.by(self.whole)
        self.memory.fill(self.update.gradient, total.gradient)
        rows = total.batches * self.rows
        self.device.set_parts(rows, total.mass, total.loss / self.whole)
        self._begin()
        self.pending = total.batches

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
        self.steps, self.pending = steps, 0
        self._told.pop("steps", None)

    def _begin(self) -> None:
        """Before the first batch of a step: tell what the host decides, where it has changed."""
        self._lr_factor = self.update.lr_factor
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
