"""Steps that are launched and not waited for, in the emulator: what is read is what was computed.

Each test runs twice: with copies as late as anyone may see, and with kernels as late.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from backprop_kernels.arrays import Array
from backprop_kernels.cuda.memory import Turn
from backprop_kernels.cuda.stepping import DEPTH
from backprop_kernels.optimizers import OPTIMIZERS

import backprop as bp
from backprop.queue import LossSum, PendingLoss
from tests.cuda_host import cupy_stand_in

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((40, 6)).astype(np.float32), RNG.integers(0, 3, 40)


@pytest.fixture(autouse=True, params=["late copies", "late kernels"])
def late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, emulator: None) -> None:
    """What a stream does late."""
    monkeypatch.setattr(cupy_stand_in, "late_kernels", request.param == "late kernels")


def late_kernels() -> bool:
    return cupy_stand_in.late_kernels


def training(device: str = "cuda", rule: str | bp.Optimizer = "AdamW") -> bp.TrainStep:
    layers = [bp.Linear(6, 16), bp.BatchNorm(16, "relu"), bp.Dropout(0.25), bp.Linear(16, 3)]
    model = bp.Sequential(layers, device=device)
    return bp.TrainStep(model, "cross_entropy", rule, batch_size=40, clip_norm=0.5)


def bits(step: bp.TrainStep) -> list[bytes]:
    values = [*step.model.state_dict().values(), *step.state_dict()["moments"].values()]
    return [value.tobytes() for value in values]


def batches(count: int = 9) -> list[Array]:
    return [RNG.standard_normal((40 - i % 3, 6)).astype(np.float32) for i in range(count)]


def waiting(step: bp.TrainStep, data: list[Array]) -> list[float]:
    return [float(step(x, Y[: len(x)])) for x in data]


def hurried(step: bp.TrainStep, data: list[Array]) -> list[float]:
    """All batches through one array of the caller's, no loss looked at before the last."""
    own, losses = np.empty((40, 6), np.float32), []
    for x in data:
        own[: len(x)] = x
        losses.append(step(own[: len(x)], Y[: len(x)]))
    return [float(loss) for loss in losses]


def test_a_step_is_launched_and_not_waited_for() -> None:
    step = training()
    loss = step(X, Y)
    assert isinstance(loss, PendingLoss) and repr(loss) == "PendingLoss()" and step.steps == 1
    assert float(loss) == loss == waiting(training(), [X])[0]
    assert f"{loss:.3f}" == f"{float(loss):.3f}" and np.isfinite(loss) and loss < loss + 1


def test_rate_may_change_every_step() -> None:
    results = []
    for losses in (waiting, hurried):
        rule = bp.SGD(lr=0.1)
        step = training(rule=rule)
        for number in range(DEPTH + 5):
            rule.lr = 0.1 / (1 + number)
            loss = step(X, Y)
            if losses is waiting:
                float(loss)
        results.append((float(loss), bits(step)))
    assert results[0] == results[1]


def test_no_batch_is_read_before_it_came_or_overwritten_while_it_is_read() -> None:
    data = batches(DEPTH + 5)
    one, other = training(), training()
    assert waiting(one, data) == hurried(other, data)
    assert bits(one) == bits(other)


HAZARDS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "pinned memory filled while it is copied": lambda patch: patch.setattr(
        cupy_stand_in.Event, "synchronize", lambda self: None
    ),
    "kernels before their batch": lambda patch: patch.setattr(
        Turn, "take", lambda turn: [buffer[: turn.rows] for buffer in turn.buffers]
    ),
    "a batch over one that is read": lambda patch: patch.setattr(
        Turn, "release", lambda turn: None
    ),
}


