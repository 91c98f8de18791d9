"""What callbacks are told and when; early stopping; averaging; noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import backprop as bp
from backprop.memory import HOST
from backprop.noise import InputNoise
from tests.inputs import on_host

rng = np.random.default_rng(0)
X, y = rng.standard_normal((32, 5)), rng.standard_normal(32)
held_out = rng.standard_normal((20, 5)), rng.standard_normal(20)


def small(device: str, dtype: str = "float64") -> bp.Sequential:
    return bp.MLP([5, 8, 1], "tanh", dtype=dtype, device=device)


def fit(model: bp.Sequential, **options: Any) -> bp.History:
    return bp.fit(model, X, y, **{"batch_size": 12, "progress": False, **options})


class Recorder(bp.Callback):
    """Writes down every event."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def fit_begin(self, training: bp.Training) -> None:
        self.events.append(("begin", training.names, training.rows, training.epochs))

    def step_begin(self, training: bp.Training) -> None:
        self.events.append(("<", training.position, training.step.steps))

    def step_end(self, training: bp.Training) -> None:
        self.events.append((">", training.done, training.step.steps))

    def epoch_end(self, training: bp.Training) -> None:
        self.events.append(("epoch", training.epoch, training.history.epochs))

    def fit_end(self, training: bp.Training) -> None:
        self.events.append("end")


def test_events_come_in_order(device: str) -> None:
    recorder = Recorder()
    fit(small(device), epochs=2, callbacks=[recorder], eval_set={"a": held_out}, metrics="mae")
    step = [
        ("<", 0.0, 0),
        (">", 12, 1),
        ("<", 0.375, 1),
        (">", 24, 2),
        ("<", 0.75, 2),
        (">", 32, 3),
    ]
    again = [(s, at + (1.0 if s == "<" else 0), n + 3) for s, at, n in step]
    names = ("loss", "lr", "a_loss", "a_mae", "seconds")
    assert recorder.events == [
        ("begin", names, 32, 2), *step, ("epoch", 0, 1), *again, ("epoch", 1, 2), "end",
    ]  # fmt: skip


def test_accumulated_batches_are_told_apart_from_steps(device: str) -> None:
    recorder = Recorder()
    fit(small(device), epochs=1, callbacks=[recorder], accumulate=2)
    ends = [event for event in recorder.events if event[0] == ">"]
    assert ends == [(">", 12, 0), (">", 24, 1), (">", 32, 1), (">", 32, 2)]  # the last: flushed


def test_a_callback_ends_the_fit_and_is_told_of_its_end(device: str) -> None:
    class Stop(Recorder):
        def epoch_end(self, training: bp.Training) -> None:
            training.stop = training.epoch == 1

    recorder = Stop()
    assert fit(small(device), epochs=9, callbacks=[recorder]).epochs == 2
    assert recorder.events[-1] == "end"

    class Fail(Recorder):
        def step_end(self, training: bp.Training) -> None:
            raise ZeroDivisionError

    failing = Fail()
    with pytest.raises(ZeroDivisionError):
        fit(small(device), callbacks=[failing])
    assert failing.events[-1] == "end"


def losses(monitor: bp.EarlyStopping, values: list[float], key: str) -> int:
    """Feed values to early stopping as a fit would; the number of epochs it lasted."""
    model = small("reference")
    step = bp.TrainStep(model)
    history = bp.History()
    training = bp.Training(model, step, history, len(values), 1, ("loss", key))
    monitor.fit_begin(training)
    for epoch, value in enumerate(values):
        training.epoch = epoch
        model.parameters[0] = epoch
        history.append(loss=1.0, **{key: value})
        monitor.epoch_end(training)
        if training.stop:
            break
    monitor.fit_end(training)
    assert (
        monitor.best_epoch is None
        or not monitor.restore_best
        or (model.parameters[0] == monitor.best_epoch)
    )
    return training.epoch + 1


def test_patience_counts_epochs_without_improvement() -> None:
    values = [3.0, 2.0, 2.5, 2.1, 1.9, 2.0, 2.0, 2.0, 0.0]
    for patience, lasted, best in ((1, 3, 1), (2, 4, 1), (3, 8, 4), (4, 9, 8)):
        stopping = bp.EarlyStopping(patience=patience)
        assert losses(stopping, values, "val_loss") == lasted
        assert stopping.best_epoch == best


