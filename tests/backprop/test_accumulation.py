"""Gradient accumulation on a GPU, in the emulator: the bits of one batch, and without the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from typing import Any

import numpy as np
import pytest
from backprop_kernels.cuda import tuning
from backprop_kernels.cuda.stepping import DEPTH
from backprop_kernels.losses import LOSSES

import backprop as bp
from backprop.queue import PendingLoss
from tests.cuda_host import build, cupy_stand_in
from tests.cuda_host.parts import GPUS, ROWS, Training, data, in_one_run, layers, on, same_bits

pytestmark = pytest.mark.skipif(bool(build.problem()), reason=build.problem())
BITS = "with the bits of one batch of "
ROUNDING = "as one batch of {:,} rows but for rounding, as "


@pytest.fixture(params=["late copies", "late kernels"])
def late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a stream does late."""
    monkeypatch.setattr(cupy_stand_in, "late_kernels", request.param == "late kernels")
    with on("sm_80"):
        yield


@pytest.fixture
def ampere() -> Iterator[None]:
    with on("sm_80"):
        yield


# Each kernel once; every precision, GPU and way of summing takes minutes.
SHORT = {("sm_80", None, "in runs"), ("sm_80", "bf16", "in one run"), ("sm_90", "tf32", "in runs")}


@pytest.mark.parametrize(
    ("gpu", "precision", "runs"),
    [
        pytest.param(*case, marks=[] if case in SHORT else [pytest.mark.long])
        for case in product(
            GPUS, (None, "tf32", "bf16", "bf16x3", "bf16x6"), ("in runs", "in one run")
        )
        if case[0] == "sm_80" or case[1] in ("tf32", "bf16")  # what wgmma serves
    ],
)
def test_parts_have_the_bits_of_the_whole(gpu: str, precision: str | None, runs: str) -> None:
    """With dropout of the input and of layers, before and after a norm."""
    with on(gpu), in_one_run() if runs == "in one run" else nullcontext():
        same_bits(precision=precision)


