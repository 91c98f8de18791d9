from __future__ import annotations

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backprop_kernels.arrays import Array

import backprop as bp
from backprop.checkpoint import write_tensors
from backprop.layers import Layer
from backprop.model import KEPT

rng = np.random.default_rng(0)


def normed(device: str = "reference", seed: int = 0, **options: Any) -> bp.Sequential:
    """Every kind of layer, with numbers in all of them."""
    layers: list[Layer] = [
        bp.BatchNorm(5), bp.Linear(5, 7, "gelu"), bp.Dropout(0.2), bp.LayerNorm(7, "tanh"),
        bp.Linear(7, 4, bias=False), bp.BatchNorm(4, "relu"), bp.Linear(4, 3),
    ]  # fmt: skip
    model = bp.Sequential(layers, device=device, seed=seed, **options)
    draw = np.random.default_rng(seed)
    for value in (*model.layout.views(model.parameters).values(), *model.statistics.values()):
        model.memory.fill(value, model.memory.numpy(value) + draw.random(value.shape))
    return model


def bits(state: dict[str, Array]) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in state.items()}


def test_state_dict_has_pytorchs_names_shapes_and_order() -> None:
    shapes = [(name, value.shape) for name, value in normed().state_dict().items()]
    assert shapes == [
        ("norms.0.weight", (5,)), ("norms.0.bias", (5,)),
        ("layers.0.weight", (7, 5)), ("layers.0.bias", (7,)),
        ("norms.1.weight", (7,)), ("norms.1.bias", (7,)),
        ("layers.1.weight", (4, 7)),
        ("norms.2.weight", (4,)), ("norms.2.bias", (4,)),
        ("layers.2.weight", (3, 4)), ("layers.2.bias", (3,)),
        ("norms.0.running_mean", (5,)), ("norms.0.running_var", (5,)),
        ("norms.2.running_mean", (4,)), ("norms.2.running_var", (4,)),
    ]  # fmt: skip
    assert list(bp.MLP([3, 8, 1], device="reference").state_dict()) == [
        "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias",
    ]  # fmt: skip


def test_state_dict_copies_and_loading_restores_every_bit() -> None:
    model, other = normed(seed=1), normed(seed=2)
    state = model.state_dict()
    other.load_state_dict(dict(reversed(state.items())))
    assert bits(other.state_dict()) == bits(state)
    state["layers.0.weight"][...] = 0
    assert bits(other.state_dict()) == bits(model.state_dict()) != bits(state)


def test_new_models_have_pytorchs_neutral_values() -> None:
    state = bp.MLP([3, 8, 1], norm="batch", device="reference").state_dict()
    assert (state["norms.0.weight"] == 1).all() and (state["norms.0.running_var"] == 1).all()
    for name in ("norms.0.bias", "norms.0.running_mean", "layers.1.bias"):
        assert not state[name].any()


def test_load_state_dict_lists_every_difference_and_changes_nothing() -> None:
    model = normed()
    before = bits(model.state_dict())
    state = {name: value + 1 for name, value in model.state_dict().items()}
    del state["layers.0.bias"]
    state["layers.1.weight"] = state["layers.1.weight"].T
    state["layers.9.bias"] = np.zeros(3)
    with pytest.raises(bp.CheckpointMismatchError) as error:
        model.load_state_dict(state)
    assert str(error.value) == (
        "load_state_dict: missing layers.0.bias; unexpected layers.9.bias; "
        "layers.1.weight: expected (4, 7), got (7, 4)"
    )
    assert bits(model.state_dict()) == before


def test_load_state_dict_refuses_what_is_no_number_and_changes_nothing() -> None:
    model = normed()
    before = bits(model.state_dict())
    state: dict[str, Any] = {name: value + 1 for name, value in model.state_dict().items()}
    state["norms.2.running_var"] = ["a", "b", "c", "d"]
    with pytest.raises(bp.KindError) as error:
        model.load_state_dict(state)
    assert str(error.value) == (
        "load_state_dict: norms.2.running_var: expected numbers, got dtype <U1"
    )
    assert bits(model.state_dict()) == before


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_saving_and_loading_keeps_every_bit(tmp_path: Path, device: str, dtype: str) -> None:
    model = normed(device, dtype=dtype)
    model.parameters[:3] = [np.nextafter(0, 1, dtype=dtype), -0.0, 1 / 3]
    model.save(tmp_path / "m.safetensors")
    again = bp.load(tmp_path / "m.safetensors", device=device)
    assert bits(again.state_dict()) == bits(model.state_dict())
    assert again.layers == model.layers and again.dtype == model.dtype
    X = rng.standard_normal((9, 5))
    assert again.predict(X).tobytes() == model.predict(X).tobytes()


