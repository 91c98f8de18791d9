"""Writes a model as an ONNX file, opset 17, that runtimes without this library can run.

The graph is the model at prediction: no dropout, running statistics. An activation becomes the ONNX
operator of its name where there is one; the formula of any other is traced, as the CPU kernels
trace it, so a new entry of the activation table can be exported at once.
"""

from __future__ import annotations

import json
from os import PathLike, fspath
from typing import Any

import numpy as np
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.arrays import Array
from backprop_kernels.errors import KindError, OptionError

from backprop.extras import need
from backprop.layers import BatchNorm, Dropout, LayerNorm, Linear, RMSNorm
from backprop.model import Sequential

OPSET, IR_VERSION = 17, 8
MAX_BYTES = 2**31 - 2**20  # of a protobuf message, with room for the graph around the tensors

# Opset 17 has no RMS norm: the file brings it as a function of this domain.
DOMAIN, RMS_NORM = "fused_backprop", "RMSNormalization"

# ONNX operators that compute exactly this activation, with their attributes.
OPERATORS: dict[str, tuple[str, dict[str, float]]] = {
    "relu": ("Relu", {}),
    "leaky_relu": ("LeakyRelu", {"alpha": 0.01}),
    "elu": ("Elu", {}),
    "celu": ("Elu", {}),  # equal at alpha = 1; Celu is for float32 alone
    "selu": ("Selu", {}),
    "softplus": ("Softplus", {}),
    "softsign": ("Softsign", {}),
    "tanh": ("Tanh", {}),
    "sigmoid": ("Sigmoid", {}),
    "hardsigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "hardswish": ("HardSwish", {}),
    "sin": ("Sin", {}),
    "exp": ("Exp", {}),
}
# Attributes are float32: in a float64 model these would be off in the eighth digit.
ROUNDED = ("leaky_relu", "selu", "hardsigmoid", "hardswish")


def to_onnx(model: Sequential, path: str | PathLike[str], *, probabilities: bool = False) -> None:
    """Write `model` to an ONNX file: input "X" (batch, in_features), output "Y".

    Args:
        probabilities: end with sigmoid (one output) or softmax (several), as `predict_proba` does;
            without it "Y" is what `predict` returns.

    Needs the extra `onnx`. Raises OptionError for a model beyond ONNX's 2 GiB, and
    CheckpointWriteError if the file cannot be written.
    """
    if not isinstance(model, Sequential):
        raise KindError(f"to_onnx: model: expected a model, got {type(model).__name__}")
    from backprop.durable_file import replace_file

    onnx = need("onnx", "onnx", "to_onnx")
    if model.parameters.nbytes > MAX_BYTES:
        raise OptionError(
            f"to_onnx: model: expected at most {MAX_BYTES:,} bytes of parameters, which is what an "
            f"ONNX file holds, got {model.parameters.nbytes:,}; use to_torch"
        )
    graph = Graph(onnx, model.dtype)
    Y = _network(graph, model)
    if probabilities:
        softmax = ("Softmax", {"axis": 1})
        operator, attributes = ("Sigmoid", {}) if model.out_features == 1 else softmax
        Y = graph.node(operator, [Y], "P", **attributes)
    proto = graph.model(Y, model)
    onnx.checker.check_model(proto, full_check=True)
    replace_file(fspath(path), [proto.SerializeToString()])


def _network(graph: Graph, model: Sequential) -> str:
    """Append every layer; returns the name of the output."""
    state = model.state_dict()
    Y = "X"
    for layer, prefix in zip(model.layers, model.layout.prefixes, strict=True):
        if isinstance(layer, Dropout):
            continue
        names = [f"{prefix}.{kind}" for kind in ("weight", "bias") if f"{prefix}.{kind}" in state]
        if isinstance(layer, BatchNorm):
            names += [f"{prefix}.running_mean", f"{prefix}.running_var"]
        inputs = [Y, *(graph.tensor(name, state[name]) for name in names)]
        operator, attributes = _operator(layer)
        Z = graph.node(operator, inputs, f"{prefix}.Z", **attributes)
        Y = _activation(graph, layer.activation, Z, f"{prefix}.Y")
    return Y


def _operator(layer: Linear | BatchNorm | LayerNorm | RMSNorm) -> tuple[str, dict[str, Any]]:
    if isinstance(layer, Linear):
        return "Gemm", {"transB": 1}
    if isinstance(layer, LayerNorm):
        return "LayerNormalization", {"epsilon": layer.eps}
    if isinstance(layer, RMSNorm):
        return RMS_NORM, {"epsilon": layer.eps, "domain": DOMAIN}
    return "BatchNormalization", {"epsilon": layer.eps, "momentum": 1 - layer.momentum}


def _activation(graph: Graph, name: str, Z: str, Y: str) -> str:
    if name == "identity":
        return Z
    if name in OPERATORS and not (name in ROUNDED and graph.dtype == np.float64):
        operator, attributes = OPERATORS[name]
        return graph.node(operator, [Z], Y, **attributes)
    graph.prefix = Y
    traced: Value = ACTIVATIONS[name].forward(Functions(graph), Value(graph, Z))
    return traced.name


