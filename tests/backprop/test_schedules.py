"""Every schedule against its closed form, and in a fit."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi
from typing import Any

import numpy as np
import pytest

import backprop as bp
from backprop.schedules import SCHEDULES

rng = np.random.default_rng(0)
X, y = rng.standard_normal((40, 3)), rng.standard_normal(40)

# schedule, total epochs, {epochs passed: factor}
POINTS: list[tuple[bp.Schedule, float, dict[float, float]]] = [
    (bp.Schedule("constant"), 10, {0: 1, 3.7: 1, 10: 1}),
    (bp.Schedule("step", every=3, gamma=0.5), 10, {0: 1, 2.99: 1, 3: 0.5, 5: 0.5, 6: 0.25}),
    (bp.Schedule("exponential", gamma=0.9), 10, {0: 1, 1: 0.9, 2.5: 0.9**2.5, 10: 0.9**10}),
    (bp.Schedule("cosine"), 8, {0: 1, 2: 0.5 + 0.5 / 2**0.5, 4: 0.5, 8: 0, 9: 0}),
    (bp.Schedule("cosine", end=0.2), 8, {0: 1, 4: 0.6, 8: 0.2}),
    (
        bp.Schedule("cosine", period=2, growth=2),  # restarts at 2, 6, 14
        14,
        {0: 1, 1: 0.5, 2: 1, 4: 0.5, 5: 0.5 - 0.5 / 2**0.5, 6: 1, 10: 0.5, 14: 1},
    ),
    (
        bp.Schedule("one_cycle", peak=0.25, start=0.2, end=0.01),
        8,
        {0: 0.2, 1: 0.6, 2: 1, 5: 0.505, 8: 0.01},
    ),
    (bp.Schedule("step", every=2, gamma=0.1, warmup=3), 9, {1.5: 0.5, 3: 1, 4.9: 1, 5: 0.1}),
    (bp.Schedule("cosine", warmup=2), 10, {0: 0, 1: 0.5, 2: 1, 6: 0.5, 10: 0}),
    (bp.Schedule(lambda t: 1 / (1 + t)), 5, {0: 1, 1: 0.5, 3: 0.25}),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "total", "points"), POINTS)
def test_factor_at_points(schedule: bp.Schedule, total: float, points: dict[float, float]) -> None:
    for t, expected in points.items():
        assert schedule.factor(t, total) == pytest.approx(expected, rel=1e-12, abs=1e-15), t


def test_points_cover_the_table() -> None:
    curves = {schedule.curve for schedule, *_ in POINTS}
    assert all(row.factor in curves for row in SCHEDULES.values())


class Rates(bp.Callback):
    """The learning rate of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def step_end(self, training: bp.Training) -> None:
        self.rates.append(training.step.lr)


def rates(device: str, **options: Any) -> list[float]:
    watch = Rates()
    bp.fit(
        bp.MLP([3, 4, 1], device=device), X, y, optimizer=bp.SGD(lr=0.5), batch_size=10,
        progress=False, callbacks=[watch], **options,
    )  # fmt: skip
    return watch.rates


def test_every_step_has_its_rate(device: str) -> None:
    steps = np.arange(12) / 4
    np.testing.assert_allclose(
        rates(device, epochs=3, schedule="cosine"), 0.25 * (1 + np.cos(np.pi * steps / 3))
    )
    np.testing.assert_allclose(rates(device, epochs=3, schedule=lambda t: 2**-t), 0.5 * 2.0**-steps)
    warm = bp.Schedule("constant", warmup=1.5)
    expected = [*np.arange(1, 7) / 12, *[0.5] * 6]  # no step is wasted at 0
    np.testing.assert_allclose(rates(device, epochs=3, schedule=warm), expected)


def test_warm_up_counts_the_rows_of_an_accumulated_step(device: str) -> None:
    rates = []

    class Watch(bp.Callback):
        def step_begin(self, training: bp.Training) -> None:
            if not training.step.pending:
                rates.append(training.step.lr)

    bp.fit(
        bp.MLP([2, 1], device=device), np.ones((16, 2)), np.ones(16), "mse", bp.SGD(lr=1.0),
        epochs=3, batch_size=4, accumulate=2, progress=False, callbacks=[Watch()],
        schedule=bp.Schedule("constant", warmup=2),
    )  # fmt: skip
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75, 1, 1, 1])  # a step is half an epoch


def test_schedule_scales_what_a_callback_sets_and_leaves_lr_alone(device: str) -> None:
    rule = bp.SGD(lr=0.5)

    def halve(epoch: int, history: bp.History) -> None:
        rule.lr /= 2

    history = bp.fit(
        bp.MLP([3, 4, 1], device=device), X, y, optimizer=rule, epochs=3, batch_size=40,
        schedule=bp.Schedule("exponential", gamma=0.1), callbacks=[halve], progress=False,
    )  # fmt: skip
    np.testing.assert_allclose(history["lr"], [0.5, 0.025, 0.00125])
    assert rule.lr == 0.0625


