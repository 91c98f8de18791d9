"""A fit that was stopped anywhere and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backprop as bp
from backprop.callbacks import Callback, Training
from backprop.generations import Generations
from tests.watching import SignalAtLine

rng = np.random.default_rng(0)
X, ids = rng.normal(size=(23, 4)), rng.integers(0, 3, 23)
X_val, ids_val = rng.normal(size=(9, 4)), rng.integers(0, 3, 9)


class Died(Exception):
    """Nothing of this process is left but its files."""


class Dies(Callback):
    """At the `at`-th call of any of its methods, by whatever `how` does."""

    def __init__(self, at: int, how: Callable[[], None]) -> None:
        self.left, self.how = at, how
        self.seen: list[str] = []

    def _event(self, name: str) -> None:
        self.seen.append(name)
        self.left -= 1
        if self.left == 0:
            self.how()

    def step_begin(self, training: Training) -> None:
        self._event("step_begin")

    def step_end(self, training: Training) -> None:
        self._event("step_end")

    def validation_begin(self, training: Training) -> None:
        self._event("validation_begin")

    def epoch_end(self, training: Training) -> None:
        self._event("epoch_end")


class Remembers(Callback):
    """A user's callback with a state of every kind."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.worst = float("-inf")

    def step_end(self, training: Training) -> None:
        self.norms.append(float(training.step.norm))
        self.worst = max(self.worst, training.loss)

    def state_dict(self) -> dict[str, Any]:
        return {"norms": np.array(self.norms), "worst": self.worst, "nested": {"a": [1, None, "x"]}}

    def load_state_dict(self, state: Any) -> None:
        assert state["nested"] == {"a": [1, None, "x"]}
        self.norms, self.worst = state["norms"].tolist(), state["worst"]


def nan_after_epoch(epoch: int, history: bp.History) -> None:
    """A function as a callback, as in the first versions of everybody's code."""


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {"optimizer": bp.Adam(lr=0.01), "batch_size": 8},
    "everything": lambda: {
        "optimizer": bp.AdamW(lr=0.01, groups={"*.bias": {"lr_scale": 0.5}}, max_norm=1.0),
        "batch_size": 6, "schedule": bp.Schedule("cosine", warmup=0.5), "ema": 0.9,
        "early_stopping": bp.EarlyStopping(patience=2), "input_noise": 0.1, "clip_norm": 1.0,
        "eval_set": (X_val, ids_val), "metrics": ["accuracy"], "callbacks": [nan_after_epoch],
    },
    "accumulated": lambda: {
        "optimizer": bp.SGD(lr=0.1, momentum=0.9, clip_tensor_norm=0.1),
        "batch_size": 5, "accumulate": 3,
        "schedule": bp.Schedule("cosine", warmup=1), "ema": 0.5,
    },
    "plateau": lambda: {
        "optimizer": bp.Muon(lr=0.1), "batch_size": 8, "input_noise": 0.1,
        "schedule": bp.Plateau("loss", patience=1, factor=0.5),
    },
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES)


def train(
    folder: Path | None, case: str, killer: Callback | None = None, epochs: int = 3, **more: Any
) -> tuple[bp.Sequential, bp.History, Remembers]:
    """A fresh process's fit: everything is made anew, and only `folder` is from before."""
    layers: list[Any] = [bp.Dropout(0.1), bp.Linear(4, 6, bias=False)]
    layers += [bp.BatchNorm(6, "relu"), bp.Dropout(0.3), bp.Linear(6, 3)]
    model = bp.Sequential(layers, device="reference")
    remembers = Remembers()
    options = CASES[case]()
    callbacks = [*options.pop("callbacks", []), remembers, killer or Dies(0, lambda: None)]
    saved = {} if folder is None else {"checkpoint": bp.Checkpoint(folder, epochs=1, steps=1)}
    history = bp.fit(
        model, X, ids, "cross_entropy", epochs=epochs, callbacks=callbacks, progress=False,
        **(saved | options | more),
    )  # fmt: skip
    return model, history, remembers


def bits(result: tuple[bp.Sequential, bp.History, Remembers]) -> Any:
    model, history, remembers = result
    state = {name: value.tobytes() for name, value in model.state_dict().items()}
    curves = {name: values for name, values in history.items() if name != "seconds"}
    return state, curves, np.array(remembers.norms).tobytes(), remembers.worst


def raise_died() -> None:
    raise Died


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@cases
def test_killed_at_any_step_and_resumed(case: str, tmp_path: Path) -> None:
    expected = bits(train(None, case))
    counting = Dies(0, lambda: None)
    assert bits(train(tmp_path / "whole", case, counting)) == expected, "saving changes nothing"
    for at in range(1, len(counting.seen) + 1):
        folder = tmp_path / str(at)
        with pytest.raises(Died):
            train(folder, case, Dies(at, raise_died))
        assert bits(train(folder, case, resume=True)) == expected, counting.seen[at - 1]