def test_saved_file_is_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    model = normed()
    model.save(tmp_path / "m.safetensors")
    assert bits(load_file(tmp_path / "m.safetensors")) == bits(model.state_dict())


def test_load_refuses_a_file_without_an_architecture(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_tensors(path, {"layers.0.weight": np.zeros((2, 3), np.float32)}, {})
    with pytest.raises(bp.CheckpointFormatError) as error:
        bp.load(path)
    assert str(error.value) == (
        f"load: {path}: expected a model saved by fused-backprop, got a safetensors file without "
        "its architecture; build the model and use load_state_dict"
    )


def test_load_refuses_tensors_of_another_architecture(tmp_path: Path) -> None:
    model, path = bp.MLP([3, 8, 1], device="reference"), tmp_path / "m.safetensors"
    state = model.state_dict()
    state["layers.1.weight"] = np.zeros((1, 9), np.float32)
    write_tensors(path, state, {"fused-backprop": json.dumps(model.config())})
    with pytest.raises(bp.CheckpointMismatchError) as error:
        bp.load(path)
    assert str(error.value) == ("load_state_dict: layers.1.weight: expected (1, 8), got (1, 9)")


def test_load_refuses_an_architecture_larger_than_its_file(tmp_path: Path) -> None:
    model, path = bp.MLP([3, 1], device="reference"), tmp_path / "m.safetensors"
    config = model.config()
    config["layers"][0]["in_features"] = 2**50
    write_tensors(path, model.state_dict(), {"fused-backprop": json.dumps(config)})
    with pytest.raises(bp.CheckpointFormatError, match="the file holds fewer"):
        bp.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "fused-backprop 2"},
        {"dtype": "float16"},
        {"layers": []},
        {"layers": [{"kind": "Conv", "in_features": 3}]},
        {"layers": [{"kind": "Linear", "in_features": 3, "out_features": True}]},
        {"layers": 3},
    ],
    ids=str,
)
def test_load_refuses_an_architecture_it_cannot_build(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    model, path = bp.MLP([3, 1], device="reference"), tmp_path / "m.safetensors"
    metadata = {"fused-backprop": json.dumps({**model.config(), **change})}
    write_tensors(path, model.state_dict(), metadata)
    with pytest.raises(bp.CheckpointFormatError) as error:
        bp.load(path)
    assert str(error.value).startswith(f"load: {path}: architecture: ")


def test_seed_decides_the_weights() -> None:
    one, same, other = (bp.MLP([5, 9, 2], seed=s, device="reference") for s in (1, 1, 2))
    assert bits(one.state_dict()) == bits(same.state_dict()) != bits(other.state_dict())
    assert bp.MLP([5, 9, 2], seed=1, dtype="float64", device="reference").parameters.astype(
        np.float32
    ).tobytes() == one.parameters.tobytes()  # fmt: skip


def test_predict_is_forward_without_dropout_by_running_statistics(device: str) -> None:
    model = normed(device, dtype="float64")
    X = rng.standard_normal((37, 5))
    s = model.state_dict()

    def batch_norm(Z: Array, name: str) -> Array:
        mean, var = s[f"{name}.running_mean"], s[f"{name}.running_var"]
        return (Z - mean) / np.sqrt(var + 1e-5) * s[f"{name}.weight"] + s[f"{name}.bias"]

    def gelu(z: Array) -> Array:
        from scipy.special import ndtr  # type: ignore[import-untyped]

        return z * ndtr(z)

    H = gelu(batch_norm(X, "norms.0") @ s["layers.0.weight"].T + s["layers.0.bias"])
    H = (H - H.mean(1, keepdims=True)) / np.sqrt(H.var(1, keepdims=True) + 1e-5)
    H = np.tanh(H * s["norms.1.weight"] + s["norms.1.bias"])
    H = np.maximum(batch_norm(H @ s["layers.1.weight"].T, "norms.2"), 0)
    expected = H @ s["layers.2.weight"].T + s["layers.2.bias"]
    np.testing.assert_allclose(model.predict(X), expected, rtol=1e-12, atol=1e-12)
    assert bits(model.state_dict()) == bits(s)


def test_predict_in_parts_is_predict_of_all(device: str) -> None:
    model = normed(device, dtype="float64")
    X = rng.standard_normal((37, 5))
    whole = model.predict(X)
    for rows in (1, 2, 10, 36, 37, 38, 1000):
        np.testing.assert_allclose(model.predict(X, batch_size=rows), whole, rtol=1e-12)
    assert model.predict(X[:0]).shape == (0, 3) and model.predict(X[:0]).dtype == np.float64


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_models_of_their_own(copied: Any, device: str) -> None:
    model = normed(device, dtype="float64")
    model.freeze("layers.0")
    model.encoder = {"rows": "to numbers"}  # whatever it is
    before = bits(model.state_dict())
    twin = copied(model)
    assert bits(twin.state_dict()) == before and twin.frozen == model.frozen
    assert (twin.device, twin.dtype, twin.encoder) == (model.device, model.dtype, model.encoder)
    twin.encoder = model.encoder = None
    X = rng.standard_normal((8, 5))
    assert twin.predict(X).tobytes() == model.predict(X).tobytes()
    bp.fit(twin, X, X[:, :3], progress=False)
    twin.unfreeze()
    assert bits(model.state_dict()) == before != bits(twin.state_dict()) and model.frozen
    assert type(copied(bp.MLP([3, 2]))) is bp.MLP


def test_output_activation_is_applied_by_predict(device: str) -> None:
    X = rng.standard_normal((11, 4))
    linear = bp.MLP([4, 6, 2], device=device, dtype="float64")
    squashed = bp.MLP([4, 6, 2], output_activation="tanh", device=device, dtype="float64")
    squashed.load_state_dict(linear.state_dict())
    np.testing.assert_allclose(squashed.predict(X), np.tanh(linear.predict(X)), rtol=1e-13)


def test_predict_proba_is_softmax_or_sigmoid_of_predict(device: str) -> None:
    X = 300 * rng.standard_normal((11, 4))
    for outputs in (1, 2, 3):
        model = bp.MLP([4, 6, outputs], device=device, dtype="float64")
        Z = model.predict(X)
        if outputs == 1:
            expected = 1 / (1 + np.exp(-Z))
        else:
            E = np.exp(Z - Z.max(axis=1, keepdims=True))
            expected = E / E.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(model.predict_proba(X), expected, rtol=1e-13, atol=1e-300)


def test_sizes_are_counted() -> None:
    model = normed()
    assert (model.in_features, model.out_features) == (5, 3)
    # the three Linear, the norms' weights and biases
    assert model.n_parameters == (5 * 7 + 7) + 7 * 4 + (4 * 3 + 3) + 2 * (5 + 7 + 4)
    assert model.parameters.ctypes.data % 64 == 0
    assert all(v.ctypes.data % 64 == 0 for v in model.layout.views(model.parameters).values())


def test_predicting_few_rows_again_sees_the_parameters_of_now(device: str) -> None:
    """A captured pass is kept between calls; it must not keep anything else."""
    model, other = (bp.MLP([7, 9, 3], norm="batch", seed=seed, device=device) for seed in (0, 1))
    X = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    first, expected = model.predict(X), other.predict(X)
    kept = first.copy()
    model.load_state_dict(other.state_dict())
    assert np.array_equal(model.predict(X), expected)
    assert np.array_equal(model.predict(2 * X), other.predict(2 * X))
    assert np.array_equal(first, kept)
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict(X), expected)


def test_threads_that_predict_few_rows_do_not_meet() -> None:
    model = bp.MLP([40, 64, 3])
    data = np.random.default_rng(0).standard_normal((64, 8, 40)).astype(np.float32)
    expected = [model.predict(X) for X in data]

    def check(worker: int) -> bool:
        order = np.random.default_rng(worker).integers(0, 64, 300)
        return all(np.array_equal(model.predict(data[i]), expected[i]) for i in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, range(4)))
    assert sum(map(len, model._waiting.values())) <= 5


def test_passes_kept_for_small_batches_are_few() -> None:
    model = bp.MLP([2, 1])
    X = np.ones((400, 2), np.float32)
    for rows in range(1, 400):
        assert len(model.predict(X[:rows])) == rows
    assert sum(map(len, model._waiting.values())) <= KEPT