def test_scheduled_step_is_the_step_at_that_rate(device: str) -> None:
    """Adam and decoupled decay read the scheduled rate everywhere."""
    one, other = (bp.MLP([3, 4, 1], dtype="float64", device=device) for _ in range(2))
    bp.fit(one, X, y, optimizer=bp.AdamW(lr=0.1), schedule=lambda t: 0.25, epochs=3, progress=False)
    bp.fit(other, X, y, optimizer=bp.AdamW(lr=0.025), epochs=3, progress=False)
    assert one.parameters.tobytes() == other.parameters.tobytes()


def plateau(values: list[float], **options: Any) -> list[float]:
    """The scale after each epoch whose val_loss is given."""
    schedule, history = bp.Plateau(**options), bp.History()
    step = bp.TrainStep(bp.MLP([3, 1], device="reference"))
    training = bp.Training(step.model, step, history, len(values), 1, ("loss", "val_loss"))
    schedule.fit_begin(training)
    scales = []
    for epoch, value in enumerate(values):
        training.epoch = epoch
        schedule.steps_begin(training)
        history.append(val_loss=value)
        schedule.epoch_end(training)
        scales.append(schedule.scale)
    return scales


def test_plateau_reduces_after_patience_and_counts_anew() -> None:
    values = [1.0, 0.9, 0.9, 0.9, 0.9, 0.9, 0.5, 0.6, 0.6]
    expected = [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]
    assert plateau(values, factor=0.5, patience=2) == expected
    assert plateau(values, factor=0.5, patience=2, lowest=0.3) == [*expected[:5], *[0.3] * 4]
    assert plateau([1, 0.95, 0.85], factor=0.5, patience=1, min_delta=0.1) == [1, 0.5, 0.5]
    assert plateau([1, 2, 3], factor=0.5, patience=1, mode="max") == [1, 1, 1]


def test_plateau_in_a_fit(device: str) -> None:
    """Nothing improves at lr 0: a reduction an epoch, from the second on."""
    history = bp.fit(
        bp.MLP([3, 4, 1], device=device), X, y, optimizer=bp.SGD(lr=1e-30), epochs=5, batch_size=20,
        schedule=bp.Plateau("loss", factor=0.1, patience=1, min_delta=1e-3), progress=False,
    )  # fmt: skip
    np.testing.assert_allclose(history["lr"], [1e-30, 1e-30, 1e-31, 1e-32, 1e-33])


def test_plateau_goes_on_from_its_state() -> None:
    first, second = bp.Plateau(), bp.Plateau()
    first.scale, first.monitor.best, first.monitor.epochs_since = 0.25, 0.5, 2
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict() == {
        "scale": 0.25, "monitor": {"best": 0.5, "epochs_since": 2},
    }  # fmt: skip


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: bp.Schedule("linear"),
        "Schedule: curve: expected one of constant, step, exponential, cosine, one_cycle, plateau; "
        "got 'linear'",
    ),
    (
        lambda: bp.Schedule("cosine", gamma=0.1),
        "Schedule: expected options warmup, period, growth, end; got 'gamma'",
    ),
    (lambda: bp.Schedule("step", every=0), "Schedule: every: expected a number > 0, got 0"),
    (
        lambda: bp.Schedule("one_cycle", peak=1),
        "Schedule: peak: expected a number below 1, got 1",
    ),
    (
        lambda: bp.Schedule("cosine", period=2, growth=0.5),
        "Schedule: growth: expected at least 1, got 0.5",
    ),
    (
        lambda: bp.Schedule("plateau"),
        "Schedule: curve: plateau watches the history: use Plateau(…)",
    ),
    (
        lambda: rates("reference", schedule=bp.Schedule("cosine", warmup=1), epochs=1),
        "Schedule: warmup: expected less than the 1 epochs of the fit, got 1",
    ),
    (
        lambda: rates("reference", schedule=lambda t: -t - 1),
        "Schedule: curve: expected factors ≥ 0, got -1.0 after 0 epochs",
    ),
    (lambda: bp.Plateau(factor=1), "Plateau: factor: expected a number below 1, got 1"),
    (
        lambda: rates("reference", schedule=bp.Plateau()),
        "Plateau: monitor: expected validation rows for 'val_loss', got none; give fit an eval_set "
        'or a validation_fraction, or monitor "loss"',
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[m[:60] for _, m in REFUSED])
def test_refusal(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(bp.OptionError) as error:
        call()
    assert str(error.value) == message


def test_cosine_is_the_one_of_its_page() -> None:
    for t in np.linspace(0, 5, 11):
        assert bp.Schedule("cosine").factor(t, 5) == pytest.approx((1 + cos(pi * t / 5)) / 2)
