"""Builds a model from layers and their tensors, as they came from another library's file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from backprop_kernels.arrays import Array
from backprop_kernels.errors import BackpropError, CheckpointFormatError

from backprop.layers import BatchNorm, LayerNorm, Linear, RMSNorm
from backprop.model import Sequential

KnownLayer: TypeAlias = Linear | BatchNorm | LayerNorm | RMSNorm  # what a foreign file tells of
Link: TypeAlias = tuple[KnownLayer, dict[str, Array]]  # a layer and its tensors, by their last name


def build(chain: Sequence[Link], device: str, where: str) -> Sequential:
    """The model of these layers; float64 if any tensor is."""
    wide = any(tensor.dtype == np.float64 for _, tensors in chain for tensor in tensors.values())
    try:
        model = Sequential(
            [layer for layer, _ in chain],
            dtype="float64" if wide else "float32", device=device, seed=None,
        )  # fmt: skip
        state = {
            f"{prefix}.{name}": tensor
            for (_, tensors), prefix in zip(chain, model.layout.prefixes, strict=True)
            for name, tensor in tensors.items()
        }
        model.load_state_dict(state)
    except BackpropError as problem:
        raise CheckpointFormatError(f"{where}: {problem}") from problem
    return model
