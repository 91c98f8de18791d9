"""Models to and from other libraries: ONNX files, and PyTorch's names in safetensors files."""

from backprop.exchange.from_onnx import from_onnx
from backprop.exchange.to_onnx import to_onnx
from backprop.exchange.torch_names import from_torch, to_torch

__all__ = ["from_onnx", "from_torch", "to_onnx", "to_torch"]
