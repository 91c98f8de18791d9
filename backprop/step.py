"""One training step, captured once and replayed; and its parts for those who want them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from backprop_kernels.arrays import Array
from backprop_kernels.errors import KindError, NonFiniteError, OptionError, ShapeError
from backprop_kernels.optimizers import OPTIMIZERS

from backprop.arena import aligned_zeros
from backprop.losses import Loss, options_for_kernel, refuse_non_finite, resolve_loss
from backprop.losses import as_numbers as _as_numbers
from backprop.model import Sequential
from backprop.optimizers import Optimizer, resolve_optimizer
from backprop.passes import Plan, Workspace


class Gradients:
    """Loss and gradients of a model for batches of up to `batch_size` rows.

    Holds every buffer a step needs; each batch size is captured once and then replayed.
    """

    def __init__(
        self, model: Sequential, loss: Loss, batch_size: int, seed: int, weighted: bool
    ) -> None:
        self.model = model
        self.loss = loss
        self.batch_size = batch_size
        self.flat = aligned_zeros(model.layout.size, model.dtype)
        self.views = model.layout.views(self.flat)
        self.stream = np.array([seed, 0], np.int64)  # of dropout: seed, step
        self.value = np.zeros((), np.float64)
        self.workspace = Workspace(batch_size, model.dtype)
        outputs = model.out_features // (2 if loss.name == "gaussian_nll" else 1)
        self.X = aligned_zeros((batch_size, model.in_features), model.dtype)
        # Class ids and dense targets need different buffers; the first batch decides.
        self.outputs = outputs
        self.target: Array | None = None
        self.weight = aligned_zeros(batch_size, model.dtype) if weighted else None

    def operators(self, batch: int) -> Callable[[], None]:
        """A function that runs forward, loss and backward of `batch` rows, for capture."""
        model, loss = self.model, self.loss
        plan = Plan(
            model.layers, model.parameters, model.statistics, model.backend, self.workspace,
            batch, self.flat, self.stream,
        )  # fmt: skip
        assert self.target is not None
        X, target = self.X[:batch], self.target[:batch]
        weight = None if self.weight is None else self.weight[:batch]
        options = options_for_kernel(loss, model.out_features)
        last = plan.passes[-1]

        def run() -> None:
            Z = plan.forward(X)
            model.backend.loss(
                Z, target, loss.name, options, plan.output_activation, weight,
                out=(self.value, last.dZ, last.db),
            )  # fmt: skip
            plan.backward(X)

        return run

    def fill(self, X: Any, y: Any, sample_weight: Any, where: str) -> int:
        """Check a batch and copy it in; returns its rows."""
        X = self.model.inputs(X, where)
        batch = len(X)
        if not 1 <= batch <= self.batch_size:
            raise ShapeError(f"{where}: X: expected 1 … {self.batch_size} rows, got {batch}")
        y = self.loss.targets(y, batch, self.model.out_features, self.model.dtype)
        if (sample_weight is None) != (self.weight is None):
            raise KindError(
                f"{where}: sample_weight: expected "
                + ("none" if self.weight is None else "weights")
                + ", as the step was built; pass TrainStep(..., weighted=True) for weights"
            )
        if self.weight is not None:
            self.weight[:batch] = weights(sample_weight, batch, where)
        self.X[:batch] = X
        self.put_targets(y)
        return batch

    def put_targets(self, y: Array) -> None:
        """Copy checked targets into the target buffer."""
        if self.target is None:
            self.target = aligned_zeros((self.batch_size, *y.shape[1:]), y.dtype)
        if y.ndim != self.target.ndim:
            raise ShapeError(
                "TrainStep: y: expected the kind of targets of the first batch "
                f"({self.target.ndim} dimension(s)), got {y.ndim}"
            )
        self.target[: len(y)] = y


class TrainStep:
    """`step = TrainStep(model, loss, optimizer, batch_size)`; `loss = step(X, y)` trains once.

    Buffers are allocated and the step is captured for a batch size on its first use; from then
    on a step allocates nothing but its returned number. A batch may be smaller than `batch_size`.

    Args:
        model: any model; its parameters are updated in place.
        loss: a name or a `Loss`.
        optimizer: a name or e.g. `AdamW(lr=1e-3)`. Its moments are kept here.
        clip_norm: scale longer gradients down to this L2 norm.
        weighted: whether every call passes `sample_weight`.
        seed: of dropout.

    Raises NonFiniteError when loss or gradient is not finite; the parameters and moments are then
    those of the step before.
    """

    def __init__(
        self,
        model: Sequential,
        loss: str | Loss = "mse",
        optimizer: str | Optimizer = "Adam",
        batch_size: int = 32,
        clip_norm: float | None = None,
        weighted: bool = False,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, Sequential):
            raise KindError(f"TrainStep: model: expected a model, got {type(model).__name__}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise OptionError(f"TrainStep: batch_size: expected ≥ 1, got {batch_size!r}")
        if clip_norm is not None and not clip_norm > 0:
            raise OptionError(f"TrainStep: clip_norm: expected > 0, got {clip_norm!r}")
        self.model = model
        self.optimizer = resolve_optimizer(optimizer)
        self.gradients = Gradients(model, resolve_loss(loss), batch_size, seed, weighted)
        rule = OPTIMIZERS[self.optimizer.rule]
        self.state = {name: aligned_zeros(model.layout.size, model.dtype) for name in rule.state}
        self.steps = 0
        self.norm = np.zeros((), np.float64)
        self._scalars = np.zeros(1 + len(self.optimizer.scalars(1)), np.float64)
        self._scalars[0] = np.inf if clip_norm is None else clip_norm
        self._captured: dict[int, Callable[[], None]] = {}

    def __call__(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Train on one batch: X (batch, in_features), y as the loss takes it → the loss."""
        return self.run(self.gradients.fill(X, y, sample_weight, "TrainStep"))

    def run(self, batch: int) -> float:
        """Train on the `batch` rows that already lie in the buffers."""
        if batch not in self._captured:
            self._captured[batch] = self._capture(batch)
        self._scalars[1:] = self.optimizer.scalars(self.steps + 1)
        self.gradients.stream[1] = self.steps
        self._captured[batch]()
        value = float(self.gradients.value)
        if not (np.isfinite(self.norm) and np.isfinite(value)):
            raise NonFiniteError(
                f"TrainStep: step {self.steps + 1}: expected a finite loss and gradient, got loss "
                f"{value} and gradient norm {float(self.norm)} at lr {self.optimizer.lr:g}; "
                "nothing was changed. Lower lr, set clip_norm, or scale the inputs"
            )
        self.steps += 1
        return value

    def _capture(self, batch: int) -> Callable[[], None]:
        backend = self.model.backend
        gradients = self.gradients.operators(batch)

        def step() -> None:
            gradients()
            backend.optimizer_step(
                self.model.parameters, self.gradients.flat, tuple(self.state.values()),
                self._scalars, self.optimizer.rule, self.gradients.value, out=self.norm,
            )  # fmt: skip

        captured: Callable[[], None] = backend.capture(step)
        return captured


