"""The training loop, in one readable function."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import Any

from backprop_kernels import checks
from backprop_kernels.errors import KindError

from backprop.averaging import EMA
from backprop.batches import Batches, mostly_zeros
from backprop.callbacks import Callback, Callbacks, EpochFunction, Training, as_callbacks
from backprop.evaluation import CustomMetric, resolve_metrics, scores
from backprop.history import History
from backprop.losses import Loss, options_for_kernel, resolve_loss
from backprop.model import Sequential
from backprop.monitor import EarlyStopping, resolve_early_stopping
from backprop.noise import InputNoise
from backprop.optimizers import Optimizer
from backprop.progress import Progress
from backprop.resume import Checkpoint, Run, resolve_checkpoint
from backprop.schedules import resolve_schedule
from backprop.step import TrainStep
from backprop.validation import DataSet, class_weights, named_sets


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
    class_weight: Any = None,
    eval_set: Any = None,
    validation_fraction: float | None = None,
    metrics: Sequence[str | CustomMetric] | str = (),
    schedule: str | Callback | Callable[[float], float] | None = None,
    early_stopping: bool | int | EarlyStopping | None = None,
    shuffle: bool = True,
    clip_norm: float | None = None,
    accumulate: int = 1,
    input_noise: float = 0.0,
    ema: float | EMA | None = None,
    precision: str | None = None,
    recompute: int = 1,
    autotune: bool = False,
    callbacks: Iterable[Callback | EpochFunction] = (),
    checkpoint: str | PathLike[str] | Checkpoint | None = None,
    resume: bool | str | PathLike[str] = False,
    progress: bool | str = True,
    seed: int = 0,
) -> History:
    """Train `model` in place on X (rows, in_features) and y, and return what happened.

    Args:
        loss, optimizer: names, or `Loss(...)` and e.g. `AdamW(lr=1e-3)`.
        epochs, batch_size: passes over the data; rows per step. The last step may be smaller.
        sample_weight: (rows,), ≥ 0: a row of weight 2 counts as two rows within its batch.
        class_weight: "balanced", or weights by class; they multiply sample_weight.
        eval_set: (X, y[, sample_weight]) to evaluate after each epoch as `val_loss`, …; or several
            by name: {"valid": (X, y), "test": (X, y)}.
        validation_fraction: or this share of the rows, drawn at random, of each class alike.
        metrics: names from `METRICS`, or functions of (y, predictions), for every set.
        schedule: of the learning rate: a name, a `Schedule` or `Plateau`, or a function from epochs
            passed to a factor of lr.
        early_stopping: True, a patience in epochs, or an `EarlyStopping`.
        shuffle: a new order every epoch, drawn from `seed`.
        clip_norm: scale longer gradients down to this L2 norm.
        accumulate: make a step of the gradients of this many batches.
        input_noise: standard deviation of Gaussian noise on X, drawn anew for every batch.
        ema: decay of an average of the parameters, which the model then holds after each epoch.
        precision: of the products, in training and evaluation: the model's dtype, or for a float32
            model on a GPU "tf32", "bf16", "fp16", "bf16x3" or "bf16x6". Sums, parameters and update
            stay float32.
        recompute: keep the activations of every so-many-th layer only, and compute the others again
            in backward: less memory, more time, the same bits.
        autotune: on a GPU, measure which kernel is the fastest for each product, and remember it;
            the bits then depend on the GPU.
        callbacks: functions of (epoch, history), called after each epoch; one that returns True
            ends the training. Or objects: see `Callback`.
        checkpoint: a folder to save the fit in after every epoch, or a `Checkpoint`.
        resume: True goes on from the newest checkpoint, if there is one; or a checkpoint's path.
        progress: a line with rate, losses and time left, where someone watches; "lines": one line
            an epoch, also where output goes to a file; False: nothing.
        seed: of order, noise, dropout and split. The same seed gives the same bits.

    All data is checked before the first step; an error leaves the model unchanged. When a step
    meets a non-finite loss or gradient it is not applied and NonFiniteError is raised.

    Ctrl-C ends the fit after the step it meets (a long one is broken off, whole or not at all), and
    the history says `interrupted`. With a checkpoint it saves, and so does SIGTERM.

    Where most of X is 0 (one-hot columns) the first layer skips the zeros, on a CPU.

    X may be larger than memory: a memory map, or a dataset (HDF5, Zarr) with shape and slicing. It
    is then read while training runs, checked as it is read, and shuffled by blocks.
    """
    if not isinstance(model, Sequential):
        raise KindError(f"fit: model: expected a model, got {type(model).__name__}")
    checks.integer("fit", "epochs", epochs, 1)
    checks.integer("fit", "batch_size", batch_size, 1)
    loss = resolve_loss(loss)
    options_for_kernel(loss, model.out_features)
    data = DataSet.checked(model, loss, X, y, sample_weight, "fit")
    sets = named_sets(model, loss, eval_set)
    if validation_fraction is not None:
        if "val" in sets:
            raise KindError("fit: validation_fraction: expected either that or eval_set, got both")
        data, sets["val"] = data.split(validation_fraction, loss, seed, model.memory)
    if class_weight is not None:
        data = data.weighted(class_weights(data.columns[1], class_weight, loss, "fit"))
    chosen = resolve_metrics(metrics, loss, "fit")
    names = [f"{name}_{metric}" for name in sets for metric in ("loss", *chosen)]
    parts = (
        resolve_schedule(schedule), ema if ema is None or isinstance(ema, EMA) else EMA(ema),
        *as_callbacks(callbacks), resolve_early_stopping(early_stopping),
    )  # fmt: skip

    batches = Batches(
        model.backend, data.columns, int(batch_size), shuffle, seed, model.memory
    )  # fmt: skip
    noise = InputNoise(
        input_noise, (batches.size, model.in_features), model.dtype, model.memory, seed
    )  # fmt: skip
    step = TrainStep(
        model, loss, optimizer, batches.size, clip_norm, seed, accumulate, precision,
        recompute, autotune,
        sparse_input=not input_noise and mostly_zeros(data.columns[0], batches.size),
    )  # fmt: skip
    if not input_noise:
        batches.gather_in(step)
    history, rows = History(), batches.rows
    training = Training(
        model, step, history, int(epochs), rows, ("loss", "lr", *names, "seconds"), seed
    )
    present = [part for part in parts if part is not None]
    run = Run(training, present, batches, resolve_checkpoint(checkpoint), {
        "loss": loss, "accumulate": accumulate, "clip_norm": clip_norm, "input_noise": input_noise,
        "precision": precision or str(model.dtype),
    })  # fmt: skip
    run.resume(resume)
    watching = Callbacks(present, training)
    watching.tell("fit_begin")
    # Compiling is no part of the rate, nor of the first epoch's time.
    together = step.together(*batches.full)
    if input_noise or "step_begin" in watching or "step_end" in watching:
        together = 1  # Python is wanted before or after every step
    report = Progress(training.epochs, rows, progress, before=training.epoch * rows + training.done)
    val_loss: float | None = None
    try:
        with run:
            while training.epoch < training.epochs and not training.stop:
                started = time.perf_counter()
                for number, count, (inputs, *targets) in run.batches(together):
                    training.coming = count
                    watching.tell("steps_begin")
                    watching.tell("step_begin")
                    training.count(len(inputs), run.steps(count, noise(inputs, number), *targets))
                    watching.tell("step_end")
                    if report.due():
                        loss_so_far = training.total / training.done
                        report.update(training.epoch, training.done, loss_so_far, val_loss)
                if run.interrupted:
                    break
                if step.flush():
                    watching.tell("step_end")
                if not training.validating:
                    watching.tell("validation_begin")
                training.validating = True  # from here a signal breaks it off
                if run.interrupted:
                    break
                values = {"loss": training.total / rows, "lr": step.lr}
                for name, held_out in sets.items():
                    found = scores(model, loss, held_out.columns, chosen, precision)
                    values |= {f"{name}_{metric}": value for metric, value in found.items()}
                training.validating = False
                val_loss = values.get("val_loss")
                history.append(**values, seconds=time.perf_counter() - started)
                report.end_epoch(training.epoch, values["loss"], val_loss)
                watching.tell("epoch_end")
                run.end_epoch()
                if run.interrupted:
                    break
    finally:
        watching.tell("fit_end")
    run.terminate()
    return history