@cases
def test_ctrl_c_at_any_step_returns_and_can_be_resumed(case: str, tmp_path: Path) -> None:
    expected = bits(train(None, case))
    counting = Dies(0, lambda: None)
    train(None, case, counting)
    for at in range(1, len(counting.seen) + 1):
        folder = tmp_path / str(at)
        steps = bp.Checkpoint(folder, seconds=1e9)  # the interrupt alone saves
        interrupter = Dies(at, ctrl_c)
        model, history, _ = train(folder, case, interrupter, checkpoint=steps)
        assert set(interrupter.seen[at:]) <= {"step_end", "validation_begin"}, "no other batch"
        assert history.interrupted and np.isfinite(model.predict(X)).all()
        assert len(Generations(folder).files()) == 1
        again = train(folder, case, resume=True)
        assert bits(again) == expected, counting.seen[at - 1]
        assert not again[1].interrupted


class Signals(SignalAtLine):
    """Of a training step, from its batch `first` on."""

    FILES = ("step.py", "update.py", "muon.py")

    def __init__(self, at: int, first: int, batches: int) -> None:
        super().__init__(at)
        self.batches = range(first, first + batches)
        self.seen = -1

    def wanted(self, frame: Any) -> bool:
        if os.path.basename(frame.f_code.co_filename) not in self.FILES:
            return False
        self.seen += frame.f_code is bp.TrainStep.run.__code__
        return self.seen in self.batches


@cases
def test_broken_off_at_any_line_of_a_step(case: str, tmp_path: Path) -> None:
    """Whole or not at all, and every callback has seen each batch once."""
    expected = bits(train(None, case))
    first, batches = (0, 5) if case == "accumulated" else (1, 1)  # a step; there a flushed one too
    with Signals(0, first, batches) as counting:
        assert bits(train(None, case)) == expected
    assert counting.lines > 40 * batches
    for at in range(1, counting.lines + 1, 5):
        folder = tmp_path / str(at)
        saved = bp.Checkpoint(folder, seconds=1e9)
        with Signals(at, first, batches) as signals:
            assert train(folder, case, checkpoint=saved)[1].interrupted, signals.place
        assert bits(train(folder, case, resume=True)) == expected, signals.place


def test_a_step_refused_after_resuming_within_it_is_undone_whole() -> None:
    """Running statistics too go back to where they were before its first batch."""

    def new() -> bp.TrainStep:
        layers = [bp.Linear(4, 6, bias=False), bp.BatchNorm(6, "relu"), bp.Linear(6, 3)]
        model = bp.Sequential(layers, dtype="float64", device="reference")
        return bp.TrainStep(model, "cross_entropy", "Adam", 5, accumulate=3)

    step, resumed = new(), new()
    before = {name: value.copy() for name, value in step.model.state_dict().items()}
    for part in (slice(0, 5), slice(5, 10)):
        step(X[part], ids[part])
    resumed.model.load_state_dict(step.model.state_dict())
    resumed.load_state_dict(step.state_dict())
    assert resumed.pending == 2
    with pytest.raises((bp.NonFiniteError, bp.DataError)):
        resumed(np.full((5, 4), np.nan), ids[:5])
    for name, value in resumed.model.state_dict().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    with pytest.raises(bp.OptionError, match="TrainStep: accumulated"):
        bp.TrainStep(resumed.model, "cross_entropy", "Adam", 5).load_state_dict(step.state_dict())


def test_interrupted_again_and_again(tmp_path: Path) -> None:
    expected = bits(train(None, "everything"))
    for _ in range(100):
        result = train(tmp_path, "everything", Dies(3, ctrl_c), resume=True)
        if not result[1].interrupted:
            break
    assert bits(result) == expected
    assert bits(train(tmp_path, "everything", resume=True)) == expected, "done is done"


def test_a_second_ctrl_c_raises_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        ctrl_c()
        ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "plain", Dies(4, twice))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert bits(train(tmp_path, "plain", resume=True)) == bits(train(None, "plain"))


