from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

import backprop as bp
from backprop.layers import Layer

rng = np.random.default_rng(0)
X, y = rng.standard_normal((24, 5)), rng.standard_normal(24)
ids = rng.integers(0, 3, 24)


def bits(model: bp.Sequential) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in model.state_dict().items()}


def everything(device: str, dtype: str = "float64", seed: int = 0) -> bp.Sequential:
    """Every kind of layer."""
    layers: list[Layer] = [
        bp.Linear(5, 16, "gelu"), bp.Dropout(0.25), bp.BatchNorm(16, "tanh"), bp.Linear(16, 8),
        bp.LayerNorm(8, "relu"), bp.Dropout(0.1), bp.Linear(8, 3),
    ]  # fmt: skip
    return bp.Sequential(layers, dtype=dtype, device=device, seed=seed)


def test_first_step_is_value_and_grad_and_an_update_by_hand(device: str) -> None:
    model, other = everything(device), everything(device)
    loss = bp.TrainStep(model, "cross_entropy", bp.SGD(lr=0.1), batch_size=24, seed=4)(X, ids)
    value, gradients = bp.value_and_grad(other, X, ids, "cross_entropy", seed=4)
    assert loss == value
    before, after = other.state_dict(), model.state_dict()
    for name, g in gradients.items():
        np.testing.assert_allclose(after[name], before[name] - 0.1 * g, rtol=1e-14, atol=1e-16)


