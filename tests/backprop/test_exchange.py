"""Models to ONNX and PyTorch and back, run by the other side's own code where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backprop_kernels.activations import ACTIVATIONS, Activation

import backprop as bp
from backprop.exchange.torch_names import MODULES

onnx = pytest.importorskip("onnx")
reference = pytest.importorskip("onnx.reference")
from onnx.reference.op_run import OpRun  # noqa: E402
from scipy import special  # noqa: E402


class Erf(OpRun):  # type: ignore[misc]
    """In float64: the evaluator's own rounds to float32."""

    op_domain = ""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (special.erf(x),)


def randomized(model: bp.Sequential, seed: int = 0) -> bp.Sequential:
    """The model with every tensor random, running statistics and gammas too."""
    rng = np.random.default_rng(seed)
    state = {
        name: rng.uniform(0.5, 2, v.shape) if name.endswith("var") else rng.normal(0, 0.5, v.shape)
        for name, v in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model


def network(activation: str, dtype: str = "float64") -> bp.Sequential:
    """Every kind of layer. Powers of two for eps: an attribute of ONNX is a float32."""
    layers = [
        bp.Dropout(0.25),
        bp.Linear(5, 7, activation=activation),
        bp.Dropout(0.5),
        bp.Linear(7, 6, bias=False),
        bp.LayerNorm(6, activation=activation, eps=2**-10),
        bp.Linear(6, 4, bias=False),
        bp.BatchNorm(4, activation=activation, momentum=0.25, eps=2**-17),
        bp.Linear(4, 4, bias=False),
        bp.RMSNorm(4, activation=activation, eps=2**-8),
        bp.Linear(4, 3),
    ]
    return randomized(bp.Sequential(layers, dtype=dtype))


def run_onnx(path: Path, X: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        result: np.ndarray = reference.ReferenceEvaluator(str(path), new_ops=[Erf]).run(
            None, {"X": X}
        )[0]
    return result


def same_model(a: bp.Sequential, b: bp.Sequential) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_onnx_computes_what_predict_does_and_comes_back(activation: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = network(activation)
    X = np.random.default_rng(1).normal(size=(9, 5))
    bp.to_onnx(model, path)
    proto = onnx.load(path)
    assert (proto.opset_import[0].version, proto.ir_version) == (17, 8)
    np.testing.assert_allclose(run_onnx(path, X), model.predict(X), rtol=1e-12, atol=1e-12)
    back = bp.from_onnx(path)
    same_model(model, back)
    expected = "elu" if activation == "celu" else activation  # the same function
    kept = [layer for layer in model.layers if not isinstance(layer, bp.Dropout)]
    for layer, read in zip(kept, back.layers, strict=True):
        assert type(layer) is type(read)
        wanted = layer.activation if layer.activation == "identity" else expected  # type: ignore[union-attr]
        assert read.activation == wanted  # type: ignore[union-attr]
    norms = [layer for layer in back.layers if not isinstance(layer, bp.Linear)]
    assert [norm.eps for norm in norms] == pytest.approx([2**-10, 2**-17, 2**-8], rel=1e-6)
    (batch_norm,) = [norm for norm in norms if isinstance(norm, bp.BatchNorm)]
    assert batch_norm.momentum == 0.25


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_traced_and_native_operators_are_accurate_in_both_tails(
    activation: str, tmp_path: Path
) -> None:
    """One weight of 1: the file computes the activation itself."""
    layers = [bp.Linear(1, 1, activation=activation)]
    model = bp.Sequential(layers, dtype="float64", device="reference")
    model.load_state_dict({"layers.0.weight": [[1.0]], "layers.0.bias": [0.0]})
    bp.to_onnx(model, tmp_path / "m.onnx")
    z = np.concatenate([np.linspace(-40, 40, 801), [-1e-8, 1e-8, -300.0, 300.0]])[:, None]
    found, expected = run_onnx(tmp_path / "m.onnx", z), model.predict(z)
    if activation in ("elu", "celu", "selu"):  # NumPy's exp(x) - 1 there: absolute accuracy only
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-300 + 1e-16)


def test_float32_any_batch_and_probabilities(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for outputs in (1, 4):
        model = randomized(bp.MLP([6, 16, outputs], activation="gelu"))
        bp.to_onnx(model, path, probabilities=True)
        for batch in (0, 1, 33):
            X = np.random.default_rng(0).normal(size=(batch, 6)).astype(np.float32)
            P = run_onnx(path, X)
            assert P.dtype == np.float32 and P.shape == (batch, outputs)
            np.testing.assert_allclose(P, model.predict_proba(X), rtol=2e-5, atol=1e-6)
    with pytest.raises(bp.CheckpointFormatError, match="got Softmax; export it without"):
        bp.from_onnx(path)


def test_a_new_activation_is_exported_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snake = Activation("z + sin(z)²", "Z", "he_uniform",
                       lambda m, z: z + m.expm1(m.sin(z)) - m.log1p(m.abs(z)),
                       lambda m, z: z)  # fmt: skip
    monkeypatch.setitem(ACTIVATIONS, "snake", snake)
    layers = [bp.Linear(5, 4, activation="snake")]
    model = randomized(bp.Sequential(layers, dtype="float64", device="reference"))
    bp.to_onnx(model, tmp_path / "m.onnx")
    X = np.random.default_rng(1).normal(size=(9, 5))
    np.testing.assert_allclose(run_onnx(tmp_path / "m.onnx", X), model.predict(X), rtol=1e-13)
    assert bp.from_onnx(tmp_path / "m.onnx").layers[0].activation == "snake"  # type: ignore[union-attr]


def foreign(nodes: list[Any], tensors: dict[str, np.ndarray], path: Path, **more: Any) -> Path:
    helper, make = onnx.helper, onnx.numpy_helper.from_array
    kind = onnx.TensorProto.FLOAT
    X = helper.make_tensor_value_info("X", kind, ["n", 3])
    Y = helper.make_tensor_value_info("Y", kind, ["n", "m"])
    graph = helper.make_graph(nodes, "g", [X], [Y], [make(v, k) for k, v in tensors.items()])
    opsets = [helper.make_opsetid("", more.pop("opset", 17)), helper.make_opsetid("com.x", 1)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, **more).SerializeToString())
    return path


def test_attributes_come_back_as_they_were_written(tmp_path: Path) -> None:
    layers = [bp.Linear(2, 3), bp.BatchNorm(3), bp.Linear(3, 2), bp.LayerNorm(2, eps=1e-6)]
    bp.to_onnx(bp.Sequential(layers), tmp_path / "m.onnx")
    assert bp.from_onnx(tmp_path / "m.onnx").layers == layers


def test_other_exporters_spellings(tmp_path: Path) -> None:
    """MatMul and Add, Gemm untransposed and scaled, GELU as PyTorch writes it, Swish by Sigmoid."""
    rng = np.random.default_rng(0)
    W1, W2, b = (rng.normal(size=s).astype(np.float32) for s in ((3, 4), (4, 2), (4,)))
    scalars = {"sqrt2": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}
    node = onnx.helper.make_node
    nodes = [
        node("Identity", ["X"], ["x0"]),
        node("MatMul", ["x0", "W1"], ["p"]),
        node("Add", ["b", "p"], ["z"]),
        node("Div", ["z", "sqrt2"], ["d"]),
        node("Erf", ["d"], ["e"]),
        node("Add", ["e", "one"], ["f"]),
        node("Mul", ["z", "f"], ["g"]),
        node("Mul", ["g", "half"], ["h"]),
        node("Dropout", ["h"], ["h2"]),
        node("Gemm", ["h2", "W2"], ["u"], alpha=0.5),
        node("Sigmoid", ["u"], ["s"]),
        node("Mul", ["s", "u"], ["Y"]),
    ]
    path = foreign(nodes, {"W1": W1, "W2": W2, "b": b, **scalars}, tmp_path / "f.onnx")
    model = bp.from_onnx(path)
    assert [layer.activation for layer in model.layers] == ["gelu", "silu"]  # type: ignore[union-attr]
    X = rng.normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_allclose(model.predict(X), run_onnx(path, X), rtol=1e-5, atol=1e-6)


REFUSED = {
    "Conv": "node Y .Conv.: expected Gemm, MatMul, .*got Conv",
    "LeakyRelu": "expected an activation of identity, relu, .*got LeakyRelu",  # slope 0.2
    "domain": "expected an operator of ONNX itself, got one of com.x",
    "computed": "expected constant weights, got computed",
    "first": "expected a layer first",
    "vector": "expected one activation for all features",
}


@pytest.mark.parametrize("case", REFUSED)
def test_graphs_that_are_no_mlp_are_refused(case: str, tmp_path: Path) -> None:
    node = onnx.helper.make_node
    W, slopes = np.ones((3, 3), np.float32), np.full(3, 0.01, np.float32)
    product = node("MatMul", ["X", "W"], ["z"])
    nodes = {
        "Conv": [node("Conv", ["X", "W"], ["Y"])],
        "LeakyRelu": [
            node("MatMul", ["X", "W"], ["z"]),
            node("LeakyRelu", ["z"], ["Y"], alpha=0.2),
        ],
        "domain": [node("Fast", ["X"], ["Y"], domain="com.x")],
        "computed": [node("MatMul", ["X", "X"], ["Y"])],
        "first": [node("Relu", ["X"], ["z"]), node("MatMul", ["z", "W"], ["Y"])],
        "vector": [product, node("PRelu", ["z", "s"], ["Y"])],
    }[case]
    path = foreign(nodes, {"W": W, "s": slopes}, tmp_path / "f.onnx")
    with pytest.raises(bp.CheckpointFormatError, match=REFUSED[case]):
        bp.from_onnx(path)


def test_files_that_are_no_onnx(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    bp.to_onnx(bp.MLP([3, 2]), path)
    whole = path.read_bytes()
    for content in (b"", b"hello world, no protobuf", whole[: len(whole) // 2], whole[7:]):
        path.write_bytes(content)
        with pytest.raises(bp.CheckpointFormatError, match="expected an ONNX model"):
            bp.from_onnx(path)


def test_without_onnx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    for call in (lambda: bp.to_onnx(bp.MLP([3, 2]), tmp_path / "m"), lambda: bp.from_onnx("m")):
        with pytest.raises(bp.MissingExtraError, match=r'pip install "fused-backprop\[onnx\]"'):
            call()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", MODULES)
def test_torch_takes_the_file_and_gives_it_back(
    activation: str, dtype: str, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    path = tmp_path / "m.safetensors"
    model = network(activation, dtype)
    module = eval(bp.to_torch(model, path), {"nn": torch.nn})
    module.load_state_dict(load_file(path))  # strict: every name and shape
    X = np.random.default_rng(1).normal(size=(9, 5)).astype(dtype)
    with torch.no_grad():
        expected = module.eval()(torch.from_numpy(X)).numpy()
    bound = 1e-12 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(model.predict(X), expected, rtol=bound, atol=bound)
    same_model(model, bp.from_torch(path, activation))
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    same_model(model, bp.from_torch(state, activation))


def test_names_are_taken_in_the_order_of_their_numbers() -> None:
    rng = np.random.default_rng(0)
    sizes = [(4, 3), *[(4, 4)] * 10, (2, 4)]
    state = {f"net.{3 * i}.weight": rng.normal(size=size) for i, size in enumerate(sizes)}
    model = bp.from_torch(dict(sorted(state.items())), "tanh", "sigmoid")
    assert len(model.layers) == 12 and model.out_features == 2
    for i, value in enumerate(model.state_dict().values()):
        np.testing.assert_array_equal(value, state[f"net.{3 * i}.weight"])
    activations = [layer.activation for layer in model.layers]  # type: ignore[union-attr]
    assert activations == ["tanh"] * 11 + ["sigmoid"]


def test_state_dicts_that_are_no_mlp_are_refused() -> None:
    W = np.ones((2, 3))
    for state, message in [
        ({"0.weight": np.ones((2, 3, 3, 3))}, "module '0': expected Linear, .* got weight"),
        ({"0.weight": W, "2.weight": W}, "expected 2 input features"),
        ({}, "expected at least one Linear"),
        ({"0.weight": W, "0.bias": np.ones(3)}, r"layers.0.bias: expected \(2,\), got \(3,\)"),
    ]:
        with pytest.raises(bp.CheckpointFormatError, match=message):
            bp.from_torch(state)
    with pytest.raises(bp.OptionError, match="from_torch: activation"):
        bp.from_torch({"0.weight": W}, "rely")


def test_a_row_of_another_length_is_no_bias(tmp_path: Path) -> None:
    node = onnx.helper.make_node
    nodes = [node("MatMul", ["X", "W"], ["Z"]), node("Add", ["Z", "b"], ["Y"])]
    tensors = {"W": np.ones((3, 2), np.float32), "b": np.ones(3, np.float32)}
    with pytest.raises(bp.CheckpointFormatError, match="one activation for all features, got vect"):
        bp.from_onnx(foreign(nodes, tensors, tmp_path / "m.onnx"))
