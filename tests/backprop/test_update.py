"""How each tensor is updated: clipping, penalties, groups, frozen tensors, accumulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import backprop as bp
from backprop.layers import Layer
from tests.inputs import on_host

rng = np.random.default_rng(0)
X, y = rng.standard_normal((24, 5)), rng.standard_normal((24, 2))
ids = rng.integers(0, 3, 24)
Tensors = dict[str, Any]


def network(device: str, *, outputs: int = 2, seed: int = 0) -> bp.Sequential:
    layers: list[Layer] = [
        bp.Linear(5, 16, "tanh"), bp.LayerNorm(16, "gelu"), bp.Linear(16, 7, "relu"),
        bp.Linear(7, outputs),
    ]  # fmt: skip
    model = bp.Sequential(layers, dtype="float64", device=device, seed=seed)
    draw = np.random.default_rng(seed)  # biases too: at 0, nothing could decay or be penalised
    model.load_state_dict({n: draw.normal(0, 0.3, p.shape) for n, p in model.state_dict().items()})
    return model


def one_step(device: str, rule: bp.Optimizer, **options: Any) -> tuple[Tensors, Tensors, Tensors]:
    """(before, gradients, after) of a step on all rows."""
    model = network(device)
    before = model.state_dict()
    _, gradients = bp.value_and_grad(model, X, y)
    bp.TrainStep(model, "mse", rule, batch_size=24, **options)(X, y)
    return before, gradients, model.state_dict()


def is_weight(name: str) -> bool:
    return name.startswith("layers.") and name.endswith(".weight")


STEPS: dict[str, tuple[dict[str, Any], Callable[[str, Any, Any], Any]]] = {
    # options of SGD(lr=0.1): the tensor after a step, from its name, itself and its gradient
    "l1": (
        {"l1": 0.3},
        lambda name, p, g: p - 0.1 * (g + 0.3 * np.sign(p) * is_weight(name)),
    ),
    "l2": ({"l2": 0.3}, lambda name, p, g: p - 0.1 * (g + 0.3 * p * is_weight(name))),
    "decay spares biases and norms": (
        {"weight_decay": 0.5},
        lambda name, p, g: p - 0.1 * (g + 0.5 * p * is_weight(name)),
    ),
    "clip_value": ({"clip_value": 0.01}, lambda name, p, g: p - 0.1 * np.clip(g, -0.01, 0.01)),
    "clip_tensor_norm": (
        {"clip_tensor_norm": 0.05},
        lambda name, p, g: p - 0.1 * g * min(1, 0.05 / np.linalg.norm(g)),
    ),
    "max_norm": (
        {"max_norm": 0.4},
        lambda name, p, g: (
            bounded(p - 0.1 * g, 0.4) if is_weight(name) else p - 0.1 * g
        ),
    ),
    "a layer learns more slowly": (
        {"groups": {"layers.1": {"lr_scale": 0.25}}},
        lambda name, p, g: p - (0.025 if name.startswith("layers.1.") else 0.1) * g,
    ),
    "decay of everything": (
        {"groups": {"*": {"weight_decay": 0.5}}},
        lambda name, p, g: p - 0.1 * (g + 0.5 * p),
    ),
    "a group keeps what it does not name": (
        {"l2": 0.3, "groups": {"layers.1": {"lr_scale": 0.25}, "layers.1.weight": {"l1": 0.2}}},
        lambda name, p, g: p - (0.025 if name.startswith("layers.1.") else 0.1) * (
            g + 0.3 * p * is_weight(name) + 0.2 * np.sign(p) * (name == "layers.1.weight")
        ),
    ),
    "the later group holds": (
        {"l2": 1.0, "groups": {"layers.*": {"l2": 0.0}, "*.bias": {"l1": 0.2}}},
        lambda name, p, g: p - 0.1 * (g + 0.2 * np.sign(p) * name.endswith("bias")),
    ),
}  # fmt: skip


def bounded(W: Any, limit: float) -> Any:
    return W * np.minimum(1, limit / np.linalg.norm(W, axis=1, keepdims=True))


@pytest.mark.parametrize("what", STEPS)
def test_one_step_by_hand(device: str, what: str) -> None:
    options, expected = STEPS[what]
    before, gradients, after = one_step(device, bp.SGD(lr=0.1, **options))
    moved = 0
    for name, p in before.items():
        plain = p - 0.1 * gradients[name]
        by_hand = expected(name, p, gradients[name])
        np.testing.assert_allclose(after[name], by_hand, rtol=1e-13, atol=1e-15, err_msg=name)
        moved += not np.allclose(by_hand, plain, rtol=1e-9)
    assert moved, "the option changed nothing: the case is too mild to test it"


def test_the_whole_gradient_is_clipped_to_its_norm(device: str) -> None:
    _, gradients, _ = one_step(device, bp.SGD(lr=0.1))
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    for limit in (0.3, 3.0):
        before, _, after = one_step(device, bp.SGD(lr=0.1), clip_norm=limit * float(norm))
        for name, p in before.items():
            by_hand = p - 0.1 * gradients[name] * min(1, limit * norm / (norm + 1e-6))
            np.testing.assert_allclose(after[name], by_hand, rtol=1e-13, atol=1e-15)


def test_neighbours_treated_alike_are_one_span() -> None:
    model = network("reference")
    step = bp.TrainStep(model, "mse", bp.SGD(groups={"layers.2": {"lr_scale": 0.5}}), 24)
    assert step.update.spans is not None
    assert [row for *_, row in step.update.spans] == [0, 1]


def test_adamw_decays_weights_only_and_by_group(device: str) -> None:
    """With lr tiny against the decay, what moves is the decay: p ← (1 − lr decay) p."""
    rule = bp.AdamW(lr=1e-9, weight_decay=1e8, groups={"layers.2": {"weight_decay": 2e8}})
    before, _, after = one_step(device, rule)
    for name, p in before.items():
        decay = (2e8 if name.startswith("layers.2") else 1e8) * (p.ndim == 2)
        if name == "layers.2.bias":
            decay = 2e8
        np.testing.assert_allclose(after[name], (1 - 1e-9 * decay) * p, atol=2e-9, err_msg=name)


def test_the_same_options_everywhere_are_the_plain_step(device: str) -> None:
    """A row of scalars for each tensor computes what one row for all does, to the bit."""
    plain, spanned = network(device), network(device)
    groups = {"layers.0": {"lr_scale": 1.0}, "layers.1.bias": {"l1": 0.0}}
    one = bp.TrainStep(plain, "mse", bp.Adam(lr=0.01), 24)
    other = bp.TrainStep(spanned, "mse", bp.Adam(lr=0.01, clip_value=1e300, groups=groups), 24)
    assert one.update.spans is None and other.update.spans is not None
    for _ in range(5):
        assert one(X, y) == other(X, y)
    assert plain.parameters.tobytes() == spanned.parameters.tobytes()


@pytest.mark.parametrize("loss", ["weights", "class weights", "ignored"])
@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_accumulated_batches_are_one_large_batch(device: str, rule: str, loss: str) -> None:
    """Of any sizes; also where rows, classes or batches differ in what they count."""
    chosen = bp.Loss("cross_entropy", class_weight=[1, 5, 0.5] if loss == "class weights" else None)
    labels = np.where(np.arange(24) < 7, -100, ids) if loss == "ignored" else ids
    w = rng.uniform(0, 3, 24) if loss == "weights" else None
    whole, parts = network(device, outputs=3), network(device, outputs=3)
    one = bp.TrainStep(whole, chosen, rule, batch_size=24)
    other = bp.TrainStep(parts, chosen, rule, batch_size=24, accumulate=4)
    for _ in range(3):
        one(X, labels, w)
        for cut in (slice(0, 7), slice(7, 8), slice(8, 20), slice(20, 24)):
            before = parts.parameters.tobytes()
            assert other.steps == one.steps - 1
            other(X[cut], labels[cut], None if w is None else w[cut])
            assert (parts.parameters.tobytes() == before) == (cut.stop < 24)
        assert other.steps == one.steps and other.pending == 0
        np.testing.assert_allclose(on_host(parts), on_host(whole), rtol=1e-9, atol=1e-12)
        assert float(other.norm) == pytest.approx(float(one.norm), rel=1e-12)


def test_flush_makes_a_step_of_what_is_there(device: str) -> None:
    whole, parts = network(device), network(device)
    bp.TrainStep(whole, "mse", "SGD", batch_size=24)(X[:20], y[:20])
    step = bp.TrainStep(parts, "mse", "SGD", batch_size=24, accumulate=3)
    step(X[:12], y[:12])
    step(X[12:20], y[12:20])
    assert step.steps == 0
    step.flush()
    step.flush()  # nothing is left
    assert step.steps == 1
    np.testing.assert_allclose(on_host(parts), on_host(whole), rtol=1e-13)


@pytest.mark.filterwarnings("ignore:invalid:RuntimeWarning", "ignore:overflow:RuntimeWarning")
def test_one_bad_batch_undoes_the_accumulated_step(device: str) -> None:
    layers: list[Layer] = [bp.Linear(5, 8), bp.BatchNorm(8, "relu"), bp.Linear(8, 2)]
    model = bp.Sequential(layers, device=device)
    step = bp.TrainStep(model, "mse", "Adam", batch_size=24, accumulate=3)
    before = {name: value.tobytes() for name, value in model.state_dict().items()}
    step(X, y)
    with pytest.raises(bp.NonFiniteError, match="nothing was changed"):
        float(step(X, y * 1e25))
    assert {name: value.tobytes() for name, value in model.state_dict().items()} == before
    assert step.steps == 0 and step.pending == 0 and not any(s.any() for s in step.state.values())
    for _ in range(3):
        step(X, y)
    assert step.steps == 1


def test_accumulated_batches_drop_different_elements(device: str) -> None:
    model = bp.Sequential(
        [bp.Linear(8, 8, init="zeros"), bp.Dropout(0.5), bp.Linear(8, 8)], device=device
    )
    losses = set()
    model.parameters[:] = 1
    step = bp.TrainStep(model, "mse", bp.SGD(lr=0.0), batch_size=1, accumulate=8)
    for _ in range(8):
        losses.add(float(step(np.ones((1, 8)), np.zeros((1, 8)))))
    assert len(losses) > 3


@pytest.mark.parametrize("norm", [bp.BatchNorm, bp.LayerNorm, bp.RMSNorm])
def test_frozen_tensors_keep_every_bit_and_the_others_move_as_ever(device: str, norm: Any) -> None:
    def build() -> bp.Sequential:
        layers = [bp.Linear(5, 8), norm(8, "relu"), bp.Linear(8, 6, "tanh"), bp.Linear(6, 2)]
        return bp.Sequential(layers, dtype="float64", device=device)

    model, free = build(), build()
    model.frozen = {"layers.1.weight", "layers.0.bias"}
    before = model.state_dict()
    rule = bp.SGD(lr=0.1, weight_decay=0.1, momentum=0.9)
    bp.TrainStep(model, "mse", rule, batch_size=24)(X, y)
    bp.TrainStep(free, "mse", rule, batch_size=24)(X, y)
    for name, value in model.state_dict().items():
        if name in model.frozen:
            assert value.tobytes() == before[name].tobytes()
        else:
            np.testing.assert_allclose(value, free.state_dict()[name], rtol=1e-13, err_msg=name)


def test_nothing_is_computed_below_the_lowest_trained_layer(device: str) -> None:
    """A frozen trunk predicts: its batch norm uses its running statistics and keeps them."""
    layers = [bp.Linear(5, 8), bp.BatchNorm(8, "relu"), bp.Linear(8, 2)]
    model = bp.Sequential(layers, dtype="float64", device=device)
    model.memory.fill(model.statistics["norms.0.running_mean"], rng.standard_normal(8))
    model.frozen = {n for n in model.layout.shapes if not n.startswith("layers.1.")}
    before = model.state_dict()
    step = bp.TrainStep(model, "mse", bp.SGD(lr=0.1), batch_size=24)
    loss = step(X, y)
    after = model.state_dict()
    assert all(after[n].tobytes() == before[n].tobytes() for n in after if "layers.1" not in n)
    head = bp.Sequential([bp.Linear(8, 2)], dtype="float64", device=device)
    trunk = bp.Sequential([*layers[:2], bp.Linear(8, 8)], dtype="float64", device=device)
    trunk.load_state_dict({**before, "layers.1.weight": np.eye(8), "layers.1.bias": np.zeros(8)})
    head.load_state_dict({f"layers.0.{k}": before[f"layers.1.{k}"] for k in ("weight", "bias")})
    features = trunk.predict(X)
    assert bp.TrainStep(head, "mse", bp.SGD(lr=0.1), 24)(features, y) == pytest.approx(loss)
    np.testing.assert_allclose(after["layers.1.weight"], head.state_dict()["layers.0.weight"])
    assert step.gradients.plans[24].bottom == 2 and not step.gradients.plans[24].passes[0].dZ.any()


def test_everything_frozen_is_refused(device: str) -> None:
    model = network(device)
    model.frozen = set(model.layout.shapes)
    with pytest.raises(bp.OptionError, match="expected parameters to train, got all of them froz"):
        bp.TrainStep(model, "mse")


def test_input_dropout_zeroes_inputs_and_keeps_their_mean(device: str) -> None:
    """One linear layer without weights to speak of: the loss sees the dropped inputs."""
    ones = np.ones((400, 5))
    layers = [bp.Dropout(0.25), bp.Linear(5, 5, bias=False)]
    model = bp.Sequential(layers, dtype="float64", device=device)
    model.load_state_dict({"layers.0.weight": np.eye(5)})
    loss, _ = bp.value_and_grad(model, ones, np.zeros((400, 5)), "mae")
    kept = loss * 0.75 * 2000  # each kept element is 1/0.75
    assert kept == pytest.approx(round(kept), rel=1e-12) and abs(kept - 1500) < 4 * 19.4
    square, _ = bp.value_and_grad(model, ones, np.zeros((400, 5)))
    assert square == pytest.approx(loss / 0.75, rel=1e-12)  # the same mask; every element 0 or 4/3
    assert np.array_equal(model.predict(ones), ones)
    assert bp.gradcheck(model, X, X, seed=3).checked == 25
    other, _ = bp.value_and_grad(model, ones, np.zeros((400, 5)), "mae", seed=1)
    assert other != loss


def test_backends_drop_the_same_inputs_and_agree_on_rms_norm() -> None:
    models = [
        bp.MLP([5, 16, 3], "gelu", 0.2, "rms", input_dropout=0.3, dtype="float64", device=device)
        for device in ("reference", "cpu")
    ]
    for model in models:
        step = bp.TrainStep(model, "cross_entropy", "AdamW", batch_size=24, seed=3)
        for _ in range(10):
            step(X, ids)
    np.testing.assert_allclose(on_host(models[0]), on_host(models[1]), rtol=1e-9, atol=1e-12)


def test_rms_norm_has_a_scale_and_no_shift(device: str) -> None:
    model = bp.MLP([5, 16, 3], "gelu", norm="rms", dtype="float64", device=device)
    assert (
        model.layout.shapes["norms.0.weight"] == (16,) and "norms.0.bias" not in model.layout.shapes
    )
    assert bp.gradcheck(model, X, ids, "cross_entropy").checked == 5 * 16 + 16 + 3 * 16 + 3
    state = model.state_dict()
    Z = X @ state["layers.0.weight"].T
    A = Z / np.sqrt((Z * Z).mean(axis=1, keepdims=True) + 1e-5)
    from scipy.special import ndtr

    expected = (A * ndtr(A)) @ state["layers.1.weight"].T + state["layers.1.bias"]
    np.testing.assert_allclose(model.predict(X), expected, rtol=1e-9, atol=1e-12)


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: bp.SGD(l1=-1), "SGD: l1: expected a number ≥ 0, got -1"),
    (lambda: bp.SGD(clip_value=0), "SGD: clip_value: expected a number > 0 or None, got 0"),
    (lambda: bp.SGD(max_norm="3"), "SGD: max_norm: expected a number > 0 or None, got '3'"),
    (
        lambda: bp.SGD(groups={"layers.0": {"lr": 0.1}}),
        "SGD: groups['layers.0']: expected options lr_scale, weight_decay, l1, l2, max_norm; "
        "got 'lr'",
    ),
    (
        lambda: bp.TrainStep(bp.MLP([2, 1]), "mse", bp.SGD(groups={"layers.1": {"l1": 1}})),
        "SGD: groups: expected the name of a tensor or a layer, or a pattern, of layers.0.weight, "
        "layers.0.bias; got 'layers.1'",
    ),
    (
        lambda: bp.TrainStep(bp.MLP([2, 1]), "mse", accumulate=0),
        "TrainStep: accumulate: expected an integer ≥ 1, got 0",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[m[:60] for _, m in REFUSED])
def test_refusal(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(bp.OptionError) as error:
        call()
    assert str(error.value) == message
    with pytest.raises(bp.KindError, match="groups: expected tensors and their options"):
        bp.SGD(groups=["layers.0"])
