"""The training loop, in one readable function."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.errors import DataError, KindError

from backprop.batches import Batches, Rows
from backprop.history import History
from backprop.losses import Loss, options_for_kernel, resolve_loss
from backprop.model import PREDICT_ROWS, Sequential
from backprop.optimizers import Optimizer
from backprop.progress import Progress
from backprop.step import TrainStep, weights

Callback = Callable[[int, History], Any]  # (epoch from 0, history so far) → True to stop


def fit(
    model: Sequential,
    X: Any,
    y: Any,
    loss: str | Loss = "mse",
    optimizer: str | Optimizer = "Adam",
    epochs: int = 1,
    batch_size: int = 32,
    *,
    sample_weight: Any = None,
    eval_set: tuple[Any, Any] | None = None,
    shuffle: bool = True,
    clip_norm: float | None = None,
    callbacks: Iterable[Callback] = (),
    progress: bool | str = True,
    seed: int = 0,
) -> History:
    """Train `model` in place on X (rows, in_features) and y, and return what happened.

    Args:
        loss, optimizer: names, or `Loss(...)` and e.g. `AdamW(lr=1e-3)`.
        epochs, batch_size: passes over the data; rows per step. The last step may be smaller.
        sample_weight: (rows,), ≥ 0: a row of weight 2 counts as two rows within its batch.
        eval_set: (X, y) whose loss is `val_loss` after each epoch.
        shuffle: a new order every epoch, drawn from `seed`.
        clip_norm: scale longer gradients down to this L2 norm.
        callbacks: called after each epoch; one that returns True ends the training.
        progress: a line with rate, losses and time left, where someone watches; "lines": one line
            an epoch, also where output goes to a file; False: nothing.
        seed: of order and dropout. The same seed gives the same bits.

    All data is checked before the first step; an error leaves the model unchanged. When a step
    meets a non-finite loss or gradient it is not applied and NonFiniteError is raised.

    X may be larger than memory: a memory map, or a dataset (HDF5, Zarr) with shape and slicing. It
    is then read while training runs, checked as it is read, and shuffled by blocks.
    """
    if not isinstance(model, Sequential):
        raise KindError(f"fit: model: expected a model, got {type(model).__name__}")
    checks.integer("fit", "epochs", epochs, 1)
    checks.integer("fit", "batch_size", batch_size, 1)
    loss = resolve_loss(loss)
    options_for_kernel(loss, model.out_features)
    X, y = _checked(model, loss, X, y, "fit")
    columns = [X, y]
    if sample_weight is not None:
        columns.append(weights(sample_weight, len(X), "fit", model.dtype))
    held_out = (
        None if eval_set is None else _checked(model, loss, *_pair(eval_set), "fit: eval_set")
    )
    callbacks = list(callbacks)
    for i, callback in enumerate(callbacks):
        if not callable(callback):
            raise KindError(
                f"fit: callbacks[{i}]: expected a function of (epoch, history), "
                f"got {type(callback).__name__}"
            )

    batches = Batches(model.backend, columns, int(batch_size), shuffle, seed, model.memory)
    rows = batches.rows
    step = TrainStep(model, loss, optimizer, batches.size, clip_norm, seed)
    history = History()
    step.prepare(*batches.full)  # compiling is no part of the rate, nor of the first epoch's time
    report = Progress(int(epochs), rows, progress)
    val_loss: float | None = None
    for epoch in range(int(epochs)):
        started = time.perf_counter()
        total, done = 0.0, 0
        for batch in batches.epoch(epoch):
            total += len(batch[0]) * step.run(*batch)
            done += len(batch[0])
            report.update(epoch, done, total / done, val_loss)
        values = {"loss": total / rows, "lr": step.optimizer.lr}
        if held_out is not None:
            values["val_loss"] = val_loss = evaluate_loss(model, *held_out, loss)
        history.append(**values, seconds=time.perf_counter() - started)
        report.end_epoch(epoch, values["loss"], val_loss)
        stops = [callback(epoch, history) for callback in callbacks]  # every one is called
        if any(stops):
            break
    return history


def evaluate_loss(model: Sequential, X: Array | Rows, y: Array | Rows, loss: Loss) -> float:
    """The mean loss over checked data, in prediction mode, in batches."""
    total, weight = 0.0, 0.0
    options = options_for_kernel(loss, model.out_features)
    for Y, (_, target) in model.outputs([X, y], PREDICT_ROWS):
        counted = _weight(target, loss)
        with model.memory as memory:
            value, *_ = model.backend.loss(Y, memory.place(target), loss.name, options)
        total += counted * float(value)
        weight += counted
    return total / weight if weight else 0.0


def _weight(y: Array, loss: Loss) -> float:
    """What the mean over this part divided by: rows, or their class weights."""
    if loss.name != "cross_entropy" or y.ndim == 2:
        return float(len(y))
    ids = y[y != loss.options["ignore_index"]]
    class_weight = loss.options["class_weight"]
    return float(len(ids)) if class_weight is None else float(class_weight[ids].sum())


def _checked(
    model: Sequential, loss: Loss, X: Any, y: Any, where: str
) -> tuple[Array | Rows, Array | Rows]:
    X = model.column(X, where)
    if len(X) == 0:
        raise DataError(f"{where}: X: expected at least one row, got shape {X.shape}")
    return X, loss.column(y, len(X), model.out_features, model.dtype)


def _pair(eval_set: Any) -> tuple[Any, Any]:
    if not isinstance(eval_set, tuple | list) or len(eval_set) != 2:
        raise KindError(f"fit: eval_set: expected (X, y), got {type(eval_set).__name__}")
    return eval_set[0], eval_set[1]