def test_min_delta_and_mode() -> None:
    slow = [1.0, 0.95, 0.91, 0.89]
    stopping = bp.EarlyStopping(min_delta=0.1, patience=2)
    assert losses(stopping, slow, "val_loss") == 3 and stopping.best_epoch == 0
    for key, mode in (("val_auc", "auto"), ("val_loss", "max"), ("accuracy", "auto")):
        rising = bp.EarlyStopping(key, patience=2, mode=mode)
        assert losses(rising, [0.1, 0.2, 0.3, 0.2, 0.2, 0.9], key) == 5 and rising.best_epoch == 2
    for key, mode in (("a_log_loss", "auto"), ("val_auc", "min")):
        falling = bp.EarlyStopping(key, patience=1, mode=mode)
        assert losses(falling, [0.3, 0.2, 0.3], key) == 3 and falling.best_epoch == 1


def test_nan_is_no_improvement() -> None:
    stopping = bp.EarlyStopping(patience=2)
    nan = float("nan")
    assert losses(stopping, [nan, 1.0, nan, nan, 0.5], "val_loss") == 4
    assert stopping.best_epoch == 1


def test_the_best_epoch_is_restored_bit_for_bit(device: str) -> None:
    seen: list[dict[str, Any]] = []
    model = bp.MLP([5, 64, 1], norm="batch", device=device)
    history = fit(
        model, epochs=40, eval_set=held_out, early_stopping=3, optimizer=bp.Adam(lr=0.03),
        callbacks=[lambda epoch, history: seen.append(model.state_dict())],
    )  # fmt: skip
    best = int(np.argmin(history["val_loss"]))
    assert history.epochs == best + 4 < 40
    for name, value in model.state_dict().items():
        assert value.tobytes() == seen[best][name].tobytes()
        assert value.tobytes() != seen[-1][name].tobytes()
    kept = bp.MLP([5, 64, 1], norm="batch", device=device)
    fit(
        kept, epochs=40, eval_set=held_out, optimizer=bp.Adam(lr=0.03),
        early_stopping=bp.EarlyStopping(patience=3, restore_best=False),
    )  # fmt: skip
    assert kept.state_dict()["layers.0.weight"].tobytes() == seen[-1]["layers.0.weight"].tobytes()


def test_early_stopping_goes_on_from_its_state() -> None:
    values = [3.0, 2.0, 2.5, 2.1]
    first, second = bp.EarlyStopping(patience=4), bp.EarlyStopping(patience=4)
    losses(first, values, "val_loss")
    second.load_state_dict(first.state_dict())
    second.restore_best = False
    assert losses(second, [2.2, 2.0, 1.0], "val_loss") == 2  # two more, none below 2


def test_early_stopping_restores_a_best_epoch_from_before_its_state_was_taken(device: str) -> None:
    first, second = bp.EarlyStopping("loss"), bp.EarlyStopping("loss")
    best, other = small(device), bp.MLP([5, 8, 1], "tanh", dtype="float64", device=device, seed=1)
    fit(best, early_stopping=first)
    second.load_state_dict(first.state_dict())
    second.monitor.best = 0.0  # so no later epoch is better
    fit(other, early_stopping=second)
    for name, value in best.state_dict().items():
        assert other.state_dict()[name].tobytes() == value.tobytes()


def test_ema_is_the_average_written_out(device: str) -> None:
    decay, path = 0.75, []

    class Path(bp.Callback):
        def step_end(self, training: bp.Training) -> None:
            path.append(on_host(training.model).copy())

    model, plain = small(device), small(device)
    start = on_host(model).copy()
    history = fit(model, epochs=3, ema=decay, callbacks=[Path()], eval_set=held_out)
    averaged = list(path)
    path.clear()
    fit(plain, epochs=3, callbacks=[Path()])
    assert [p.tobytes() for p in path] == [p.tobytes() for p in averaged]  # training goes on alike
    average = start
    for p in path:
        average = decay * average + (1 - decay) * p
    np.testing.assert_allclose(on_host(model), average, rtol=1e-12, atol=1e-14)
    expected = ((model.predict(held_out[0])[:, 0] - held_out[1]) ** 2).mean()
    assert history["val_loss"][-1] == pytest.approx(expected, rel=1e-12)