class Graph:
    """Nodes and constants of an ONNX graph as it grows."""

    def __init__(self, onnx: Any, dtype: np.dtype[Any]) -> None:
        self.onnx, self.dtype = onnx, dtype
        self.nodes: list[Any] = []
        self.tensors: dict[str, Any] = {}
        self.prefix = ""  # of the names of traced values

    def node(self, operator: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        """Append a node; returns the name of its output."""
        output = output or f"{self.prefix}.{len(self.nodes)}"
        make = self.onnx.helper.make_node
        self.nodes.append(make(operator, inputs, [output], name=output, **attributes))
        return output

    def tensor(self, name: str, array: Array) -> str:
        """A constant of the graph."""
        if name not in self.tensors:
            self.tensors[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def model(self, output: str, model: Sequential) -> Any:
        """The whole file."""
        helper = self.onnx.helper
        self.nodes.append(helper.make_node("Identity", [output], ["Y"], name="Y"))
        kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        ends = [("X", model.in_features), ("Y", model.out_features)]
        X, Y = (helper.make_tensor_value_info(n, kind, ["batch", width]) for n, width in ends)
        graph = helper.make_graph(self.nodes, "mlp", [X], [Y], list(self.tensors.values()))
        opset = [helper.make_opsetid("", OPSET)]
        own = any(node.domain == DOMAIN for node in self.nodes)
        proto = helper.make_model(
            graph, producer_name="fused-backprop", ir_version=IR_VERSION,
            opset_imports=[*opset, helper.make_opsetid(DOMAIN, 1)] if own else opset,
            functions=[self._rms_norm(opset)] if own else [],
        )  # fmt: skip
        if model.encoder is not None:
            names = json.dumps(list(model.encoder.feature_names), ensure_ascii=False)
            helper.set_model_props(proto, {"feature_names": names})
        return proto

    def _rms_norm(self, opset: list[Any]) -> Any:
        """Y = scale X/√(mean X² + epsilon), as a function of the file."""
        node, protos = self.onnx.helper.make_node, self.onnx
        epsilon = node("Constant", [], ["e"])
        kind = protos.AttributeProto.FLOAT
        reference = protos.AttributeProto(name="value_float", ref_attr_name="epsilon", type=kind)
        epsilon.attribute.append(reference)
        nodes = [
            node("Mul", ["X", "X"], ["square"]),
            node("ReduceMean", ["square"], ["mean"], axes=[-1]),
            epsilon,
            node("CastLike", ["e", "X"], ["eps"]),
            node("Add", ["mean", "eps"], ["shifted"]),
            node("Sqrt", ["shifted"], ["root"]),
            node("Div", ["X", "root"], ["unit"]),
            node("Mul", ["unit", "scale"], ["Y"]),
        ]
        make = self.onnx.helper.make_function
        return make(DOMAIN, RMS_NORM, ["X", "scale"], ["Y"], nodes, opset, ["epsilon"])


class Value:
    """What a formula computes with when it is traced: a tensor of the graph."""

    def __init__(self, graph: Graph, name: str) -> None:
        self.graph, self.name = graph, name

    def _node(self, operator: str, *inputs: Any) -> Value:
        names = [constant(self.graph, value) for value in inputs]
        return Value(self.graph, self.graph.node(operator, names))

    def __add__(self, other: Any) -> Value:
        return self._node("Add", self, other)

    def __sub__(self, other: Any) -> Value:
        return self._node("Sub", self, other)

    def __rsub__(self, other: Any) -> Value:
        return self._node("Sub", other, self)

    def __mul__(self, other: Any) -> Value:
        return self._node("Mul", self, other)

    def __truediv__(self, other: Any) -> Value:
        return self._node("Div", self, other)

    def __rtruediv__(self, other: Any) -> Value:
        return self._node("Div", other, self)

    def __neg__(self) -> Value:
        return self._node("Neg", self)

    def __lt__(self, other: Any) -> Value:
        return self._node("Less", self, other)

    def __le__(self, other: Any) -> Value:
        return self._node("LessOrEqual", self, other)

    def __gt__(self, other: Any) -> Value:
        return self._node("Greater", self, other)

    def __ge__(self, other: Any) -> Value:
        return self._node("GreaterOrEqual", self, other)

    __radd__ = __add__
    __rmul__ = __mul__


def constant(graph: Graph, value: Any) -> str:
    """The name of a value of the graph, or of a number made one."""
    if isinstance(value, Value):
        return value.name
    return graph.tensor(f"constant {float(value)!r}", np.array(value, graph.dtype))


FUNCTIONS = {
    "abs": "Abs", "cos": "Cos", "erf": "Erf", "exp": "Exp", "log": "Log", "sign": "Sign",
    "sin": "Sin", "sqrt": "Sqrt", "tanh": "Tanh", "where": "Where",
}  # fmt: skip


class Functions:
    """The math namespace `m` of a traced formula."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def __getattr__(self, name: str) -> Any:
        operator = FUNCTIONS[name]

        def apply(*values: Any) -> Value:
            names = [constant(self.graph, value) for value in values]
            return Value(self.graph, self.graph.node(operator, names))

        return apply

    # ONNX has neither; 1 + x and e^x − 1 would lose a small x.
    def log1p(self, x: Any) -> Value:
        """log(1 + x) = 2 atanh(x/(2 + x))."""
        name = self.graph.node("Atanh", [constant(self.graph, x / (2.0 + x))])
        return 2.0 * Value(self.graph, name)

    def expm1(self, x: Any) -> Value:
        """exp(x) − 1 = tanh(x/2) (exp(x) + 1)."""
        product: Value = self.tanh(0.5 * x) * (self.exp(x) + 1.0)
        return product
