"""A fit that survives: where it is, what a checkpoint of it holds, and how it goes on from one.

A checkpoint is a model file (`bp.load` reads it) that also holds the optimizer's moments, the
position in the data, the history and the state of every callback. Order, noise and dropout follow
from seed, epoch and batch, so a resumed fit makes the same steps, bit for bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.errors import (
    CheckpointFormatError,
    CheckpointMismatchError,
    KindError,
    OptionError,
)

from backprop.batches import Batches, Rows, read_rows
from backprop.callbacks import Callback, Training
from backprop.history import History
from backprop.memory import Memory
from backprop.queue import PendingLoss

POSITION = ("epoch", "batch", "done", "total", "validating", "stop")  # of a `Training`
SAMPLE_ROWS = 256  # of the data, to know it again


class Checkpoint:
    """`fit(checkpoint=Checkpoint("runs/first", seconds=600))`: where to save, and how often.

    Args:
        folder: of this run alone; made where it is missing.
        epochs, steps, seconds: save after so many; by default after every epoch. The end of a fit,
            Ctrl-C and SIGTERM save too.
        keep: how many checkpoints stay. Two or more: the one before the newest is the spare.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        epochs: int | None = None,
        steps: int | None = None,
        seconds: float | None = None,
        keep: int = 2,
    ) -> None:
        for name, value in (("epochs", epochs), ("steps", steps)):
            if value is not None:
                checks.integer("Checkpoint", name, value, 1)
        number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if seconds is not None and not (number and seconds >= 0):
            raise OptionError(f"Checkpoint: seconds: expected a number ≥ 0, got {seconds!r}")
        checks.integer("Checkpoint", "keep", keep, 2)
        self.folder = Path(folder)
        never_said = epochs is steps is seconds is None
        self.epochs = 1 if never_said else epochs
        self.steps, self.seconds, self.keep = steps, seconds, keep


def resolve_checkpoint(checkpoint: Any) -> Checkpoint | None:
    """A `Checkpoint`, from one or from its folder."""
    if checkpoint is None or isinstance(checkpoint, Checkpoint):
        return checkpoint
    if isinstance(checkpoint, str | os.PathLike):
        return Checkpoint(checkpoint)
    raise KindError(
        f"fit: checkpoint: expected a folder or a Checkpoint, got {type(checkpoint).__name__}"
    )


