"""Reads the ONNX file of a multi-layer perceptron, whichever program wrote it.

The graph must be a chain: Gemm or MatMul with Add, batch and layer norms, and between them
elementwise operators. Exporters spell an activation in many ways, so it is not recognised by its
operators but by what they compute: at a thousand points they must agree with one activation of the
table.
"""

from __future__ import annotations

from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.arrays import Array
from backprop_kernels.errors import CheckpointFormatError
from backprop_kernels.reference import array_math

from backprop.exchange.chain import Link, build
from backprop.exchange.to_onnx import DOMAIN, RMS_NORM
from backprop.extras import need
from backprop.layers import BatchNorm, LayerNorm, Linear, RMSNorm
from backprop.model import Sequential

# Both tails, both kinks of every activation in the table, and small numbers.
POINTS = np.concatenate([np.linspace(-12, 12, 1001), [-60, -1e-3, -1e-6, 0, 1e-6, 1e-3, 60]])
AGREEMENT = 1e-5  # of max(1, |value|): float32 arithmetic, in any order

LAYERS = ("Gemm", "MatMul", "BatchNormalization", "LayerNormalization", RMS_NORM)
NOTHING = ("Identity", "Dropout", "Flatten")  # at prediction, for rows of features
FOLDED = ("Constant", "Identity", "Cast", "Transpose", "Squeeze", "Unsqueeze")  # of constants
ELEMENTWISE = (
    "Abs", "Add", "Atanh", "Cast", "Celu", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp",
    "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "LeakyRelu", "Less",
    "LessOrEqual", "Log", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "Reciprocal", "Relu",
    "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh",
    "ThresholdedRelu", "Where",
)  # fmt: skip


def from_onnx(path: str | PathLike[str], *, device: str = "auto") -> Sequential:
    """The model in an ONNX file, with its weights; ready to predict or to train further.

    Needs the extra `onnx`. Raises CheckpointFormatError, naming the node, for a graph that is no
    chain of the layers and activations of this library.
    """
    path = fspath(path)
    onnx = need("onnx", "onnx", "from_onnx")
    need("onnx.reference", "onnx", "from_onnx")
    decode_error = need("google.protobuf.message", "onnx", "from_onnx").DecodeError
    try:
        proto = onnx.ModelProto.FromString(Path(path).read_bytes())
        onnx.checker.check_model(proto)
    except (decode_error, onnx.checker.ValidationError) as problem:
        raise CheckpointFormatError(
            f"from_onnx: {path}: expected an ONNX model, got {problem}"
        ) from None
    return Reader(onnx, proto, f"from_onnx: {path}").model(device)


