"""Loss and gradients of a model on a batch, with the buffers they need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from backprop_kernels import checks
from backprop_kernels.arrays import Array, LinearLayer
from backprop_kernels.errors import OptionError, ShapeError

from backprop.losses import (
    Loss,
    as_numbers,
    in_host_memory,
    options_for_kernel,
    refuse_non_finite,
    resolve_loss,
)
from backprop.memory import HOST, Memory, contiguous, expect_one_kind, on_gpu
from backprop.model import Sequential
from backprop.passes import Plan, Workspace
from backprop.pieces import Pieces, Room
from backprop.precision import one_kernel


class Gradients:
    """Loss and gradients of a model for batches of up to `batch_size` rows, with their buffers."""

    def __init__(
        self, model: Sequential, loss: Loss, batch_size: int, seed: int,
        frozen: Collection[str] = (), backend: Any = None, recompute: int = 1,
        sparse_input: bool = False, turns: int = 1,
    ) -> None:  # fmt: skip
        self.model = model
        self._backend = backend  # where it is not the model's own
        self.loss = loss
        self.sparse_input = sparse_input
        self.batch_size = batch_size
        self.memory = memory = model.memory
        self.flat = memory.zeros(model.layout.size, model.dtype)
        self.views = model.layout.views(self.flat)
        self.seed = seed
        # What changes from step to step has a row for each of those that one call makes.
        self.streams = np.array([[seed, 0]] * turns, np.int64)  # of dropout: seed, step
        self.stream = self.streams[0]
        self.placed = memory.place(self.stream)  # what the operators read
        self.values = memory.zeros(turns, np.dtype(np.float64))
        self.value = self.values[:1].reshape(())
        self.workspace = Workspace(batch_size, model.dtype, memory)
        self.frozen = frozenset(frozen)
        self.recompute = recompute
        # By batch size: where activations and deltas lie, where they do lie in memory.
        self.plans: dict[int, Plan] = {}
        self.keeps_activations = False  # whether someone wants to look at them after a step
        self.why = ""  # the network runs layer by layer, or in one kernel

    @property
    def backend(self) -> Any:
        """What computes them: the model's backend, or one in another precision."""
        return self.model.backend if self._backend is None else self._backend

    def operators(self, batch: int, backend: Any = None, part: Any = None) -> Callable[..., None]:
        """A function (X, target[, weight]) that runs forward, loss and backward of `batch` rows.

        By another backend than the usual one, where one is given. `part`: of a larger batch, whose
        gradients go on from where they are.
        """
        model, loss, backend = self.model, self.loss, backend or self.backend
        options = options_for_kernel(loss, model.out_features)
        layers, self.why = one_kernel(
            model, loss.name, backend, batch, self.frozen, self.keeps_activations, part is not None
        )
        if layers is not None:
            return partial(self._whole, backend, layers, options)
        plan = Plan(
            model.layers, model.parameters, model.statistics, backend, self.workspace,
            batch, self.flat, self.placed, self.frozen, self.recompute, self.sparse_input,
        )  # fmt: skip
        self.plans[batch] = plan
        last = plan.passes[-1]

        def run(X: Array, target: Array, weight: Array | None = None) -> None:
            Z = plan.forward(X)
            backend.loss(
                Z, target, loss.name, options, plan.output_activation, weight,
                out=(self.value, last.dZ, last.db),
            )  # fmt: skip
            plan.backward(X)

        return run

    def _whole(
        self, backend: Any, layers: Sequence[LinearLayer], options: Mapping[str, Any],
        X: Array, target: Array, weight: Array | None = None,
    ) -> None:  # fmt: skip
        backend.mlp_step(
            X, target, self.model.parameters, layers, self.loss.name, options, weight,
            out=(self.value, self.flat),
        )  # fmt: skip

    def make_room(self, rows: int) -> None:
        """Keep buffers for so many rows only; what was captured before is of no use."""
        self.plans.clear()
        self.workspace = Workspace(rows, self.model.dtype, self.memory)

    def set_piece(self, piece: int) -> None:
        """Let dropout draw other masks for each piece of a batch."""
        self.stream[0] = self.seed + (piece << 32)
        self.memory.fill(self.placed, self.stream)

    def set_step(self, step: int, steps: int = 1) -> None:
        """Let dropout draw the masks of this step, and of the `steps` − 1 after it."""
        self.streams[:steps, 1] = step if steps == 1 else range(step, step + steps)
        self.memory.fill(self.placed, self.stream)

    def inputs(self, X: Any, y: Any, sample_weight: Any, where: str, finite: bool) -> list[Array]:
        """X, target and (if given) weight as the kernels take them."""
        expect_one_kind(where, X=X, y=y, sample_weight=sample_weight)
        memory, look = self.model.memory, finite or not on_gpu(y)
        X = self.model.inputs(X, where, finite)
        batch = len(X)
        if not 1 <= batch <= self.batch_size:
            raise ShapeError(f"{where}: X: expected 1 … {self.batch_size} rows, got {batch}")
        outputs, dtype = self.model.out_features, self.model.dtype
        arrays = [X, self.loss.targets(y, batch, outputs, dtype, memory, look)]
        if sample_weight is not None:
            arrays.append(weights(sample_weight, batch, where, dtype, memory))
        return arrays


def value_and_grad(
    model: Sequential, X: Any, y: Any, loss: str | Loss = "mse", sample_weight: Any = None,
    seed: int = 0,
) -> tuple[float, dict[str, Array]]:  # fmt: skip
    """The loss on (X, y) and its gradient by parameter name; the model is not changed.

    Training mode: dropout is drawn from `seed`, batch norm uses the batch. Where a device has no
    room for the batch, its rows go in pieces, and dropout draws other masks for each.
    """
    checks.integer("value_and_grad", "seed", seed, 0)
    batch = max(len(X), 1) if hasattr(X, "__len__") else 1
    with model.memory as memory:
        gradients = Gradients(model, resolve_loss(loss), batch, seed)
        inputs = gradients.inputs(X, y, sample_weight, "value_and_grad", finite=True)
        statistics = {name: value.copy() for name, value in model.statistics.items()}
        room = Room("value_and_grad", batch, whole=bool(statistics))

        def prepare(*piece: Array) -> Callable[..., None]:
            operators = gradients.operators(len(piece[0]))
            return lambda *arrays: operators(*map(memory.place, arrays))

        def compute() -> None:
            with memory:
                whole = room.rows == batch
                pieces = None if whole else Pieces(gradients, room.rows, prepare, inputs)
                (pieces or prepare(*inputs))(*inputs)

        try:
            room.attempt(compute, lambda: gradients.make_room(room.rows))
        finally:
            for name, value in statistics.items():
                memory.fill(model.statistics[name], value)
        found = {name: memory.numpy(g).copy() for name, g in gradients.views.items()}
    return float(gradients.value), found


def weights(sample_weight: Any, batch: int, where: str, dtype: Any, memory: Memory = HOST) -> Array:
    """Sample weights as (batch,), finite and ≥ 0."""
    w = as_numbers(where, "sample_weight", sample_weight, memory)
    if w.shape != (batch,):
        raise ShapeError(f"{where}: sample_weight: expected shape ({batch},), got {w.shape}")
    refuse_non_finite(where, "sample_weight", w)
    if (w < 0).any():
        w = in_host_memory(w)
        row = int(np.argmax(w < 0))
        raise OptionError(
            f"{where}: sample_weight: expected weights ≥ 0, got {w[row]} at row {row}"
        )
    return contiguous(w, dtype)