def test_steps_follow_the_rule_written_out(device: str) -> None:
    """AdamW with clipping, 5 batches of different sizes, against NumPy in float64."""
    model = bp.MLP([5, 16, 3], "tanh", dtype="float64", device=device)
    twin = bp.MLP([5, 16, 3], "tanh", dtype="float64", device="reference")
    lr, beta1, beta2, eps, decay, clip = 0.01, 0.8, 0.95, 1e-6, 0.1, 0.5
    rule = bp.AdamW(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    step = bp.TrainStep(model, "cross_entropy", rule, batch_size=24, clip_norm=clip)
    m = {name: np.zeros_like(value) for name, value in twin.state_dict().items()}
    v = {name: np.zeros_like(value) for name, value in twin.state_dict().items()}
    for t, rows in enumerate((24, 7, 24, 1, 7), start=1):
        chosen = rng.permutation(24)[:rows]
        loss = step(X[chosen], ids[chosen])
        value, gradients = bp.value_and_grad(twin, X[chosen], ids[chosen], "cross_entropy")
        assert loss == pytest.approx(value, rel=1e-12)
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        assert float(step.norm) == pytest.approx(norm, rel=1e-12)
        state = twin.state_dict()
        for name, g in gradients.items():
            g = g * min(1, clip / (norm + 1e-6))
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g**2
            m_hat, v_hat = m[name] / (1 - beta1**t), v[name] / (1 - beta2**t)
            shrink = 1 - lr * decay if g.ndim == 2 else 1  # biases are spared
            state[name] = shrink * state[name] - lr * m_hat / (np.sqrt(v_hat) + eps)
        twin.load_state_dict(state)
        for name, value_by_hand in state.items():
            np.testing.assert_allclose(
                model.state_dict()[name], value_by_hand, rtol=1e-11, atol=1e-13
            )


def test_backends_agree_on_every_kind_of_layer() -> None:
    models = [everything(device) for device in ("reference", "cpu")]
    for model in models:
        step = bp.TrainStep(model, "cross_entropy", "Adam", batch_size=24, seed=3)
        for _ in range(10):
            step(X, ids)
    reference, cpu = (model.state_dict() for model in models)
    for name, value in reference.items():
        np.testing.assert_allclose(cpu[name], value, rtol=1e-9, atol=1e-11, err_msg=name)


def test_value_and_grad_leaves_the_model_as_it_was(device: str) -> None:
    model = everything(device)
    before = bits(model)
    first = bp.value_and_grad(model, X, ids, "cross_entropy", seed=1)
    assert bits(model) == before
    again = bp.value_and_grad(model, X, ids, "cross_entropy", seed=1)
    other = bp.value_and_grad(model, X, ids, "cross_entropy", seed=2)
    assert first[0] == again[0] != other[0]  # dropout is a function of the seed
    assert [g.tobytes() for g in first[1].values()] == [g.tobytes() for g in again[1].values()]
    assert list(first[1]) == [n for n in model.state_dict() if "running" not in n]


def test_sample_weights_enter_the_loss_of_each_step(device: str) -> None:
    model = bp.MLP([5, 8, 1], dtype="float64", device=device)
    step = bp.TrainStep(model, "mse", bp.SGD(lr=0.0), batch_size=24)
    squares = (model.predict(X)[:, 0] - y) ** 2
    weight = rng.random(24)
    assert step(X, y, weight) == pytest.approx(np.average(squares, weights=weight), rel=1e-12)
    assert step(X, y) == pytest.approx(squares.mean(), rel=1e-12)
    assert step(X, y, np.zeros(24)) == 0.0


def test_dropout_changes_from_step_to_step_and_repeats_from_run_to_run(device: str) -> None:
    def losses(seed: int) -> list[float]:
        step = bp.TrainStep(
            everything(device), "cross_entropy", bp.SGD(lr=0.0), batch_size=24, seed=seed
        )
        return [float(step(X, ids)) for _ in range(5)]

    assert len(set(losses(7))) == 5
    assert losses(7) == losses(7) != losses(8)


def test_each_layer_drops_elements_of_its_own(device: str) -> None:
    """Ones through three identities: two masks of 1/2 leave 1/4 of the elements, not 1/2."""
    layers: list[Layer] = [
        bp.Linear(8, 8), bp.Dropout(0.5), bp.Linear(8, 8), bp.Dropout(0.5), bp.Linear(8, 8),
    ]  # fmt: skip
    model = bp.Sequential(layers, device=device)
    state = {n: np.eye(8) if v.ndim == 2 else 0 * v for n, v in model.state_dict().items()}
    model.load_state_dict(state)
    loss, _ = bp.value_and_grad(model, np.ones((500, 8)), np.zeros((500, 8)))
    assert 0.2 < loss / 16 < 0.3  # an element that survives twice is scaled to 4


def test_no_bit_depends_on_run_threads_or_the_address_of_a_batch() -> None:
    """D0 and D1, at sizes that are worth several threads."""
    from backprop_kernels.cpu import threads

    data = rng.standard_normal((512, 64)).astype(np.float32)
    labels = rng.integers(0, 10, 512)
    before = threads.get_num_threads()
    results = []
    try:
        for count, copy in ((1, False), (2, True), (3, False), (2, False)):
            threads.set_num_threads(count)
            model = bp.MLP([64, 256, 256, 10], "gelu", 0.1, "layer")
            step = bp.TrainStep(model, "cross_entropy", "AdamW", batch_size=512)
            losses = [
                step(data.copy(), labels.copy()) if copy else step(data, labels) for _ in range(5)
            ]
            results.append((losses, bits(model)))
    finally:
        threads.set_num_threads(before)
    assert all(result == results[0] for result in results)


def test_steady_state_allocates_no_buffers() -> None:
    data = rng.standard_normal((256, 64)).astype(np.float32)  # 64 kB: any copy would show
    target = rng.standard_normal((256, 32)).astype(np.float32)
    weight = np.ones(256, np.float32)
    model = bp.MLP([64, 128, 32], dropout=0.1, norm="batch")
    step = bp.TrainStep(model, "mse", "AdamW", batch_size=256)
    for _ in range(3):
        step(data, target, weight)
        step(data[:100], target[:100])
    tracemalloc.start()
    for _ in range(50):
        step(data, target, weight)
        step(data[:100], target[:100])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8192


def two_steps_in(device: str) -> tuple[bp.Sequential, bp.TrainStep]:
    """A model two steps into training, with running statistics that a step moves."""
    layers: list[Layer] = [bp.Linear(5, 16), bp.BatchNorm(16, "relu"), bp.Linear(16, 1)]
    model = bp.Sequential(layers, device=device)
    step = bp.TrainStep(model, "mse", bp.Adam(lr=0.01), batch_size=24)
    step(X, y)
    step(X, y)
    return model, step


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid:RuntimeWarning")
def test_step_that_diverges_changes_nothing(device: str) -> None:
    model, step = two_steps_in(device)
    before, moments = bits(model), [s.tobytes() for s in step.state.values()]
    with pytest.raises(bp.NonFiniteError) as error:
        float(step(X, y * 1e25))  # whose squares leave float32
    message = str(error.value)
    assert message.startswith(
        "TrainStep: step 3: expected a finite loss and gradient, got loss "
    ) and message.endswith(
        " at lr 0.01; nothing was changed. Lower lr, set clip_norm, or scale the inputs"
    )
    assert bits(model) == before and [s.tobytes() for s in step.state.values()] == moments
    assert step.steps == 2

    _, twin = two_steps_in(device)
    assert step(X, y) == twin(X, y)  # and the next step is as if it had never been


@pytest.mark.filterwarnings("ignore:invalid:RuntimeWarning")
def test_nan_in_a_batch_is_named_and_changes_nothing(device: str) -> None:
    model, step = two_steps_in(device)
    before = bits(model)
    bad = X.copy()
    bad[17, 3] = np.nan
    with pytest.raises(bp.DataError) as error:
        float(step(bad, y))
    assert str(error.value) == (
        "TrainStep: X: expected finite numbers, got NaN at row 17, column 3 (1 of 120); impute or "
        "drop such rows"
    )
    assert bits(model) == before and step.steps == 2


def test_kinds_of_targets_may_take_turns(device: str) -> None:
    model = bp.MLP([5, 8, 3], dtype="float64", device=device)
    step = bp.TrainStep(model, "cross_entropy", bp.SGD(lr=0.0), batch_size=24)
    one_hot = np.eye(3)[ids]
    for _ in range(2):
        assert step(X, ids) == pytest.approx(step(X, one_hot), rel=1e-14)


def test_learning_rate_may_change_between_steps(device: str) -> None:
    model = bp.MLP([5, 8, 1], device=device)
    rule = bp.SGD(lr=0.0)
    step = bp.TrainStep(model, "mse", rule, batch_size=24)
    before = bits(model)
    step(X, y)
    assert bits(model) == before
    rule.lr = 0.1
    _, gradients = bp.value_and_grad(model, X, y)
    expected = model.state_dict()["layers.1.bias"] - np.float32(0.1) * gradients["layers.1.bias"]
    step(X, y)
    np.testing.assert_allclose(model.state_dict()["layers.1.bias"], expected, rtol=1e-6)


def test_two_steps_share_one_optimizer_object_without_sharing_moments(device: str) -> None:
    rule: Any = bp.Adam(lr=0.1)
    shared = [bp.MLP([5, 8, 1], device=device) for _ in range(2)]
    alone = bp.MLP([5, 8, 1], device=device)
    steps = [bp.TrainStep(model, "mse", rule, batch_size=24) for model in shared]
    own = bp.TrainStep(alone, "mse", bp.Adam(lr=0.1), batch_size=24)
    for _ in range(3):
        assert steps[0](X, y) == steps[1](X, y) == own(X, y)