def test_other_peoples_handlers_are_left_alone(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        term = Dies(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert not train(tmp_path, "plain", term)[1].interrupted
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_is_answered_where_there_is_a_checkpoint(tmp_path: Path) -> None:
    answered: list[bool] = []

    def look() -> None:
        answered.append(signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler

    for folder in (None, tmp_path):
        train(folder, "plain", Dies(1, look), epochs=1)
    assert answered == [False, True]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_longer_run_goes_on_where_a_shorter_one_ended(tmp_path: Path) -> None:
    train(tmp_path, "plain", epochs=1)
    assert bits(train(tmp_path, "plain", resume=True)) == bits(train(None, "plain"))


def test_streamed_rows_are_resumed_too(tmp_path: Path) -> None:
    data = bp.datasets.friedman(10_000, 6, streamed=True)

    def fit(killer: Callback | None, **more: Any) -> np.ndarray:
        model = bp.MLP([6, 8, 1], device="reference")
        callbacks = [killer] if killer else []
        bp.fit(model, *data, batch_size=900, epochs=2, callbacks=callbacks, progress=False, **more)
        return model.parameters

    expected = fit(None)
    saved = bp.Checkpoint(tmp_path, steps=1)
    with pytest.raises(Died):
        fit(Dies(30, raise_died), checkpoint=saved)
    np.testing.assert_array_equal(fit(None, checkpoint=saved, resume=True), expected)


def test_a_checkpoint_is_a_model(tmp_path: Path) -> None:
    model, _, _ = train(tmp_path, "plain")
    for path in (tmp_path, *Generations(tmp_path).files()[:1]):
        np.testing.assert_array_equal(bp.load(path, "reference").predict(X), model.predict(X))
    history = train(None, "plain", resume=tmp_path)[1]
    assert history.epochs == 3


PROGRAM = """
import sys
import time
import numpy as np
import backprop as bp


class Slow(bp.Callback):
    def step_end(self, training):
        if training.step.steps == 7:
            print("ready", flush=True)
        time.sleep(0.02)
X = np.random.default_rng(0).normal(size=(64, 4))
model = bp.MLP([4, 8, 1], device="reference")
saved = bp.Checkpoint(sys.argv[1], steps=int(sys.argv[2]))
callbacks = [Slow()] if sys.argv[3:] else []
bp.fit(model, X, X[:, 0], epochs=4, batch_size=8, callbacks=callbacks,
       checkpoint=saved, resume=True, progress=False)
print(model.parameters.tobytes().hex())
"""


def run(folder: Path, every: int, number: int | None) -> tuple[int, str]:
    """(status, output) of a process that gets this signal in its seventh step."""
    command = [sys.executable, "-c", PROGRAM, str(folder), str(every)]
    command += [] if number is None else ["slow"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    if number is not None:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
    output = process.communicate()[0]
    return process.returncode, output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_ended_by_a_signal(number: int, tmp_path: Path) -> None:
    never = 10**6
    expected = run(tmp_path / "whole", never, None)[1]
    every = 1 if number == signal.SIGKILL else never
    status, output = run(tmp_path / "run", every, number)
    assert Generations(tmp_path / "run").files()
    if number == signal.SIGINT:  # the fit returned
        assert status == 0 and len(output) == len(expected) and output != expected
    else:
        assert (status, output) == (-number, "")
    assert run(tmp_path / "run", never, None)[1] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 7}, "batch_size: 8 there, 7 here"),
        ({"seed": 3}, "seed: 0 there, 3 here"),
        ({"optimizer": "SGD"}, "optimizer: 'Adam' there, 'SGD' here"),
        ({"loss": bp.Loss("cross_entropy", label_smoothing=0.1)}, "loss: .* there, .*0.1"),
        ({"ema": 0.9}, r"callbacks: \['Remembers'\] there, \['EMA', 'Remembers'\] here"),
        ({"X": X[::-1]}, "data: .* there, .* here"),
        ({"eval_set": (X_val, ids_val)}, r"history: \('loss', 'lr', 'seconds'\) there, .*val_loss"),
        ({"optimizer": bp.Muon(momentum=0.5)}, "optimizer.momentum: nothing there, 0.5 here"),
        ({"X": np.concatenate([X[:11], X[11:12] + 0.01, X[12:]])}, "data: .* there, .* here"),
        ({"y": np.roll(ids, 1)}, "data: .* there, .* here"),
        ({"X": X[:20], "y": ids[:20]}, "rows: 23 there, 20 here; data: "),
        ({"model": bp.MLP([4, 6, 3], device="reference")}, "layers: .*BatchNorm.* there"),
        ({"model": bp.MLP([4, 6, 3], device="reference", dtype="float64")}, "dtype: 'float32'"),
    ],
)
def test_another_run_is_not_mistaken_for_this_one(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    first, _, _ = train(tmp_path, "plain")
    model = bp.Sequential(first.layers, device="reference", seed=1)
    options: dict[str, Any] = {
        "model": model, "X": X, "y": ids, "loss": "cross_entropy", "epochs": 3,
        "callbacks": [Remembers()], "checkpoint": tmp_path, "progress": False,
    }  # fmt: skip
    options |= CASES["plain"]() | changes
    before = options["model"].parameters.copy()
    with pytest.raises(bp.CheckpointMismatchError, match=message) as caught:
        bp.fit(**options, resume=True)
    assert str(caught.value).startswith(f"fit: resume: {tmp_path}")
    np.testing.assert_array_equal(options["model"].parameters, before)


def test_bad_arguments(tmp_path: Path) -> None:
    model = bp.MLP([4, 3], device="reference")
    model.save(tmp_path / "m.safetensors")
    train(tmp_path / "run", "plain", epochs=1)
    for more, kind, message in [
        ({"checkpoint": tmp_path / "run"}, bp.OptionError, "resume=True goes on from there, or"),
        ({"resume": True}, bp.OptionError, "expected checkpoint=… with resume=True"),
        ({"resume": 1}, bp.KindError, "resume: expected True, False or a path, got 1"),
        ({"checkpoint": 1}, bp.KindError, "checkpoint: expected a folder or a Checkpoint, got int"),
        ({"resume": tmp_path / "absent"}, FileNotFoundError, "absent"),
        ({"resume": tmp_path}, bp.DataError, "expected checkpoints in this folder, got none"),
        ({"resume": tmp_path / "m.safetensors"}, bp.CheckpointFormatError, "a model alone is read"),
    ]:
        with pytest.raises(kind, match=message):
            bp.fit(model, X, ids, "cross_entropy", progress=False, **more)  # type: ignore[arg-type]
    for options, message in [
        ({"epochs": 0}, "Checkpoint: epochs"),
        ({"steps": 1.5}, "Checkpoint: steps"),
        ({"seconds": -1}, "Checkpoint: seconds: expected a number ≥ 0, got -1"),
        ({"keep": 1}, "Checkpoint: keep"),
    ]:
        with pytest.raises((bp.OptionError, bp.KindError), match=message):
            bp.Checkpoint(tmp_path, **options)  # type: ignore[arg-type]


def test_a_state_that_does_not_fit_is_named(tmp_path: Path) -> None:
    """Files of another version, or made by hand: whole, and not what is expected."""
    from backprop.checkpoint import read_tensors, write_tensors
    from backprop.generations import STATE

    train(tmp_path, "plain", epochs=1)
    path = Generations(tmp_path).files()[0]
    tensors, metadata = read_tensors(path)
    moments = next(name for name in tensors if "moments" in name)
    for changed, text in [
        ({moments: np.zeros(3)}, metadata[STATE]),
        ({"layers.0.weight": np.zeros((1, 1))}, metadata[STATE]),
        ({}, metadata[STATE].replace('"position"', '"place"')),
        ({}, metadata[STATE].replace('"steps"', '"step"')),
        ({}, metadata[STATE].replace('"done": 0', '"done": "0"')),
        ({}, metadata[STATE].replace('"lr": 0.01', '"lr": -1')),
        ({}, "[]"),
        ({}, "{}"),
    ]:
        write_tensors(path, {**tensors, **changed}, {**metadata, STATE: text})
        with pytest.raises((bp.CheckpointFormatError, bp.CheckpointMismatchError)):
            train(None, "plain", resume=path)


def test_saved_as_often_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, saves in [
        ({}, 3),  # every epoch
        ({"epochs": 2}, 2),  # the second, and the end
        ({"steps": 2}, 4 + 1),  # of 9 steps, and the end
        ({"seconds": 0}, 9 + 1),
        ({"seconds": 1e9}, 1),
    ]:
        folder = tmp_path / str(options)
        train(None, "plain", checkpoint=bp.Checkpoint(folder, **options))  # type: ignore[arg-type]
        assert Generations(folder).files()[0].name == f"checkpoint-{saves:06d}.safetensors"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_on_a_device_of_its_own_memory(tmp_path: Path, accumulate: int) -> None:
    """In the CUDA emulator: moments, averages, half a step and its count travel there and back."""
    from tests.cuda_host import backend, build

    if reason := build.problem():
        pytest.skip(f"the CUDA emulator {reason}")

    def fit(*callbacks: Callback, **more: Any) -> dict[str, np.ndarray]:
        model = bp.MLP([4, 6, 3], dropout=0.2, device="cuda")
        bp.fit(
            model, X, ids, "cross_entropy", "Adam", 2, 8, ema=0.9, accumulate=accumulate,
            callbacks=callbacks, progress=False, **more,
        )  # fmt: skip
        return model.state_dict()

    with backend.installed():
        expected = fit()
        with pytest.raises(Died):
            fit(Dies(9, raise_died), checkpoint=bp.Checkpoint(tmp_path, seconds=0))
        np.testing.assert_equal(fit(checkpoint=tmp_path, resume=True), expected)
