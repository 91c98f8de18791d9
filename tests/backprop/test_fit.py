from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest

import backprop as bp
from backprop import batches
from backprop.gradients import Gradients
from backprop.passes import LinearPass, SparseInputPass
from tests.inputs import on_host

LOOP = import_module("backprop.evaluation")
rng = np.random.default_rng(0)
X, y = rng.standard_normal((32, 5)), rng.standard_normal(32)
ids = rng.integers(0, 4, 32)


def fit(model: bp.Sequential, *data: Any, **options: Any) -> bp.History:
    return bp.fit(model, *data, progress=False, **options)


def small(device: str, outputs: int = 1, dtype: str = "float64") -> bp.MLP:
    return bp.MLP([5, 16, outputs], "tanh", dtype=dtype, device=device)


@pytest.mark.parametrize("norm", [None, "batch", "layer"])
def test_overfits_32_random_labels(device: str, norm: str | None) -> None:
    model = bp.MLP([5, 64, 64, 4], norm=norm, device=device)
    history = fit(model, X, ids, loss="cross_entropy", optimizer=bp.Adam(lr=0.01), epochs=150)
    assert history["loss"][-1] < 0.01 < 1 < history["loss"][0]
    if norm != "batch":
        assert (model.predict(X).argmax(axis=1) == ids).all()


@pytest.mark.parametrize("loss", ["mse", "mae", "huber", "log_cosh", "quantile"])
def test_overfits_32_random_numbers(device: str, loss: str) -> None:
    model = bp.MLP([5, 64, 64, 1], "gelu", device=device)
    rule = bp.AdamW(lr=0.01, weight_decay=0.0)
    fit(model, X, y, loss=loss, optimizer=rule, epochs=150)
    rule.lr = 0.0005  # mae and quantile need small steps in the end
    fit(model, X, y, loss=loss, optimizer=rule, epochs=100)
    assert np.abs(model.predict(X)[:, 0] - y).mean() < 0.02


def test_fit_is_a_loop_over_steps(device: str) -> None:
    """Order, batches, the short last one and the mean loss, against the loop written out."""
    for shuffle in (True, False):
        model, twin = small(device), small(device)
        history = fit(
            model, X, y, optimizer="Adam", epochs=3, batch_size=10, shuffle=shuffle, seed=5
        )
        step = bp.TrainStep(twin, "mse", "Adam", batch_size=10, seed=5)
        expected = []
        for epoch in range(3):
            draw = np.random.default_rng((5, epoch))  # an order of its own, whatever came before
            order = draw.permutation(32) if shuffle else np.arange(32)
            total = 0.0
            for start in (0, 10, 20, 30):
                chosen = order[start : start + 10]
                total += len(chosen) * step(X[chosen], y[chosen])
            expected.append(total / 32)
        assert history["loss"] == expected
        assert model.parameters.tobytes() == twin.parameters.tobytes()


def test_seed_decides_every_bit(device: str) -> None:
    def run(seed: int) -> tuple[bytes, list[float]]:
        model = bp.MLP([5, 16, 1], dropout=0.2, device=device)
        return model.parameters.tobytes(), fit(model, X, y, epochs=2, seed=seed)["loss"]

    assert run(1) == run(1)
    assert run(1)[1] != run(2)[1]


def test_batch_larger_than_the_data_is_the_data(device: str) -> None:
    models = [small(device) for _ in range(2)]
    for model, rows in zip(models, (32, 1000), strict=True):
        fit(model, X, y, epochs=2, batch_size=rows)
    assert models[0].parameters.tobytes() == models[1].parameters.tobytes()


@pytest.mark.parametrize("rows", [1, 2, 31])
def test_few_rows_and_batches_of_one(device: str, rows: int) -> None:
    model = small(device)
    before = model.parameters.copy()
    history = fit(model, X[:rows], y[:rows], batch_size=1, shuffle=False, optimizer="SGD")
    twin = small(device)
    step = bp.TrainStep(twin, "mse", "SGD", batch_size=1)
    losses = [step(X[i : i + 1], y[i : i + 1]) for i in range(rows)]
    assert history["loss"] == [pytest.approx(np.mean(losses), rel=1e-14)]
    assert model.parameters.tobytes() == twin.parameters.tobytes() != before.tobytes()


def test_fit_does_not_touch_its_inputs(device: str) -> None:
    data, target, weight = X.copy(), y.copy(), np.ones(32)
    fit(small(device), data, target, sample_weight=weight, eval_set=(data, target), epochs=2)
    assert data.tobytes() == X.tobytes() and target.tobytes() == y.tobytes()
    assert (weight == 1).all()


def test_history_has_keras_keys_with_one_entry_an_epoch(device: str) -> None:
    history = fit(small(device), X, y, epochs=3, optimizer=bp.SGD(lr=0.05))
    assert list(history) == ["loss", "lr", "seconds"] and history.epochs == 3
    assert history["lr"] == [0.05] * 3 and all(s > 0 for s in history["seconds"])
    history = fit(small(device), X, y, epochs=2, eval_set=(X, y))
    assert list(history) == ["loss", "lr", "val_loss", "seconds"]
    assert {len(values) for values in history.values()} == {2}


def test_val_loss_is_the_loss_of_the_trained_model_on_held_out_rows(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOOP, "PREDICT_ROWS", 7)  # several parts, the last one short
    held_out = rng.standard_normal((23, 5)), rng.standard_normal(23)
    model = bp.MLP([5, 16, 1], dropout=0.5, norm="batch", dtype="float64", device=device)
    history = fit(model, X, y, epochs=1, eval_set=held_out)
    expected = ((model.predict(held_out[0])[:, 0] - held_out[1]) ** 2).mean()
    assert history["val_loss"] == [pytest.approx(expected, rel=1e-12)]


