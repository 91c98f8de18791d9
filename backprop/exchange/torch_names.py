"""Models to and from PyTorch: safetensors files with the names of an `nn.Sequential`'s state_dict.

PyTorch counts every module of a Sequential, activations and dropout included, so a first hidden
layer is "0.weight", its ReLU 1, and the next layer "2.weight". No PyTorch is needed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from os import PathLike, fspath

import numpy as np
from backprop_kernels import checks
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.arrays import Array
from backprop_kernels.errors import CheckpointFormatError, KindError

from backprop.exchange.chain import Link, build
from backprop.layers import BatchNorm, Dropout, Layer, LayerNorm, Linear, RMSNorm
from backprop.losses import as_numbers
from backprop.model import Sequential

# How PyTorch spells an activation; the others have no module there and need one written by hand.
MODULES = {
    "relu": "ReLU()", "leaky_relu": "LeakyReLU(0.01)", "relu6": "ReLU6()", "elu": "ELU()",
    "celu": "CELU()", "selu": "SELU()", "gelu": "GELU()", "gelu_tanh": "GELU(approximate='tanh')",
    "silu": "SiLU()", "mish": "Mish()", "softplus": "Softplus()", "softsign": "Softsign()",
    "tanh": "Tanh()", "sigmoid": "Sigmoid()", "hardtanh": "Hardtanh()",
    "hardsigmoid": "Hardsigmoid()", "hardswish": "Hardswish()",
}  # fmt: skip


def to_torch(model: Sequential, path: str | PathLike[str]) -> str:
    """Write the tensors of `model` under PyTorch's names; returns the module that takes them.

    The returned text is a Python expression: `eval` it where `nn` is `torch.nn`, or copy it. The
    file also carries it, as the metadata entry "torch". Raises CheckpointWriteError if the file
    cannot be written.
    """
    from backprop.checkpoint import write_tensors

    if not isinstance(model, Sequential):
        raise KindError(f"to_torch: model: expected a model, got {type(model).__name__}")
    tensors: dict[str, Array] = {}
    modules: list[str] = []
    state = model.state_dict()
    for layer, prefix in zip(model.layers, model.layout.prefixes, strict=True):
        at = f"{len(modules)}."
        if prefix:
            own = (name for name in state if name.startswith(f"{prefix}."))
            tensors |= {at + name.removeprefix(f"{prefix}."): state[name] for name in own}
        if isinstance(layer, BatchNorm):
            tensors[f"{at}num_batches_tracked"] = np.array(0, np.int64)
        modules += _modules(layer)
    double = ".double()" if model.dtype == np.float64 else ""
    code = f"nn.Sequential({', '.join(modules)}){double}"
    write_tensors(path, tensors, {"format": "pt", "torch": code})
    return code


def _modules(layer: Layer) -> Iterator[str]:
    if isinstance(layer, Dropout):
        yield f"nn.Dropout({layer.rate!r})"
        return
    if isinstance(layer, Linear):
        bias = "" if layer.bias else ", bias=False"
        yield f"nn.Linear({layer.in_features}, {layer.out_features}{bias})"
    elif isinstance(layer, LayerNorm):
        yield f"nn.LayerNorm({layer.features}, eps={layer.eps!r})"
    elif isinstance(layer, RMSNorm):
        yield f"nn.RMSNorm({layer.features}, eps={layer.eps!r})"
    else:
        yield f"nn.BatchNorm1d({layer.features}, eps={layer.eps!r}, momentum={layer.momentum!r})"
    if layer.activation in MODULES:
        yield f"nn.{MODULES[layer.activation]}"
    elif layer.activation != "identity":
        yield f"{layer.activation}()"


def from_torch(
    source: str | PathLike[str] | Mapping[str, object],
    activation: str = "relu",
    output_activation: str = "identity",
    *,
    device: str = "auto",
) -> Sequential:
    """The model of a PyTorch state_dict, or of a safetensors file that holds one.

    Args:
        source: names end in weight, bias, running_mean, running_var; what comes before is a
            module's place, and modules are taken in the order of the numbers in it.
        activation, output_activation: a state_dict does not say which, so you do. Where a norm
            follows a Linear, the activation is taken to come after the norm.
    """
    checks.choice("from_torch", "activation", activation, ACTIVATIONS)
    checks.choice("from_torch", "output_activation", output_activation, ACTIVATIONS)
    from backprop.checkpoint import read_tensors

    where = "from_torch"
    if not isinstance(source, Mapping):
        where = f"from_torch: {fspath(source)}"
        source = read_tensors(source)[0]
    chain = [_layer(place, tensors, where) for place, tensors in _places(source).items()]
    for i, (layer, tensors) in enumerate(chain):
        after = chain[i + 1][0] if i + 1 < len(chain) else None
        if isinstance(layer, Linear) and not isinstance(after, Linear | None):
            continue  # the norm has the activation
        name = output_activation if after is None else activation
        chain[i] = replace(layer, activation=name), tensors
    return build(chain, device, where)


def _places(source: Mapping[str, object]) -> dict[str, dict[str, Array]]:
    """The tensors of each module, modules in the order of their numbers."""
    places: dict[str, dict[str, Array]] = {}
    for name, value in source.items():
        place, _, kind = name.rpartition(".")
        if kind != "num_batches_tracked":
            places.setdefault(place, {})[kind] = as_numbers("from_torch", name, value)
    return {place: places[place] for place in sorted(places, key=_in_order)}


def _in_order(place: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", place)]


def _layer(place: str, tensors: dict[str, Array], where: str) -> Link:
    kinds, weight = set(tensors), tensors.get("weight")
    if weight is not None and weight.ndim == 2 and kinds <= {"weight", "bias"}:
        return Linear(weight.shape[1], weight.shape[0], bias="bias" in kinds), tensors
    if weight is not None and weight.ndim == 1 and kinds == {"weight", "bias"}:
        return LayerNorm(len(weight)), tensors
    if weight is not None and weight.ndim == 1 and kinds == {"weight"}:
        return RMSNorm(len(weight)), tensors
    norm = {"weight", "bias", "running_mean", "running_var"}
    if weight is not None and weight.ndim == 1 and kinds == norm:
        return BatchNorm(len(weight)), tensors
    shapes = ", ".join(f"{kind} {tensors[kind].shape}" for kind in sorted(kinds))
    raise CheckpointFormatError(
        f"{where}: module {place!r}: expected Linear, BatchNorm1d, LayerNorm or RMSNorm, "
        f"got {shapes}"
    )
