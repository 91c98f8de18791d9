"""The CUDA backend with its layers in one precision of the table.

`InPrecision("bf16")` has the functions of the backend, with the same signatures. Activations,
deltas and the weights it multiplies are arrays of `stored`; biases, statistics, gradients of
parameters and what the loss reads are float32. Nothing else changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from backprop_kernels import cuda
from backprop_kernels.arrays import Array, LinearLayer
from backprop_kernels.cuda import batch_norm, layer_norm
from backprop_kernels.cuda.cast import cast
from backprop_kernels.cuda.launch import capability, constant, copy, empty
from backprop_kernels.cuda.linear_dgrad import dgrad
from backprop_kernels.cuda.linear_forward import forward
from backprop_kernels.cuda.linear_wgrad import reads_along_batch, wgrad
from backprop_kernels.cuda.mlp_fit import Choice, choose
from backprop_kernels.cuda.mlp_step import whole
from backprop_kernels.cuda.tiles import ALONG_K, HOPPER_ALONE
from backprop_kernels.cuda.transpose import padded
from backprop_kernels.precisions import PRECISIONS


class InPrecision:
    """A backend whose products are those of `precision`; everything else is CUDA's own.

    With loss scaling, deltas are multiplied by a power of two from the loss on, and gradients of
    parameters divided by it where they are written: no gradient of a parameter is ever scaled.
    """

    exact = cuda  # for arrays of float32
    padded = staticmethod(padded)  # the rows of a copy that lies along the batch

    def __init__(self, precision: str) -> None:
        self.precision = PRECISIONS[precision]
        self.stored = np.dtype(self.precision.stored)
        self._scale: Array | None = None
        self._unscale: Array | None = None
        if self.precision.loss_scaling:
            self._scale, self._unscale = (constant(1, np.float32) for _ in range(2))
        self.linear_forward = partial(forward, precision)
        self.linear_dgrad = partial(dgrad, precision, self._unscale)
        self.linear_wgrad = partial(wgrad, precision, self._unscale)
        self.layer_norm_forward = partial(layer_norm.forward, precision)
        self.layer_norm_backward = partial(layer_norm.backward, precision, self._unscale)
        self.batch_norm_forward = partial(batch_norm.forward, precision)
        self.batch_norm_backward = partial(batch_norm.backward, precision, self._unscale)
        self.reads_along_batch = partial(reads_along_batch, precision)
        self.cast = partial(cast, precision)
        self.mlp_step = partial(whole, precision)

    def __getattr__(self, name: str) -> Any:
        return getattr(cuda, name)

    def reads_rounded(self, P: Array) -> bool:
        """Whether products on the GPU that holds P would cut off what is not rounded."""
        return self.precision.name in ALONG_K and capability(P) == HOPPER_ALONE

    def one_kernel(self, layers: Sequence[LinearLayer], loss: str, rows: int, P: Array) -> Choice:
        """Whether `mlp_step` serves this network on the GPU that holds P, and why."""
        return choose(layers, loss, self.precision.name, capability(P), rows)

    def set_loss_scale(self, scale: float) -> None:
        """What deltas are multiplied by from the next step on: a power of two."""
        if self._scale is not None and self._unscale is not None:
            copy(self._scale, np.full(1, scale, np.float32))
            copy(self._unscale, np.full(1, 1 / scale, np.float32))

    def loss(
        self,
        Z: Array,
        target: Array,
        name: str = "mse",
        options: Mapping[str, Any] | None = None,
        activation: str = "identity",
        sample_weight: Array | None = None,
        out: tuple[Array | None, Array | None, Array | None] | None = None,
    ) -> tuple[Array, Array, Array]:
        """`loss`; where dZ is to be `stored`, it is rounded and multiplied by the loss scale."""
        value, dZ, db = out or (None, None, None)
        given = Z, target, name, options, activation, sample_weight
        if dZ is None or dZ.dtype == Z.dtype:
            return cuda.loss(*given, out)
        exact = empty(Z.shape, Z.dtype)
        value, _, db = cuda.loss(*given, (value, exact, db))
        self.cast(exact, dZ, self._scale)
        return value, dZ, db
