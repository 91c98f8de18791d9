"""The table of phases: every operator once, in order, and nothing lost between it and the step."""

from __future__ import annotations

import numpy as np
import pytest
from backprop_kernels.cpu import peaks

import backprop as bp

rng = np.random.default_rng(0)
X, ids = rng.standard_normal((96, 20)).astype(np.float32), rng.integers(0, 5, 96)


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ones take seconds and most of a gigabyte."""
    monkeypatch.setattr(peaks, "flops", lambda dtype: 2e11)
    monkeypatch.setattr(peaks, "bandwidth", lambda: 2e10)


def new_step(**options: object) -> bp.TrainStep:
    return bp.TrainStep(bp.MLP([20, 30, 30, 5]), "cross_entropy", "Adam", 96, **options)  # type: ignore[arg-type]


def test_phases_are_the_operators_in_order_and_sum_to_the_step() -> None:
    result = bp.profile(new_step(), X, ids, seconds=0.05)
    assert [(p.operator, p.shape, p.flops) for p in result.phases] == [
        ("linear_forward", "96 x 20 x 30", 2 * 96 * 20 * 30),
        ("linear_forward", "96 x 30 x 30", 2 * 96 * 30 * 30),
        ("linear_forward", "96 x 30 x 5", 2 * 96 * 30 * 5),
        ("loss", "96 x 5", 0),
        ("linear_dgrad", "96 x 5 x 30", 2 * 96 * 5 * 30),
        ("linear_dgrad", "96 x 30 x 30", 2 * 96 * 30 * 30),
        ("linear_wgrad", "5 x 96 x 30", 2 * 96 * 5 * 30),
        ("linear_wgrad", "30 x 96 x 30", 2 * 96 * 30 * 30),
        ("linear_wgrad", "30 x 96 x 20", 2 * 96 * 30 * 20),
        ("optimizer_step", "1760 x 1", 0),
    ]
    assert result.phases[0].bytes == 4 * (96 * 20 + 30 * 20 + 30 + 96 * 30)  # X W b Y
    assert all(p.seconds > 0 for p in result.phases)
    assert 0 < result.rest < result.seconds
    assert sum(p.seconds for p in result.phases) + result.rest == pytest.approx(result.seconds)
    lines = str(result).splitlines()
    assert len(lines) == 1 + 10 + 3 and lines[-2].split()[::2] == ["step", "100.0%"]


def test_profiling_leaves_no_trace() -> None:
    model = bp.MLP([20, 30, 5], norm="batch", dropout=0.2, activation="gelu")
    step = bp.TrainStep(model, "cross_entropy", "AdamW", 96, clip_norm=1.0)
    twin = bp.TrainStep(
        bp.MLP([20, 30, 5], norm="batch", dropout=0.2, activation="gelu"), "cross_entropy",
        "AdamW", 96, clip_norm=1.0,
    )  # fmt: skip
    weight = rng.random(96)
    assert step(X, ids, weight) == twin(X, ids, weight)
    result = bp.profile(step, X[:50], ids[:50], weight[:50], seconds=0.02)
    assert [p.operator for p in result.phases][:2] == ["linear_forward", "batch_norm_forward"]
    assert step.steps == 1
    for _ in range(2):
        assert step(X, ids, weight) == twin(X, ids, weight)
    for name, value in twin.model.state_dict().items():
        assert np.array_equal(model.state_dict()[name], value), name


def test_accumulating_step_and_one_of_spans_are_profiled() -> None:
    for step in (new_step(accumulate=3), new_step(clip_norm=0.1)):
        assert bp.profile(step, X, ids, seconds=0.02).phases[-1].operator == "optimizer_step"


def test_what_cannot_be_profiled() -> None:
    with pytest.raises(bp.KindError, match="profile: step: expected a TrainStep, got MLP"):
        bp.profile(bp.MLP([2, 1]), X, ids)  # type: ignore[arg-type]
    reference = bp.TrainStep(bp.MLP([20, 5], device="reference"), "cross_entropy", "Adam", 96)
    with pytest.raises(bp.KindError, match='expected a model on device="cpu"'):
        bp.profile(reference, X, ids)
    for seconds in (0, -1, float("nan")):
        with pytest.raises(bp.OptionError, match="profile: seconds: expected a number > 0"):
            bp.profile(new_step(), X, ids, seconds=seconds)
    with pytest.raises(bp.ShapeError, match="profile: X"):
        bp.profile(new_step(), X[:, :3], ids)


def test_peaks_are_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(peaks, "MEMORY_BYTES", 2**22)
    # No CPU of this decade does less, none of the next does more, on up to 1024 threads.
    assert 1e8 < peaks._flops("float64", 1) < 1e15
    assert 1e7 < peaks._bandwidth.__wrapped__(1) < 1e14
