"""Steps that one call into compiled code makes: the bits of steps made one by one."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backprop as bp
from backprop import batches
from tests.watching import SignalAtLine, Watches

rng = np.random.default_rng(0)
X, ids = rng.standard_normal((203, 6)).astype(np.float32), rng.integers(0, 3, 203)
ONE_HOT = np.hstack([X[:, :1], np.eye(40, dtype=np.float32)[rng.integers(0, 40, 203)]])


def fitted(watched: bool, layers: dict[str, Any], data: Any = X, **options: Any) -> tuple[Any, ...]:
    model = bp.MLP([data.shape[1], 16, 9, 3], seed=1, device="cpu", **layers)
    given = {"optimizer": bp.AdamW(lr=0.01), "epochs": 3, "batch_size": 8, "seed": 3}
    given |= deepcopy(options)  # a schedule remembers what it saw
    watchers = [Watches()] if watched else []
    history = bp.fit(model, data, ids, "cross_entropy", callbacks=watchers, progress=False, **given)
    return model.parameters.tobytes(), history["loss"], history["lr"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each call of `run_several` made."""
    found: list[int] = []
    run = bp.TrainStep.run_several

    def noted(self: bp.TrainStep, steps: int, *arrays: Any) -> list[float]:
        losses = run(self, steps, *arrays)
        found.append(len(losses))
        return losses

    monkeypatch.setattr(bp.TrainStep, "run_several", noted)
    return found


TOGETHER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dropout": ({"dropout": 0.3}, {}),
    "norm": ({"norm": "layer"}, {"clip_norm": 0.1}),
    "float64": ({"dtype": "float64"}, {"optimizer": bp.SGD(lr=0.1, momentum=0.9)}),
    "spans": ({}, {"optimizer": bp.Adam(groups={"*.bias": {"lr_scale": 0.5}}, l2=0.1)}),
    "weights": ({}, {"class_weight": "balanced", "eval_set": (X, ids), "early_stopping": 2}),
    "no short batch, one call": ({}, {"batch_size": 29}),
    "schedule": ({}, {"schedule": bp.Schedule("cosine", warmup=0.5)}),
    "plateau": ({}, {"schedule": bp.Plateau("loss", patience=1, min_delta=1, warmup=1.1)}),
    "zeros": ({}, {"data": ONE_HOT, "batch_size": 32}),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_the_bits_are_those_of_steps_one_by_one(
    case: str, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "SPARSE_ROWS", 32)
    layers, options = TOGETHER[case]
    data = options.get("data", X)
    rest = {name: value for name, value in options.items() if name != "data"}
    alone = fitted(True, layers, data, **rest)
    assert not calls
    assert fitted(False, layers, data, **rest) == alone
    assert sum(calls) == 3 * (203 // rest.get("batch_size", 8))


ALONE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "running statistics": ({"norm": "batch"}, {}),
    "rows' limit": ({}, {"optimizer": bp.Adam(max_norm=0.5)}),
    "tensors' limit": ({}, {"optimizer": bp.Adam(clip_tensor_norm=0.01)}),
    "array code": ({}, {"optimizer": bp.Muon()}),
    "accumulated": ({}, {"accumulate": 2}),
    "noise": ({}, {"input_noise": 0.1}),
    "average": ({}, {"ema": 0.9}),
    "in order": ({}, {"shuffle": False}),
}


@pytest.mark.parametrize("case", ALONE)
def test_what_comes_between_steps_keeps_them_apart(case: str, calls: list[int]) -> None:
    layers, options = ALONE[case]
    assert fitted(True, layers, **options) == fitted(False, layers, **options)
    assert not calls


def test_a_call_is_not_long(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal is answered after it, so a large network's steps are few."""
    from backprop_kernels.cpu import program

    expected = fitted(False, {})
    assert max(calls) == 203 // 8
    calls.clear()
    monkeypatch.setattr(program, "AT_ONCE", 3e5)
    assert fitted(False, {}) == expected
    assert 1 < max(calls) < 203 // 8


@pytest.mark.parametrize("broken", [0, 37, 199])
def test_a_refused_step_ends_the_call(broken: int, calls: list[int]) -> None:
    """Those before it are applied, it and those after it are not, and the error names it."""
    data = X.copy()
    data[broken] = 3e38
    ends = []
    for watched in (True, False):
        model = bp.MLP([6, 16, 9, 3], seed=1, device="cpu")
        with pytest.raises(bp.NonFiniteError) as error:
            bp.fit(
                model, data, ids, "cross_entropy", batch_size=8, progress=False,
                callbacks=[Watches()] if watched else [],
            )  # fmt: skip
        ends.append((str(error.value), model.parameters.tobytes()))
    assert ends[0] == ends[1]


class Signals(SignalAtLine):
    """Of `run_several` and of what counts its steps."""

    CODE = bp.TrainStep.run_several.__code__, bp.TrainStep._count_several.__code__

    def wanted(self, frame: Any) -> bool:
        return frame.f_code in self.CODE


def test_broken_off_at_any_line_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step that was applied counts, and no other."""
    monkeypatch.setattr(bp.TrainStep, "TURNS", 6)

    def train(folder: Path | None, resume: bool = False) -> tuple[Any, ...]:
        model = bp.MLP([6, 16, 3], dropout=0.2, seed=1, device="cpu")
        saved = None if folder is None else bp.Checkpoint(folder, seconds=1e9)
        history = bp.fit(
            model, X, ids, "cross_entropy", epochs=2, batch_size=8, progress=False,
            checkpoint=saved, resume=resume, schedule="one_cycle",
        )  # fmt: skip
        return model.parameters.tobytes(), history.get("loss"), history.interrupted

    with Signals(0) as counting:
        expected = train(None)
    assert counting.lines > 2 * 4 * 15  # epochs, calls, lines
    for at in range(1, counting.lines + 1, 7):
        folder = tmp_path / str(at)
        with Signals(at):
            assert train(folder)[2]
        assert train(folder, resume=True) == expected, f"line {at}"