@pytest.mark.long
@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("runs", ["in runs", "in one run"])
def test_parts_in_float64(runs: str) -> None:
    with in_one_run() if runs == "in one run" else nullcontext():
        same_bits(dtype="float64")


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize(
    "loss",
    [
        n if n in ("mse", "cross_entropy") else pytest.param(n, marks=pytest.mark.long)
        for n in LOSSES
    ],
)
def test_every_loss(loss: str) -> None:
    same_bits(2, loss=loss, made_of=[bp.Linear(16, 12, "relu"), bp.Linear(12, 8)])


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize(
    "options",
    [
        {"parts": 2, "rule": lambda: bp.SGD(lr=0.1, momentum=0.9), "clip_norm": 0.1},
        {"parts": 5, "rule": lambda: bp.Adam(weight_decay=0.1, clip_tensor_norm=0.05, max_norm=1)},
        {"parts": 2, "recompute": 2},
        {"parts": 2, "made_of": layers(0.0, bp.RMSNorm)},
        {"parts": 2, "rows": 512, "made_of": [bp.Linear(16, 40, "relu"), bp.Linear(40, 8)]},
        {"parts": 2, "loss": bp.Loss("cross_entropy", label_smoothing=0.1)},
    ],
    ids=lambda options: " ".join(options),
)
def test_whatever_follows_the_gradient(options: dict[str, Any]) -> None:
    if "rows" in options:
        X, y = data(8)
        one, several = Training(whole=True, **options), Training(whole=False, **options)
        one(X, y)
        several(X, y)
        assert one.bits() == several.bits()
    else:
        same_bits(**options)


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rows": 100}, "linear_wgrad adds up 64 rows at a time, and a part has 100"),
        ({"made_of": layers(norm=bp.BatchNorm)}, "batch_norm adds up 768 rows at a time"),
        ({"weights": True}, "rows have weights"),
        ({"loss": bp.Loss("cross_entropy", class_weight=[1.0] * 8)}, "rows have weights"),
    ],
    ids=["rows", "batch norm", "weights", "class weights"],
)
def test_other_parts_say_what_differs(options: dict[str, Any], reason: str) -> None:
    weighted, rows = options.pop("weights", False), options.get("rows", ROWS)
    options = {"made_of": [bp.Linear(16, 24, "relu"), bp.Linear(24, 8)], **options}
    X, y = data(3, getattr(options.get("loss"), "name", "mse"), rows)
    weight = [np.random.default_rng(1).uniform(0, 2, len(X))] if weighted else []
    one, several = (Training(3, whole, lambda: "SGD", **options) for whole in (True, False))
    one(X, y, *weight)
    several(X, y, *weight)
    assert ROUNDING.format(3 * rows) + reason in several.step.gradients.why
    if "batch_norm" not in reason:
        one_of, several_of = (t.model.parameters.get() for t in (one, several))
        np.testing.assert_allclose(several_of, one_of, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("ampere")
def test_a_network_of_one_kernel_runs_layer_by_layer() -> None:
    small = [bp.Linear(16, 16, "relu"), bp.Linear(16, 8)]
    several = Training(2, False, made_of=small, precision="bf16")
    several(*data(2))
    assert several.step.gradients.why == (
        "layer by layer, as the gradients of several batches are added up; several batches, "
        "with the bits of one batch of 512 rows"
    )


@pytest.mark.usefixtures("late")
def test_batches_are_launched_and_not_waited_for() -> None:
    """More than may be on their way, their rate fixed by the first of a step."""
    X, y = data(3 * 7)
    rule = bp.SGD(lr=0.1)
    hurried, waiting = (Training(3, False, lambda: rule) for _ in range(2))
    results = []
    for training in (hurried, waiting):
        losses = []
        for number in range(21):
            rule.lr = 1e9 if number % 3 else 0.1 / (1 + number)  # a step has its first batch's
            cut = slice(number * ROWS, (number + 1) * ROWS)
            loss = training.step(X[cut], y[cut])
            assert training.step.pending == (number + 1) % 3
            assert training.step.steps == (number + 1) // 3
            losses.append(float(loss) if training is waiting else loss)
        if training is hurried:
            assert all(isinstance(loss, PendingLoss) for loss in losses)
            assert sum(loss.value is None for loss in losses) == DEPTH
        results.append(([float(loss) for loss in losses], training.bits()))
    assert results[0] == results[1]


def bad(X: np.ndarray, y: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A part whose input or loss is not finite."""
    X = X.copy()
    X[7, 2] = np.nan if kind == "input" else X[7, 2]
    return X, y * np.float32(1e30 if kind == "loss" else 1)


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("place", [0, pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("kind", ["input", "loss"])
def test_a_bad_part_undoes_its_step(kind: str, place: int) -> None:
    """Also the running statistics; later parts change nothing until it is known."""
    made_of = [bp.Linear(16, 24, bias=False), bp.BatchNorm(24, "relu"), bp.Linear(24, 8)]
    step, twin = (Training(3, False, made_of=made_of) for _ in range(2))
    X, y = data(9)
    for training in (step, twin):
        training(X[: 3 * ROWS], y[: 3 * ROWS])
    expected = twin.bits()
    parts = [(X[i * ROWS : (i + 1) * ROWS], y[i * ROWS : (i + 1) * ROWS]) for i in range(3, 9)]
    parts[place] = bad(*parts[place], kind)
    losses = [step.step(*part) for part in parts]
    for loss in losses[:place]:
        assert np.isfinite(float(loss))
    match = "NaN at row 7, column 2" if kind == "input" else "step 2: expected a finite loss"
    for loss in losses[place:]:
        with pytest.raises((bp.DataError, bp.NonFiniteError), match=match):
            float(loss)
    assert step.step.steps == 1 and step.step.pending == 0 and step.bits() == expected
    for training in (step, twin):
        training(X[3 * ROWS : 6 * ROWS], y[3 * ROWS : 6 * ROWS])
    assert step.bits() == twin.bits()


@pytest.mark.usefixtures("late")
def test_a_gradient_that_is_not_finite_undoes_its_step() -> None:
    """Though each batch's loss is."""
    training = Training(2, False, loss="mae", made_of=[bp.Linear(16, 4), bp.Linear(4, 8)])
    state = training.model.state_dict()
    state["layers.0.weight"][:], state["layers.1.weight"][:] = 0, 1e10
    training.model.load_state_dict(state)
    X, y = data(2)
    before = training.bits()
    losses = training(abs(X) * np.float32(1e30), y - 9)
    assert np.isfinite(float(losses[0]))
    with pytest.raises(bp.NonFiniteError, match="nothing was changed"):
        float(losses[1])
    assert training.bits() == before and training.step.steps == training.step.pending == 0


@pytest.mark.usefixtures("late")
def test_flush_makes_a_step_of_fewer_parts() -> None:
    X, y = data(5)
    several = Training(3, False, lambda: bp.SGD(lr=0.1))
    one = Training(2, True, lambda: bp.SGD(lr=0.1))
    last = [several.step(X[i : i + ROWS], y[i : i + ROWS]) for i in (0, ROWS)]
    assert several.step.pending == 2 and several.step.flush()
    assert several.step.steps == 1 and several.step.pending == 0 and not several.step.flush()
    one(X[: 2 * ROWS], y[: 2 * ROWS])
    np.testing.assert_allclose(
        several.model.parameters.get(), one.model.parameters.get(), rtol=1e-4, atol=1e-6
    )
    assert float(several.step.norm) == pytest.approx(float(one.step.norm), rel=1e-5)
    assert [loss.value is not None for loss in last] == [True, True]
    # What follows begins anew.
    again = Training(3, False, lambda: bp.SGD(lr=0.1))
    again.model.load_state_dict(several.model.state_dict())
    again.step.load_state_dict(several.step.state_dict())
    for training in (several, again):
        training(X[2 * ROWS :], y[2 * ROWS :])
    assert several.bits() == again.bits() and several.step.steps == 2


@pytest.mark.usefixtures("late")
def test_flush_finds_a_refused_part() -> None:
    X, y = data(2)
    training = Training(3, False)
    before = training.bits()
    training(X * np.float32(np.inf), y)
    with pytest.raises(bp.DataError):
        training.step.flush()
    assert training.step.pending == training.step.steps == 0 and training.bits() == before
    assert not training.step.flush()


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize(
    "there", [pytest.param(n, marks=[pytest.mark.long] * (n != 2)) for n in range(4)]
)
def test_a_state_within_a_step_goes_on_with_the_same_bits(there: int) -> None:
    X, y = data(6)
    made_of = [bp.Linear(16, 24), bp.BatchNorm(24, "relu"), bp.Dropout(0.5), bp.Linear(24, 8)]
    straight, first, second = (Training(3, False, made_of=made_of) for _ in range(3))
    straight(X, y)
    first.step.update.lr_factor = 1.0
    first(X[: there * ROWS], y[: there * ROWS])
    first.step.update.lr_factor = 1.0 if there % 3 == 0 else 7.0  # of the step after this one
    state, model = first.step.state_dict(), first.model.state_dict()
    first(X[:ROWS], y[:ROWS])  # is forgotten
    for training in (first, second):
        training.model.load_state_dict(model)
        training.step.load_state_dict(state)
        assert training.step.pending == there % 3 and training.step.steps == there // 3
        assert training.step.update.lr_factor == state["lr_factor"]
        end = -(-max(there, 1) // 3) * 3 * ROWS
        training(X[there * ROWS : end], y[there * ROWS : end])
        training.step.update.lr_factor = 1.0
        training(X[end:], y[end:])
        assert training.bits() == straight.bits()


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda")], ids="-".join)
def test_a_state_within_a_step_goes_on_elsewhere(devices: tuple[str, str]) -> None:
    """But for rounding."""
    X, y = data(3, rows=40)

    def new(device: str) -> bp.TrainStep:
        model = bp.MLP([16, 24, 8], device=device)
        return bp.TrainStep(model, "mse", bp.SGD(lr=0.1), 40, accumulate=3)

    one, other, straight = (new(device) for device in (*devices, devices[1]))
    for i in range(3):
        cut = slice(i * 40, i * 40 + 40)
        straight(X[cut], y[cut])
        if i == 2:
            other.model.load_state_dict(one.model.state_dict())
            other.load_state_dict(one.state_dict())
        (other if i == 2 else one)(X[cut], y[cut])
    assert other.steps == 1
    for name, value in straight.model.state_dict().items():
        np.testing.assert_allclose(other.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("ampere")
def test_where_there_is_no_more_room_the_host_adds_the_rest() -> None:
    X, y = data(3)
    one, other = (Training(3, False, lambda: bp.SGD(lr=0.1), made_of=layers(0)) for _ in range(2))
    one(X, y)
    other(X[:ROWS], y[:ROWS])
    other.step._make_room()
    other(X[ROWS:], y[ROWS:])
    assert other.step.steps == 1
    np.testing.assert_allclose(
        other.model.parameters.get(), one.model.parameters.get(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.usefixtures("ampere")
def test_autotune_leaves_it_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest kernel for a part may be another one than for the whole."""
    monkeypatch.setattr(tuning, "_fastest", lambda found: found[0])
    X, y = data(1)
    for autotune, kind in ((True, float), (False, PendingLoss)):
        (loss,) = Training(2, False, autotune=autotune)(X, y)
        assert type(loss) is kind