def value_and_grad(
    model: Sequential, X: Any, y: Any, loss: str | Loss = "mse", sample_weight: Any = None,
    seed: int = 0,
) -> tuple[float, dict[str, Array]]:  # fmt: skip
    """The loss on (X, y) and its gradient by parameter name; the model is not changed.

    Training mode: dropout is drawn from `seed`, batch norm uses the batch.
    """
    batch = max(len(X), 1) if hasattr(X, "__len__") else 1
    gradients = Gradients(model, resolve_loss(loss), batch, seed, sample_weight is not None)
    statistics = {name: value.copy() for name, value in model.statistics.items()}
    rows = gradients.fill(X, y, sample_weight, "value_and_grad")
    gradients.operators(rows)()
    for name, value in statistics.items():
        model.statistics[name][...] = value
    return float(gradients.value), {name: g.copy() for name, g in gradients.views.items()}


def weights(sample_weight: Any, batch: int, where: str) -> Array:
    """Sample weights as (batch,), finite and ≥ 0."""
    w = _as_numbers(where, "sample_weight", sample_weight)
    if w.shape != (batch,):
        raise ShapeError(f"{where}: sample_weight: expected shape ({batch},), got {w.shape}")
    refuse_non_finite(where, "sample_weight", w)
    if (w < 0).any():
        row = int(np.argmax(w < 0))
        raise OptionError(
            f"{where}: sample_weight: expected weights ≥ 0, got {w[row]} at row {row}"
        )
    return w