class Reader:
    """Walks the graph once, in its order, and collects layers."""

    def __init__(self, onnx: Any, proto: Any, where: str) -> None:
        self.onnx, self.proto, self.where = onnx, proto, where
        self.constants: dict[str, Array] = {}
        self.layers: list[Link] = []
        self.same: dict[str, str] = {}  # outputs of operators that do nothing here
        self.stretch: list[Any] = []  # elementwise nodes since the last layer
        self.end = ""  # the output of the last layer

    def model(self, device: str) -> Sequential:
        """The model of the whole graph."""
        graph = self.proto.graph
        self.constants = {t.name: self._array(t) for t in graph.initializer}
        inputs = [value for value in graph.input if value.name not in self.constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            names = ", ".join(value.name for value in [*inputs, *graph.output])
            raise self._refused("graph", "one input and one output", names)
        self.end = inputs[0].name
        kind = self.onnx.helper.tensor_dtype_to_np_dtype(inputs[0].type.tensor_type.elem_type)
        self.points = POINTS.astype(kind if kind.kind == "f" else np.float32)
        for node in graph.node:
            self._node(node)
        self._activation(graph.output[0].name, "output")
        return build(self.layers, device, self.where)

    def _node(self, node: Any) -> None:
        place = f"node {node.name or node.output[0]} ({node.op_type})"
        inputs = [self.same.get(name, name) for name in node.input if name]
        own = (node.domain, node.op_type) == (DOMAIN, RMS_NORM)
        if node.domain not in ("", "ai.onnx") and not own:
            raise self._refused(place, "an operator of ONNX itself", f"one of {node.domain}")
        if node.op_type in FOLDED and all(name in self.constants for name in inputs):
            values = [self.constants[name] for name in inputs]
            self.constants[node.output[0]] = self._run([node], inputs, values, node.output[0])
        elif node.op_type in LAYERS:
            self._activation(inputs[0], place)
            layer, tensors = self._layer(node, inputs, place)
            self.layers.append((layer, tensors))
            self.end = node.output[0]
        elif node.op_type in NOTHING:
            self.same[node.output[0]] = inputs[0]
        elif node.op_type == "Add" and self._is_bias(inputs):
            self.end = node.output[0]
        elif node.op_type in ELEMENTWISE:
            self.stretch.append(node)
        else:
            hint = "; export it without, so that it returns logits" if "max" in node.op_type else ""
            expected = f"{', '.join(LAYERS)} or an elementwise operator"
            raise self._refused(place, expected, f"{node.op_type}{hint}")

    def _is_bias(self, inputs: list[str]) -> bool:
        """Whether they are a product that has no bias yet and a constant row, which it then has."""
        if not self.layers or self.stretch or self.end not in inputs:
            return False
        layer, tensors = self.layers[-1]
        b = [self.constants[name].reshape(-1) for name in inputs if name in self.constants]
        if not isinstance(layer, Linear) or layer.bias or len(b) != 1:
            return False
        if len(b[0]) not in (1, layer.out_features):
            return False
        bias = np.broadcast_to(b[0], layer.out_features)
        self.layers[-1] = replace(layer, bias=True), {**tensors, "bias": bias}
        return True

    def _layer(self, node: Any, inputs: list[str], place: str) -> Link:
        attributes = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        lacking = [name for name in inputs[1:] if name not in self.constants]
        if lacking or len(inputs) < 2:
            raise self._refused(place, "constant weights", f"computed {', '.join(lacking)}")
        W, *rest = [self.constants[name] for name in inputs[1:]]
        if node.op_type in ("Gemm", "MatMul"):
            if W.ndim != 2 or attributes.get("transA"):
                raise self._refused(place, "X times a matrix", f"shape {W.shape}, {attributes}")
            W = (W if attributes.get("transB") else W.T) * attributes.get("alpha", 1.0)
            tensors = {"weight": W}
            if rest:
                b = rest[0].reshape(-1) * attributes.get("beta", 1.0)
                tensors["bias"] = np.broadcast_to(b, len(W))
            return Linear(W.shape[1], W.shape[0], bias=bool(rest)), tensors
        eps = _decimal(attributes.get("epsilon", 1e-5))
        if W.ndim != 1 or attributes.get("axis", -1) not in (-1, 1):
            raise self._refused(place, "a norm of features", f"shape {W.shape}, {attributes}")
        if node.op_type == RMS_NORM:
            return RMSNorm(len(W), eps=eps), {"weight": W}
        tensors = {"weight": W, "bias": rest[0] if rest else np.zeros_like(W)}
        if node.op_type == "LayerNormalization":
            return LayerNorm(len(W), eps=eps), tensors
        tensors |= {"running_mean": rest[1], "running_var": rest[2]}
        momentum = _decimal(1 - attributes.get("momentum", 0.9))
        return BatchNorm(len(W), momentum=momentum, eps=eps), tensors

    def _activation(self, name: str, place: str) -> None:
        """Give the last layer the activation that the nodes from its output to `name` compute."""
        name = self.same.get(name, name)
        nodes, self.stretch = self.stretch, []
        if name == self.end:
            return
        if not self.layers:
            raise self._refused(place, "a layer first", "elementwise operators on the input")
        wanted = {self.same.get(i, i) for node in nodes for i in node.input if i}
        used = sorted(wanted & self.constants.keys())
        values = [self.constants[constant] for constant in used]
        large = [constant for constant, value in zip(used, values, strict=True) if value.size > 1]
        if large:
            raise self._refused(place, "one activation for all features", f"vectors {large}")
        found = self._run(nodes, [self.end, *used], [self.points, *values], name)
        for activation, entry in ACTIVATIONS.items():
            with np.errstate(all="ignore"):
                expected = np.asarray(entry.forward(array_math, self.points.astype(np.float64)))
            if (np.abs(found - expected) <= AGREEMENT * np.maximum(1, np.abs(expected))).all():
                layer, tensors = self.layers[-1]
                self.layers[-1] = replace(layer, activation=activation), tensors
                return
        operators = ", ".join(node.op_type for node in nodes)
        raise self._refused(place, f"an activation of {', '.join(ACTIVATIONS)}", operators)

    def _run(self, nodes: list[Any], names: list[str], values: list[Array], output: str) -> Array:
        """What these nodes make of the given values."""
        helper = self.onnx.helper
        nodes = [self._renamed(node) for node in nodes]
        kinds = [helper.np_dtype_to_tensor_dtype(value.dtype) for value in values]
        inputs = [
            helper.make_tensor_value_info(name, kind, value.shape)
            for name, kind, value in zip(names, kinds, values, strict=True)
        ]
        outputs = [helper.make_tensor_value_info(output, self.onnx.TensorProto.UNDEFINED, None)]
        model = helper.make_model(
            helper.make_graph(nodes, "stretch", inputs, outputs),
            opset_imports=self.proto.opset_import,
        )
        try:
            with np.errstate(all="ignore"):
                run = self.onnx.reference.ReferenceEvaluator(model).run
                (result,) = run(None, dict(zip(names, values, strict=True)))
        except Exception as problem:  # whatever an operator raises on arguments it does not take
            places = ", ".join(node.name or node.op_type for node in nodes)
            raise self._refused(f"nodes {places}", "operators that run", str(problem)) from problem
        return np.asarray(result)

    def _renamed(self, node: Any) -> Any:
        copy = self.onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [self.same.get(name, name) for name in node.input]
        return copy

    def _array(self, tensor: Any) -> Array:
        if tensor.data_location == self.onnx.TensorProto.EXTERNAL:
            raise self._refused(tensor.name, "tensors in the file itself", "one in another file")
        array = np.asarray(self.onnx.numpy_helper.to_array(tensor))
        return array.astype(np.float32) if array.dtype == np.float16 else array

    def _refused(self, place: str, expected: str, got: str) -> CheckpointFormatError:
        return CheckpointFormatError(f"{self.where}: {place}: expected {expected}, got {got}")


def _decimal(value: float) -> float:
    """The number that was written into a float32 attribute."""
    return float(f"{value:.6g}")
