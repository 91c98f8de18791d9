"""One flat array for all parameters: where each tensor lies in it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from backprop_kernels.arrays import Array

from backprop.layers import BatchNorm, Dropout, Layer, Linear, RMSNorm


class Layout:
    """Names, shapes and offsets of the tensors of a network, in PyTorch's naming.

    Linear layers are "layers.N.weight" (out, in) and "layers.N.bias"; norms "norms.N.weight",
    "norms.N.bias" and, outside the arena, their running statistics. The arena is padded so that
    every tensor starts on a cache line; the padding is zero and no update rule moves it.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.statistics: dict[str, tuple[int, ...]] = {}
        self.prefixes: list[str] = []  # one per layer; "" for Dropout
        linears = norms = 0
        for layer in layers:
            prefix = ""
            if isinstance(layer, Linear):
                prefix, linears = f"layers.{linears}", linears + 1
                self.shapes[f"{prefix}.weight"] = (layer.out_features, layer.in_features)
                if layer.bias:
                    self.shapes[f"{prefix}.bias"] = (layer.out_features,)
            elif not isinstance(layer, Dropout):
                prefix, norms = f"norms.{norms}", norms + 1
                for name in ("weight",) if isinstance(layer, RMSNorm) else ("weight", "bias"):
                    self.shapes[f"{prefix}.{name}"] = (layer.features,)
                if isinstance(layer, BatchNorm):
                    for name in ("running_mean", "running_var"):
                        self.statistics[f"{prefix}.{name}"] = (layer.features,)
            self.prefixes.append(prefix)
        self.offsets: dict[str, int] = {}
        end = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = end
            end += -(-math.prod(shape) // 16) * 16
        self.size = end

    def views(self, flat: Array) -> dict[str, Array]:
        """The named tensors of a flat array, as views."""
        return {
            name: flat[self.offsets[name] : self.offsets[name] + math.prod(shape)].reshape(shape)
            for name, shape in self.shapes.items()
        }
