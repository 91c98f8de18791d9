"""`backprop export`: what is ours goes out, what is foreign comes in."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from backprop_kernels.errors import OptionError

from backprop.checkpoint import read_tensors
from backprop.exchange import from_onnx, from_torch, to_onnx, to_torch
from backprop.model import ARCHITECTURE, Sequential, load

SUFFIXES = (".onnx", ".safetensors")


def run(options: Namespace) -> None:
    """Convert a model file; the formats follow from the names and from what the first one holds."""
    for path in (options.model, options.output):
        if Path(path).suffix.lower() not in SUFFIXES:
            raise OptionError(
                f"export: expected a name ending in .onnx or .safetensors, got {path}"
            )
    model, ours = _read(options)
    into_onnx = Path(options.output).suffix.lower() == ".onnx"
    if options.probabilities and not into_onnx:
        raise OptionError(f"export: --probabilities: expected an .onnx file, got {options.output}")
    if into_onnx:
        to_onnx(model, options.output, probabilities=options.probabilities)
        inputs = f"X (batch, {model.in_features})"
        if model.encoder is not None:
            inputs += ": encoded features, named in the file's metadata as feature_names"
        print(f"wrote {options.output}: ONNX, opset 17; input {inputs}")
    elif ours:
        print(f"wrote {options.output}: PyTorch's names, for\n{to_torch(model, options.output)}")
    else:
        model.save(options.output)
        print(f"wrote {options.output}: {model}")


def _read(options: Namespace) -> tuple[Sequential, bool]:
    """The model, and whether it came from a file of this library."""
    if Path(options.model).suffix.lower() == ".onnx":
        return from_onnx(options.model, device="reference"), False
    if ARCHITECTURE in read_tensors(options.model)[1]:
        return load(options.model, device="reference"), True
    activations = options.activation, options.output_activation
    return from_torch(options.model, *activations, device="reference"), False