@pytest.mark.parametrize("hazard", HAZARDS)
def test_ordering_bug_is_noticed(hazard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the mode that can show it: a copy too late, or a kernel."""
    if (hazard == "a batch over one that is read") != late_kernels():
        return
    data = batches()
    expected = waiting(training(), data)
    HAZARDS[hazard](monkeypatch)
    with suppress(bp.BackpropError):  # what it trained on was no batch at all
        assert hurried(training(), data) != expected


def test_losses_and_weights_are_those_of_the_cpu() -> None:
    data = batches()
    cuda, cpu = training(), training("cpu")
    bound = 64 * len(data) * np.finfo(np.float32).eps
    np.testing.assert_allclose(hurried(cuda, data), waiting(cpu, data), rtol=bound)
    for name, value in cpu.model.state_dict().items():
        np.testing.assert_allclose(
            cuda.model.state_dict()[name], value, atol=64 * bound, err_msg=name
        )


def test_nothing_is_uploaded_but_what_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = bp.AdamW(lr=1e-3)
    step, uploads = training(rule=rule), []
    there = [cupy_stand_in.asarray(a) for a in (X, Y)]
    step.run(*there)
    put, copy = cupy_stand_in.ndarray.set, cupy_stand_in.Pointer.copy_from_host_async
    monkeypatch.setattr(
        cupy_stand_in.ndarray, "set", lambda *given: uploads.append("waits") or put(*given)
    )
    monkeypatch.setattr(
        cupy_stand_in.Pointer,
        "copy_from_host_async",
        lambda *given: uploads.append(given[2]) or copy(*given),
    )
    for _ in range(5):
        step.run(*there)
    assert uploads == []
    rule.lr = 5e-4
    for _ in range(5):
        step.run(*there)
    assert uploads == [8]  # bytes
    assert step.steps == 11 and np.isfinite(step.loss)


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("grouped", [False, True])
def test_device_makes_the_scalars_of_its_step(rule: str, grouped: bool) -> None:
    options = {"groups": {"layers.0": {"lr_scale": 0.3}}} if grouped else {}
    optimizer = bp.Optimizer(rule, weight_decay=0.1, **options)
    step = training(rule=optimizer)
    for number in (1, 2, 100, 12345):
        step.load_state_dict({**step.state_dict(), "steps": number - 1})
        float(step(X, Y))
        made = step.update._placed.get()
        step.update.prepare(number)
        np.testing.assert_allclose(made, step.update.scalars, rtol=8 * np.finfo(float).eps)


def test_limits_on_tensors_and_neurons_are_part_of_the_step() -> None:
    """As the reference applies them, the host looking at nothing; a refused step limits nothing."""

    def limited(device: str = "cuda") -> bp.TrainStep:
        options = {"lr": 0.3, "momentum": 0.9, "clip_tensor_norm": 0.05, "max_norm": 0.4}
        return training(device, bp.SGD(**options, groups={"layers.1": {"max_norm": 0.5}}))

    data, step, other, twin = batches(5), limited(), limited(), limited("reference")
    before = bits(step)
    refused = step(np.full_like(X, np.nan), Y)
    with pytest.raises(bp.DataError):
        float(refused)
    assert bits(step) == before  # rows that were too long from the start are as they were
    losses = hurried(step, data)
    assert losses == waiting(other, data) and bits(step) == bits(other)
    np.testing.assert_allclose(losses, waiting(twin, data), rtol=1e-5)
    for name, value in twin.model.state_dict().items():
        np.testing.assert_allclose(step.model.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    lengths = np.linalg.norm(step.model.state_dict()["layers.0.weight"], axis=1)
    assert (lengths <= 0.4 * (1 + 1e-6)).all() and (lengths > 0.399).any()


def test_after_a_refused_step_nothing_changes_until_it_is_known() -> None:
    step, twin = training(), training()
    good, bad = batches(), X.copy()
    bad[7, 2] = np.nan
    waiting(step, good[:3])
    waiting(twin, good[:3])
    refused = step(bad, Y)
    later = [step(x, Y[: len(x)]) for x in good[3:5]]
    assert step.steps == 6  # as far as anyone knows
    for loss in (later[1], refused, later[0]):
        with pytest.raises(bp.DataError, match=r"TrainStep: X: .* NaN at row 7, column 2"):
            float(loss)
    assert step.steps == 3 and bits(step) == bits(twin)
    assert waiting(step, good[3:]) == waiting(twin, good[3:]) and bits(step) == bits(twin)


def test_a_refused_step_nobody_asked_about_stops_a_later_one() -> None:
    step = training()
    step(X * np.float32(np.inf), Y)
    with pytest.raises(bp.DataError):
        for _ in range(DEPTH):
            step(X, Y)
    assert step.steps == 0
    step(X * np.float32(np.inf), Y)
    with pytest.raises(bp.DataError):
        step.state_dict()


def test_going_back_forgets_what_is_on_its_way() -> None:
    step = training()
    waiting(step, batches(2))
    state, model = step.state_dict(), step.model.state_dict()
    before = bits(step)
    step(X, Y)
    step(X * np.float32(np.nan), Y)
    step.load_state_dict(state)
    step.model.load_state_dict(model)
    assert step.steps == 2 and bits(step) == before
    assert np.isfinite(step(X, Y)) and step.steps == 3


def test_fit_looks_at_no_loss_before_the_epoch_ends() -> None:
    known = []

    class Watch(bp.Callback):
        def step_end(self, training: object) -> None:
            known.append(training.loss.value)  # type: ignore[attr-defined]

    model = bp.MLP([6, 8, 3], device="cuda")
    history = bp.fit(
        model, X, Y, loss="cross_entropy", epochs=2, batch_size=8, callbacks=[Watch()],
        progress=False,
    )  # fmt: skip
    assert known == [None] * 10
    twin = bp.MLP([6, 8, 3], device="cpu")
    expected = bp.fit(twin, X, Y, loss="cross_entropy", epochs=2, batch_size=8, progress=False)
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-5)


def test_sum_of_losses_has_the_bits_of_adding_in_order() -> None:
    values = RNG.random(50)
    pending = [PendingLoss(i, (), lambda: None) for i in range(50)]
    total, expected = LossSum(0.1), 0.1
    for i, (loss, value) in enumerate(zip(pending, values, strict=True)):
        total, expected = total.plus(i, loss), expected + i * value
    for loss, value in zip(pending, values, strict=True):
        loss.value = float(value)
    assert float(total) == float(total.plus(0, 1.0)) == expected
