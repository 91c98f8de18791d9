"""One training step, captured once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from math import isfinite, nan
from typing import Any

import numpy as np
from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.errors import (
    CheckpointMismatchError,
    DataError,
    KindError,
    LabelError,
    NonFiniteError,
    OptionError,
)
from backprop_kernels.precisions import PRECISIONS

from backprop.accumulation import Accumulated
from backprop.gradients import Gradients
from backprop.losses import (
    Loss,
    in_host_memory,
    refuse_non_finite,
    resolve_loss,
)
from backprop.model import Sequential
from backprop.muon import Muon, MuonUpdate
from backprop.optimizers import Optimizer, resolve_optimizer
from backprop.pieces import Pieces, Room
from backprop.precision import LossScale, products
from backprop.queue import PendingLoss, Queue
from backprop.update import Update


class TrainStep:
    """`step = TrainStep(model, loss, optimizer, batch_size)`; `loss = step(X, y)` trains once.

    A batch size is captured on its first use; from then on a step allocates nothing but its
    returned number, and X and y are read where they lie. A batch may be smaller than `batch_size`.
    On a GPU the loss is a `PendingLoss`: the step is launched, and `float(loss)` waits for it.

    Args:
        model: any model; its parameters are updated in place.
        loss: a name or a `Loss`.
        optimizer: a name or e.g. `AdamW(lr=1e-3)`. Its moments are kept here.
        clip_norm: scale longer gradients down to this L2 norm.
        seed: of dropout.
        accumulate: how many batches make one step. Their gradients are added as those of one batch
            of all their rows would be; `flush` makes a step of fewer. On a GPU to the bit, where
            `step.gradients.why` says so: for batches of whole blocks of rows that weigh the same.
        recompute: keep the activations of every so-many-th layer only, and compute the others again
            in backward: less memory, more time, the same bits.
        autotune: on a GPU, measure which kernel is the fastest for each product, and remember it;
            the bits then depend on the GPU.
        precision: of the products: the model's dtype, or for a float32 model on a GPU "tf32",
            "bf16", "fp16", "bf16x3" or "bf16x6". Sums, parameters and the update stay float32.
        fused_update: on a GPU, update a weight in the kernel that makes its gradient, where nothing
            needs the whole gradient first: the same bits, less memory traffic. `step.update.why`
            says what was done; `step.gradients` then holds no gradients of those weights.
        sparse_input: whether most of X is 0, as one-hot columns are; on a CPU the first layer then
            skips the zeros. A hint: any X is right. `fit` sees for itself.

    Raises NonFiniteError when loss or gradient is not finite (DataError where X is the cause); the
    parameters, moments and running statistics are then those of the step before. On a GPU it is
    raised when that loss is read, or by a later step; none in between was applied. An exception
    from a signal (Ctrl-C) stops a long step within a second; `steps` says whether it was applied.
    If not, that batch alone is undone.
    """

    TURNS = 64  # steps that one call makes, at most

    def __init__(
        self,
        model: Sequential,
        loss: str | Loss = "mse",
        optimizer: str | Optimizer = "Adam",
        batch_size: int = 32,
        clip_norm: float | None = None,
        seed: int = 0,
        accumulate: int = 1,
        precision: str | None = None,
        recompute: int = 1,
        autotune: bool = False,
        sparse_input: bool = False,
        fused_update: bool = True,
    ) -> None:
        if not isinstance(model, Sequential):
            raise KindError(f"TrainStep: model: expected a model, got {type(model).__name__}")
        checks.integer("TrainStep", "batch_size", batch_size, 1)
        checks.integer("TrainStep", "seed", seed, 0)
        checks.integer("TrainStep", "accumulate", accumulate, 1)
        checks.integer("TrainStep", "recompute", recompute, 1)
        number = isinstance(clip_norm, int | float) and not isinstance(clip_norm, bool)
        if clip_norm is not None and not (number and clip_norm > 0):
            raise OptionError(f"TrainStep: clip_norm: expected a number > 0, got {clip_norm!r}")
        if autotune and not model.device.startswith("cuda"):
            raise OptionError(
                f'TrainStep: autotune: expected False on device "{model.device}", got True'
            )
        self.model = model
        self.autotune = bool(autotune)
        self.fused_update = bool(fused_update)
        self.optimizer = resolve_optimizer(optimizer)
        backend = products(model, precision, "TrainStep")
        self.gradients = Gradients(
            model, resolve_loss(loss), batch_size, seed, model.frozen,
            None if backend is model.backend else backend, int(recompute), bool(sparse_input),
            turns=self.TURNS,
        )  # fmt: skip
        scaled = PRECISIONS[precision or str(model.dtype)].loss_scaling
        self.loss_scale = LossScale(backend) if scaled else None
        given = (
            model.layout, model.parameters, self.gradients.flat, clip_norm, self.gradients.frozen,
            model.memory,
        )  # fmt: skip
        self.update: Update = (
            MuonUpdate(self.optimizer, *given)
            if isinstance(self.optimizer, Muon)
            else Update(self.optimizer, *given, turns=self.TURNS)
        )
        # Operators that make a batch, by its rows, and what they read the first row of. A call that
        # makes several steps reads another row for each.
        self.before: Callable[[int], None] | None = None
        self.before_reads: tuple[Array, ...] = ()
        self._turns: Any = None
        self._steps = 0
        self.rows = 0  # of the last batch
        self.loss: float | PendingLoss = nan  # of the last batch
        self.losses: list[float] = []  # of the last `run_several`
        self.running = False  # whether a signal's exception would be answered as `run` says
        self.accumulate = int(accumulate)
        self._sum = Accumulated()
        self._apart = accumulate > 1 or not self.update.fused
        self._captured: dict[tuple[int, ...], Callable[..., None]] = {}
        # Batch norm takes its mean over the whole batch.
        self._room = Room("TrainStep", batch_size, whole=bool(model.statistics))
        self._queue: Queue | None = None
        if self.loss_scale is None and not (accumulate > 1 and autotune):
            device = self.update.stepping(
                self.gradients.value, self.gradients.placed, list(model.statistics.values())
            )
            if device is not None:
                self._queue = Queue(
                    self.update, model.memory, device, batch_size, self._refused, accumulate
                )
        self._updating: Callable[[], None] | None = None
        # Forward moves running statistics before the step is known to be finite.
        self._statistics = list(model.statistics.values())
        self._before_batch = [value.copy() for value in self._statistics]
        if self._queue is not None:
            self._before_step = [before for _, before in self._queue.device.statistics]
        elif accumulate > 1:
            self._before_step = [value.copy() for value in self._statistics]
        else:
            self._before_step = self._before_batch

    @property
    def pending(self) -> int:
        """Batches accumulated towards the next step."""
        return self._sum.batches if self._queue is None else self._queue.pending

    @property
    def steps(self) -> int:
        """How many were applied. On a device: or launched, as far as none was refused yet."""
        return self._steps if self._queue is None else self._queue.steps

    def __call__(self, X: Any, y: Any, sample_weight: Any = None) -> float | PendingLoss:
        """Train on one batch: X (batch, in_features), y as the loss takes it → the loss."""
        # Finding a NaN costs a pass over X. The step itself finds it: it is looked for after that.
        return self.run(*self.gradients.inputs(X, y, sample_weight, "TrainStep", finite=False))

    def run(self, *arrays: Array) -> float | PendingLoss:
        """Train on arrays that `Gradients.inputs` has checked: X, target[, weight]."""
        program = self.prepare(*arrays)
        self.rows = len(arrays[0])
        if self._queue is not None:
            self.loss = self._queue.run(program, arrays)
            return self.loss
        before = self._sum
        self._copy(self._statistics, self._before_batch)
        if not before.batches:
            self._copy(self._before_batch, self._before_step)
            self._begin()
        self.gradients.set_step(self.steps * self.accumulate + before.batches)
        try:
            self.running = True
            program(*arrays)
            while self._overflowed():
                program(*arrays)
            self.running = False
            value = self.loss = float(self.gradients.value)
            if self.accumulate > 1:
                rest = [self.model.memory.numpy(array) for array in arrays[1:]]
                mass = self.gradients.loss.mass(*rest)
                self._sum = before.plus(self.gradients.flat, mass, value, self.update.lr_factor)
                if self.pending < self.accumulate and isfinite(value):
                    return value
            if self._apart:
                self._apply()
        except BaseException:  # Ctrl-C: the optimizer, once begun, has run to its end
            self.running = False
            if not self._count():
                self._sum = before
                self._copy(self._before_batch, self._statistics)
            raise
        self._expect_applied(arrays)
        return value

    def together(self, *arrays: Array) -> int:
        """How many steps on batches like these one call of `run_several` can make.

        More than one where compiled code makes all of a step, its batch (`before`) included.
        """
        ordinary = self.accumulate == 1 and self.update.whole and not self._apart
        unattended = self._queue is None and self.loss_scale is None and not self._statistics
        make = getattr(self.prepare(*arrays), "turns", None)
        if self.before is None or make is None or not (ordinary and unattended):
            return 1
        columns = (*self.before_reads, self.update.tables, self.gradients.streams)
        self._turns = make(columns, (self.gradients.values, self.update.norms))
        return int(self._turns.most)

    def run_several(self, steps: int, *arrays: Array) -> list[float]:
        """`steps` times `run`, by one call: 1 … `together` of them → their losses.

        Where one is refused, those before it are applied and those after it not begun. After an
        exception `losses` has those of the steps that were applied.
        """
        self.rows = len(arrays[0])
        self.update.prepare(self.steps + 1, steps)
        self.gradients.set_step(self.steps, steps)
        self.update.norms[:steps] = nan  # until the optimizer has run
        try:
            self.running = True
            self._turns(steps, *arrays)
            self.running = False
        except BaseException:  # Ctrl-C, before they began or after they ended
            self.running = False
            self._count_several(steps)
            raise
        if self._count_several(steps) < steps:
            raise self._refused(self.steps + 1, arrays, float(self.loss), float(self.norm))
        return self.losses

    def _count_several(self, steps: int) -> int:
        """Note what became of them → how many were applied."""
        values, norms = self.gradients.values, self.update.norms
        fine = np.isfinite(values[:steps]) & np.isfinite(norms[:steps])
        applied = steps if fine.all() else int(fine.argmin())
        last = min(applied, steps - 1)
        self._steps += applied
        self.losses = [float(value) for value in values[:applied]]
        self.loss, values[0], norms[0] = float(values[last]), values[last], norms[last]
        self.update.lr_factor = self.update.lr_factors[last]
        return applied

    def flush(self) -> bool:
        """Make a step of the batches accumulated so far; False where there are none."""
        if self._queue is not None:
            return self._queue.flush()
        if not self.pending:
            return False
        try:
            self._apply()
        except BaseException:
            self.running = False
            self._count()
            raise
        self._expect_applied(())
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a later step depends on besides the model, between two batches."""
        memory = self.model.memory
        if self._queue is not None:
            self._queue.settle()
        state = {
            "steps": self.steps, "optimizer": self.optimizer.state_dict(),
            "lr_factor": self.update.lr_factor,
            "moments": {name: memory.numpy(value) for name, value in self.state.items()},
        }  # fmt: skip
        if self.loss_scale is not None:
            state["loss_scale"] = self.loss_scale.state_dict()
        if self.pending:
            total = self._sum if self._queue is None else self._queue.sum()
            state["accumulated"] = total._replace(gradient=memory.numpy(total.gradient))
            state["statistics"] = [memory.numpy(value) for value in self._before_step]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Nothing has changed where CheckpointMismatchError is raised."""
        checks.integer("TrainStep", "steps", state["steps"], 0)
        deepcopy(self.optimizer).load_state_dict(state["optimizer"])  # refuses what is wrong
        lr_factor, moments = float(state["lr_factor"]), state["moments"]
        batches = Accumulated(*state.get("accumulated", ()))
        statistics = state.get("statistics", self._before_step)
        ours, theirs = [*self.state.values(), *self._before_step], [*moments.values(), *statistics]
        if batches.batches:
            checks.integer("TrainStep", "accumulated", self.accumulate - batches.batches, 1)
            ours, theirs = [*ours, self.gradients.flat], [*theirs, batches.gradient]
        if list(moments) != list(self.state) or _kinds(ours) != _kinds(theirs):
            raise CheckpointMismatchError(
                f"TrainStep: moments: expected {', '.join(self.state)} of {self.optimizer.rule} "
                f"for {self.model.layout.size} parameters, got others"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self._steps = state["steps"]
        if self._queue is not None:
            self._queue.restart(self._steps)
        if self.loss_scale is not None and "loss_scale" in state:
            self.loss_scale.load_state_dict(state["loss_scale"])
        self._copy(theirs, ours)
        self._resume(batches)
        self.update.lr_factor = lr_factor

    def _resume(self, total: Accumulated) -> None:
        """Go on from the sum of some batches, if there are any, at the first one's rate."""
        self._sum = Accumulated()
        if not total.batches:
            return
        self.update.lr_factor = total.lr_factor
        if self._queue is not None:
            self._queue.resume(total)
            return
        total = total.by(1.0)
        self._sum = total._replace(gradient=self.model.memory.place(total.gradient))
        self._begin()

    def _overflowed(self) -> bool:
        """Whether a smaller loss scale may make the gradient of this batch finite; it is set."""
        if self.loss_scale is None or not isfinite(self.gradients.value):
            return False
        found = np.isfinite(self.gradients.flat).all() if self._apart else isfinite(self.norm)
        return not found and self.loss_scale.halve()

    def _begin(self) -> None:
        self.update.prepare(self.steps + 1)
        self.norm[...] = nan  # until the optimizer has run

    def _copy(self, sources: Iterable[Array], targets: Iterable[Array]) -> None:
        for source, target in zip(sources, targets, strict=True):
            self.model.memory.fill(target, source)

    def _apply(self) -> None:
        """The update as a program of its own, with what no operator does before it."""
        if self.pending:
            self.gradients.value[...] = self._sum.mean(self.gradients.flat)
        if isfinite(self.gradients.value):
            self.running = True
            self.update.before()
            self.running = False
        if self._updating is None:
            backend, guard = self.model.backend, self.gradients.value
            self._updating = backend.capture(lambda: self.update.operator(backend, guard))
        self._updating()

    def _count(self) -> bool:
        """Whether the optimizer has run, on finite numbers; then that was a step."""
        if self.accumulate == 1:
            self.loss = float(self.gradients.value)
        applied = isfinite(self.norm) and isfinite(self.gradients.value)
        if applied:
            self._sum = Accumulated()
            self._steps += 1
            self.update.after()
            if self.loss_scale is not None:
                self.loss_scale.step()
        return applied

    def _expect_applied(self, arrays: Sequence[Array]) -> None:
        if self._count():
            return
        self._sum = Accumulated()
        self._copy(self._before_step, self._statistics)
        raise self._refused(
            self.steps + 1, arrays, float(self.gradients.value),
            float(self.norm),
        )  # fmt: skip

    def _refused(
        self, number: int, arrays: Sequence[Array], value: float, norm: float
    ) -> Exception:
        """Why step `number` was not applied: its batch, where that is the cause."""
        try:
            for name, array in zip(("X", "y"), arrays, strict=False):
                if array.dtype.names is None:  # entries were made of an X that was good
                    refuse_non_finite("TrainStep", name, array)
            if len(arrays) > 1:
                model = self.model
                self.gradients.loss.targets(
                    in_host_memory(arrays[1]), len(arrays[1]), model.out_features, model.dtype
                )
        except (DataError, LabelError) as problem:
            return problem
        return NonFiniteError(
            f"TrainStep: step {number}: expected a finite loss and gradient, got loss {value} and "
            f"gradient norm {norm} at lr {self.lr:g}; nothing was changed. Lower lr, set "
            "clip_norm, or scale the inputs"
        )

    @property
    def lr(self) -> float:
        """The learning rate of the next step: the optimizer's, by the factor of a schedule."""
        return self.update.lr

    @property
    def state(self) -> dict[str, Array]:
        """The optimizer's moments, each like the flat parameters."""
        return self.update.state

    @property
    def norm(self) -> Array:
        """The L2 norm of the last step's gradient, before clipping: ()."""
        return self.update.norm

    def prepare(self, *arrays: Array) -> Callable[..., None]:
        """The captured program for arrays like these; compiles what it needs, trains nothing."""
        captured = self._captured.get(_key(arrays))
        if captured is not None:
            return captured
        return self._room.attempt(lambda: self._program(*arrays), self._make_room)

    def _program(self, *arrays: Array) -> Callable[..., None]:
        key = _key(arrays)
        if key not in self._captured:
            with self.model.memory.autotuned() if self.autotune else nullcontext():
                self._captured[key] = self._capture(arrays)
        return self._captured[key]

    def _make_room(self) -> None:
        """From now on make the gradient of fewer rows at once, and the update after it."""
        if self._queue is not None:
            total, lr_factor = self._queue.sum(), self.update.lr_factor
            self._steps, self._queue = self._queue.steps, None
            self._resume(total)
            self.update.lr_factor = lr_factor
        self._apart = True
        self._captured.clear()
        self.gradients.make_room(self._room.rows)

    def _capture(self, arrays: tuple[Array, ...]) -> Callable[..., None]:
        if len(arrays[0]) > self._room.rows:
            return Pieces(self.gradients, self._room.rows, self._program, arrays)
        if self._queue is not None:
            with self._queue.part(len(arrays[0])) as part:
                return self._capture_unattended(self._queue, part, arrays)
        backend, gradients = self.model.backend, self.gradients.operators(len(arrays[0]))

        def step(*inputs: Array) -> None:
            if self.before is not None:
                self.before(len(arrays[0]))
            gradients(*inputs)
            if not self._apart:
                self.update.operator(backend, self.gradients.value)

        captured: Callable[..., None] = backend.capture(step, *arrays)
        return captured

    def _capture_unattended(
        self, queue: Queue, part: Any, arrays: tuple[Array, ...]
    ) -> Callable[..., None]:
        """What a device runs by itself: a step, or the `part` of one that is made of a batch."""
        fused = queue.fused(self.gradients, self.fused_update)
        gradients = self.gradients.operators(len(arrays[0]), fused, part)
        queue.expect(arrays)
        backend = self.model.backend
        operators = queue.operators(gradients, fused or backend, part)
        captured: Callable[..., None] = backend.capture(operators, *arrays)
        if fused is not None:
            self.update.why = fused.why
        if part is not None:
            self.gradients.why += f"; several batches, {part.why}"
        return captured


def _key(arrays: Sequence[Array]) -> tuple[int, ...]:
    """Batches of one key run the same program."""
    return len(arrays[0]), arrays[1].ndim, len(arrays)


def _kinds(arrays: Iterable[Array]) -> list[tuple[Any, Any]]:
    return [(array.shape, array.dtype) for array in arrays]