def test_ema_counts_steps_and_not_batches(device: str) -> None:
    model, start = small(device), on_host(small(device))
    seen = []

    class After(bp.Callback):
        def step_end(self, training: bp.Training) -> None:
            seen.append((training.step.steps, on_host(training.model).copy()))

    fit(model, epochs=2, accumulate=3, ema=0.5, callbacks=[After()])
    assert [n for n, _ in seen] == [0, 0, 1, 1, 1, 2]
    first, second = seen[2][1], seen[5][1]
    np.testing.assert_allclose(on_host(model), start / 4 + first / 4 + second / 2, rtol=1e-13)


def test_noise_has_its_width_and_is_a_function_of_seed_and_batch() -> None:
    still = np.zeros((500, 40), np.float32)
    noise, twin = (InputNoise(0.5, (500, 40), np.float32, HOST, 7) for _ in range(2))
    first = noise(still, 0).copy()
    assert abs(first.std() - 0.5) < 0.01 and abs(first.mean()) < 0.02
    assert np.array_equal(twin(still, 0), first) and not np.array_equal(noise(still, 1), first)
    other = InputNoise(0.5, (500, 40), np.float32, HOST, 8)
    assert not np.array_equal(other(still, 0), first)
    assert not still.any()
    assert np.array_equal(noise(still[:3] + 1, 0), first[:3] + 1)


def test_input_noise_trains_like_a_penalty_on_the_slope(device: str) -> None:
    """E (w (x + σe) − t)² = (w x − t)² + σ² w²: the best w is E x t / (E x² + σ²), here 1/2."""
    x = np.where(np.arange(2000) % 2, 1.0, -1.0)[:, None]
    model = bp.Sequential([bp.Linear(1, 1, bias=False)], dtype="float64", device=device)
    rule = bp.SGD(lr=0.02)
    bp.fit(model, x, x, "mse", rule, 8, 50, input_noise=1.0, progress=False, schedule="cosine")
    assert abs(model.state_dict()["layers.0.weight"][0, 0] - 0.5) < 0.03


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: fit(small("reference"), early_stopping=True),
        "EarlyStopping: monitor: expected validation rows for 'val_loss', got none; give fit an "
        'eval_set or a validation_fraction, or monitor "loss"',
    ),
    (
        lambda: fit(
            small("reference"), early_stopping=bp.EarlyStopping("val_acc"), eval_set=held_out
        ),
        "EarlyStopping: monitor: expected one of loss, lr, val_loss, seconds; got 'val_acc'",
    ),
    (
        lambda: fit(small("reference"), early_stopping=0),
        "EarlyStopping: patience: expected an integer ≥ 1, got 0",
    ),
    (
        lambda: fit(small("reference"), early_stopping="yes"),
        "fit: early_stopping: expected True, a number of epochs or an EarlyStopping, got 'yes'",
    ),
    (
        lambda: bp.EarlyStopping(mode="up"),
        "EarlyStopping: mode: expected one of auto, min, max; got 'up'",
    ),
    (
        lambda: bp.EarlyStopping(min_delta=-1),
        "EarlyStopping: min_delta: expected a number ≥ 0, got -1",
    ),
    (lambda: fit(small("reference"), ema=1.0), "EMA: decay: expected a number in [0, 1), got 1.0"),
    (
        lambda: fit(small("reference"), input_noise=-0.1),
        "fit: input_noise: expected a number ≥ 0, got -0.1",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[m[:60] for _, m in REFUSED])
def test_refusal(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(bp.OptionError) as error:
        call()
    assert str(error.value) == message


def test_a_class_is_no_callback() -> None:
    with pytest.raises(bp.KindError, match=r"callbacks\[0\]: expected a Callback .* got Recorder"):
        fit(small("reference"), callbacks=[Recorder])
    with pytest.raises(bp.KindError, match="fit: callbacks: expected a list, got function"):
        fit(small("reference"), callbacks=lambda epoch, history: True)


def test_an_average_that_forgets_everything_is_the_last_step(device: str) -> None:
    plain, averaged = small(device), small(device)
    fit(plain)
    fit(averaged, ema=0)
    for name, value in plain.state_dict().items():
        np.testing.assert_allclose(averaged.state_dict()[name], value, rtol=1e-6, atol=1e-7)