class Run:
    """One fit as something that can stop anywhere and go on.

    `batches` gives what is left of an epoch, saves between steps where that is due, and ends early
    after a signal; `interrupted` then says so.
    """

    def __init__(
        self,
        training: Training,
        callbacks: Sequence[Callback],
        source: Batches,
        checkpoint: Checkpoint | None,
        settings: Mapping[str, Any],
    ) -> None:
        from backprop.interrupts import Interrupts

        self.training, self.source = training, source
        # Those that have something to remember; others may come and go.
        self.callbacks = [c for c in callbacks if type(c).state_dict is not Callback.state_dict]
        self.checkpoint, self._given = checkpoint, settings
        self.interrupts = Interrupts(self._breakable, terminate=checkpoint is not None)
        self._saved_at = time.monotonic(), training.step.steps

    @cached_property
    def settings(self) -> dict[str, str]:
        """What a checkpoint and the fit that goes on from it must agree on, as text."""
        model, source = self.training.model, self.source
        optimizer = self.training.step.optimizer
        everything = {
            "layers": model.layers, "dtype": str(model.dtype), "frozen": sorted(model.frozen),
            "optimizer": optimizer.rule,
            **{f"optimizer.{name}": value for name, value in optimizer.settings().items()},
            **self._given,
            "seed": source.seed, "shuffle": source.shuffle, "batch_size": source.size,
            "rows": source.rows, "data": digest(source.columns, model.memory),
            "history": self.training.names,
            "callbacks": [type(callback).__name__ for callback in self.callbacks],
        }  # fmt: skip
        return {name: repr(value) for name, value in everything.items()}

    @property
    def interrupted(self) -> bool:
        """Whether a signal asked to end the training."""
        return self.interrupts.received is not None

    def __enter__(self) -> Run:
        self.interrupts.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        """Save after a signal, which then ends the fit as if it were done."""
        try:
            answered = self.interrupted and not self.interrupts.insisted
            answered = answered and isinstance(problem, KeyboardInterrupt | None)
            if answered:
                self.training.history.interrupted = True
                self.save()
            return answered
        finally:
            self.interrupts.__exit__(kind, problem, trace)

    def terminate(self) -> None:
        """End the process where SIGTERM asked for that, now that everything is saved."""
        import signal

        if self.interrupts.received == signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)

    def steps(self, batches: int, *arrays: Array) -> Sequence[float | PendingLoss]:
        """Train on so many batches → their losses. Those applied before a signal count."""
        step = self.training.step
        steps = step.steps
        try:
            return [step.run(*arrays)] if batches == 1 else step.run_several(batches, *arrays)
        except KeyboardInterrupt:
            if not self.interrupted or step.steps == steps:
                raise
            return [step.loss] if batches == 1 else step.losses

    def _breakable(self) -> bool:
        return self.training.step.running or self.training.validating

    def batches(self, together: int) -> Iterator[tuple[int, int, Sequence[Array]]]:
        """(number in the fit, batches, arrays) of what is left of the epoch.

        Up to `together` batches are trained on by one call. The caller has counted those it did
        in `training` when it asks for more.
        """
        training, source = self.training, self.source
        first = training.epoch * -(-source.rows // source.size)
        if self.checkpoint is not None and self.checkpoint.steps is not None:
            together = 1
        for count, batch in source.several(training.epoch, training.batch, together):
            if self.interrupted:
                return
            yield first + training.batch, count, batch
            self._save_if_due()

    def end_epoch(self) -> None:
        """The epoch is in the history and every callback knows: what follows is the next."""
        t = self.training
        t.epoch, t.batch, t.done, t.total = t.epoch + 1, 0, 0, 0.0
        every = self.checkpoint and self.checkpoint.epochs
        due = t.epoch == t.epochs or t.stop or (every and t.epoch % every == 0)
        if due and not self.interrupted:  # which saves by itself
            self.save()

    def _save_if_due(self) -> None:
        if self.checkpoint is None:
            return
        seconds, steps = self._saved_at
        checkpoint, step = self.checkpoint, self.training.step
        late = checkpoint.seconds is not None and time.monotonic() - seconds >= checkpoint.seconds
        if late or (checkpoint.steps and step.steps - steps >= checkpoint.steps):
            self.save()

    def save(self) -> None:
        """Write a checkpoint, where one is wanted."""
        if self.checkpoint is None:
            return
        from backprop.generations import PREFIX, STATE, Generations
        from backprop.plain import encode

        t = self.training
        tensors, text = encode(
            {
                "settings": self.settings,
                "position": {name: getattr(t, name) for name in POSITION},
                "step": t.step.state_dict(),
                "history": {name: np.array(values) for name, values in t.history.items()},
                "callbacks": [callback.state_dict() for callback in self.callbacks],
            },
            PREFIX,
        )
        model_tensors, metadata = t.model.content()
        folder = Generations(self.checkpoint.folder, self.checkpoint.keep)
        folder.save({**model_tensors, **tensors}, {**metadata, STATE: text})
        self._saved_at = time.monotonic(), t.step.steps

    def resume(self, resume: Any) -> None:
        """Go on from a checkpoint: True is the newest of the own folder, if there is one."""
        from backprop.generations import Generations, read_checkpoint

        own = Generations(self.checkpoint.folder) if self.checkpoint is not None else None
        if resume is False:
            if own is not None and own.files():
                raise OptionError(
                    f"fit: checkpoint: expected a folder without checkpoints, got {own.folder} "
                    f"with {own.files()[0].name}; resume=True goes on from there, or name another"
                )
            return
        if resume is True:
            if own is None:
                raise OptionError(
                    "fit: resume: expected checkpoint=… with resume=True, got none; or name a file"
                )
            found = own.newest()
            if found is None:
                return
            path, tensors, metadata = found
        elif isinstance(resume, str | os.PathLike):
            path, tensors, metadata = read_checkpoint(resume)
        else:
            raise KindError(f"fit: resume: expected True, False or a path, got {resume!r}")
        self._restore(path, tensors, metadata)

    def _restore(self, path: Path, tensors: dict[str, Array], metadata: Mapping[str, str]) -> None:
        from backprop.generations import STATE, model_part
        from backprop.plain import decode

        where = f"fit: resume: {path}"
        if STATE not in metadata:
            raise CheckpointFormatError(
                f"{where}: expected a checkpoint of a fit, got a file without {STATE}; a model "
                "alone is read by bp.load"
            )
        state = decode(metadata[STATE], tensors, where)
        t = self.training
        try:
            there, here = state["settings"], self.settings
            differences = [
                f"{name}: {there.get(name, 'nothing')} there, {here.get(name, 'nothing')} here"
                for name in dict.fromkeys([*there, *here])
                if there.get(name) != here.get(name)
            ]
            if differences:
                raise CheckpointMismatchError(
                    f"{where}: expected the run that is asked for, got {'; '.join(differences)}"
                )
            history = {name: values.tolist() for name, values in state["history"].items()}
            position = {name: state["position"][name] for name in POSITION}
            for name, value in position.items():
                if type(value) is not type(getattr(t, name)):
                    raise TypeError(f"{name} {value!r}")
            t.step.load_state_dict(state["step"])
            t.model.load_state_dict(model_part(tensors))
            for callback, own in zip(self.callbacks, state["callbacks"], strict=True):
                callback.load_state_dict(own)
        except CheckpointMismatchError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise CheckpointFormatError(
                f"{where}: expected the state of a fit, got {problem!r}"
            ) from problem
        t.history.update(history)
        for name, value in position.items():
            setattr(t, name, value)
        self._saved_at = time.monotonic(), t.step.steps


def history_of(path: str | os.PathLike[str]) -> History:
    """What a checkpoint, or the newest of a folder, remembers of its epochs."""
    from backprop.generations import STATE, read_checkpoint
    from backprop.plain import decode

    path, tensors, metadata = read_checkpoint(path)
    where = f"history: {path}"
    if STATE not in metadata:
        raise CheckpointFormatError(
            f"{where}: expected a checkpoint of a fit, got a model alone; name its history or a log"
        )
    try:
        kept = decode(metadata[STATE], tensors, where)["history"]
        return History({name: values.tolist() for name, values in kept.items()})
    except (KeyError, AttributeError) as problem:
        raise CheckpointFormatError(f"{where}: expected a history, got {problem!r}") from problem


def digest(columns: Sequence[Array | Rows], memory: Memory) -> str:
    """Of each column its shape, its dtype and rows spread evenly over it, the first and the last.

    So other data, more of it or another order is noticed, whatever its size, and a changed cell
    most likely is not.
    """
    import hashlib

    sha = hashlib.sha256()
    for column in columns:
        rows = len(column)
        sha.update(f"{tuple(column.shape)} {column.dtype.str};".encode())
        for row in np.unique(np.linspace(0, rows - 1, min(rows, SAMPLE_ROWS)).astype(np.int64)):
            part = read_rows(column, int(row), int(row) + 1)
            sha.update(np.ascontiguousarray(memory.numpy(part)).tobytes())
    return sha.hexdigest()[:16]