def test_val_loss_weighs_parts_as_the_loss_weighs_rows(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.where(np.arange(32) % 5 == 0, -100, ids)
    loss = bp.Loss("cross_entropy", class_weight=[0.5, 2, 0, 3], label_smoothing=0.1)
    model = small(device, 4)
    whole = fit(model, X, ids, loss=loss, optimizer=bp.SGD(lr=0), eval_set=(X, labels))
    monkeypatch.setattr(LOOP, "PREDICT_ROWS", 7)
    parts = fit(model, X, ids, loss=loss, optimizer=bp.SGD(lr=0), eval_set=(X, labels))
    assert parts["val_loss"] == [pytest.approx(whole["val_loss"][0], rel=1e-12)]


def test_sample_weight_two_is_the_row_twice(device: str) -> None:
    twice = np.concatenate([np.arange(32), [3, 9]])
    weight = np.ones(32)
    weight[[3, 9]] = 2
    models = [small(device) for _ in range(2)]
    fit(models[0], X, y, sample_weight=weight, batch_size=32, epochs=3)
    fit(models[1], X[twice], y[twice], batch_size=34, epochs=3)
    np.testing.assert_allclose(on_host(models[0]), on_host(models[1]), rtol=1e-9, atol=1e-12)


def test_rows_of_weight_zero_teach_nothing(device: str) -> None:
    weight = (np.arange(32) % 2).astype(float)
    nonsense = np.where(weight > 0, y, 1e6)
    models = [small(device) for _ in range(2)]
    for model, target in zip(models, (y, nonsense), strict=True):
        fit(model, X, target, sample_weight=weight, epochs=2, batch_size=8)
    assert models[0].parameters.tobytes() == models[1].parameters.tobytes()


def test_callbacks_see_the_history_and_may_stop(device: str) -> None:
    seen: list[tuple[int, int]] = []

    def record(epoch: int, history: bp.History) -> None:
        seen.append((epoch, history.epochs))

    def stop(epoch: int, history: bp.History) -> bool:
        return epoch == 2

    history = fit(small(device), X, y, epochs=10, callbacks=[stop, record])
    assert history.epochs == 3 and seen == [(0, 1), (1, 2), (2, 3)]


def test_callback_may_change_the_learning_rate(device: str) -> None:
    rule = bp.SGD(lr=0.1)

    def halve(epoch: int, history: bp.History) -> None:
        rule.lr /= 2

    history = fit(small(device), X, y, optimizer=rule, epochs=3, callbacks=[halve])
    assert history["lr"] == [0.1, 0.05, 0.025]


def test_constant_columns_and_a_single_class_stay_finite(device: str) -> None:
    data = np.ones((32, 5))
    for norm in (None, "batch", "layer"):
        model = bp.MLP([5, 8, 4], norm=norm, device=device)
        history = fit(model, data, np.zeros(32, int), loss="cross_entropy", epochs=3)
        assert np.isfinite(history["loss"]).all() and np.isfinite(model.parameters).all()


def test_all_labels_ignored_change_nothing(device: str) -> None:
    model = bp.MLP([5, 8, 4], device=device)
    before = model.parameters.tobytes()
    history = fit(model, X, np.full(32, -100), loss="cross_entropy", optimizer="SGD")
    assert history["loss"] == [0.0] and model.parameters.tobytes() == before


def test_diverging_fit_keeps_the_last_finite_step(device: str) -> None:
    model = small(device, dtype="float32")
    with (
        np.errstate(all="ignore"),
        pytest.raises(bp.NonFiniteError, match=r"at lr 1e\+30; nothing was changed"),
    ):
        fit(model, X, y, optimizer=bp.SGD(lr=1e30), epochs=50, batch_size=8)
    assert np.isfinite(model.parameters).all()


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("row", ["like the others", "full", "all of zeros"])
def test_zeros_of_the_input_are_skipped_without_a_trace(
    device: str, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One-hot columns: the same network as with the dense kernels, but for rounding."""
    rng = np.random.default_rng(5)
    X = np.hstack([rng.standard_normal((700, 2)), np.eye(30)[rng.integers(0, 30, 700)]])
    if row == "full":  # then a list of what is not 0 would be larger than X
        X[5] = 1
    elif row == "all of zeros":
        X[...] = 0
    y = np.tanh(X @ rng.standard_normal((32, 1))) + 0.1
    found = []
    for share in (batches.SPARSE, 0.0):
        monkeypatch.setattr(batches, "SPARSE", share)
        model = bp.MLP([32, 17, 1], activation="gelu", dropout=0.1, dtype="float64", device=device)
        history = bp.fit(model, X, y, "mse", "Adam", 3, 256, seed=2, progress=False)
        found.append((model.parameters.copy(), np.array(history["loss"])))
    for sparse, dense in zip(*found, strict=True):
        np.testing.assert_allclose(sparse, dense, rtol=1e-9, atol=1e-12)


def test_fit_and_its_noise_choose_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    X = np.eye(30, dtype=np.float32)[rng.integers(0, 30, 300)]
    plans = []
    operators = Gradients.operators

    def noted(self: Gradients, batch: int) -> Any:
        made = operators(self, batch)
        plans.append(type(self.plans[batch].passes[0]))
        return made

    monkeypatch.setattr(Gradients, "operators", noted)
    for data, noise, expected in (
        (X, 0.0, SparseInputPass), (X, 0.1, LinearPass), (X + 1, 0.0, LinearPass)
    ):  # fmt: skip
        plans.clear()
        bp.fit(bp.MLP([30, 4, 1]), data, X[:, :1], "mse", batch_size=150, input_noise=noise,
               progress=False)  # fmt: skip
        assert set(plans) == {expected}
