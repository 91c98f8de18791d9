"""The fused passes a network is trained with: the hot path, in the order it runs.

A pass is one layer with what is fused into it. Each writes preallocated arrays through one
backend, so a plan can be captured once and replayed. Two rules hold throughout:
whoever makes the gradient of a layer's output also carries it through that layer's activation and
dropout (so every `dZ` is a true ∂L/∂Z) and sums its columns into `db`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
from backprop_kernels import arrays
from backprop_kernels.activations import saved_beside
from backprop_kernels.arrays import Array

from backprop.arena import Layout
from backprop.layers import BatchNorm, Dropout, Layer, LayerNorm, Linear, RMSNorm
from backprop.memory import HOST, Memory, on_gpu

MOST_CAPTURED = 8  # numbers of rows that a predictor keeps captured


class Workspace:
    """Named buffers with room for `batch` rows, shared by plans of up to that many rows."""

    def __init__(self, batch: int, dtype: Any, memory: Memory = HOST) -> None:
        self.batch = batch
        self.memory = memory
        self.dtype = np.dtype(dtype)
        self._buffers: dict[tuple[str, Any], Array] = {}

    def rows(self, name: str, batch: int, columns: int, dtype: Any = None) -> Array:
        """The first `batch` rows of the buffer `name`."""
        key = name, dtype or self.dtype
        if key not in self._buffers:
            self._buffers[key] = self.memory.zeros((self.batch, columns), key[1])
        return self._buffers[key][:batch]

    def vector(self, name: str, size: int, dtype: Any = None) -> Array:
        key = name, dtype or self.dtype
        if key not in self._buffers:
            self._buffers[key] = self.memory.zeros(max(size, self.batch), key[1])
        return self._buffers[key][:size]

    def transposed(self, array: Array, backend: Any) -> Array:
        """Room for the transpose of what `rows` gave, laid out as the backend reads copies."""
        key = "transposed", array.data.ptr
        if key not in self._buffers:
            length = backend.padded(self.batch, array.itemsize)
            self._buffers[key] = self.memory.zeros((array.shape[1], length), array.dtype)
        return self._buffers[key][:, : len(array)]

    @property
    def nbytes(self) -> int:
        """How much memory the buffers take."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


@dataclass
class Pass(ABC):
    """One layer, the arrays it reads and writes, and its two directions."""

    backend: ModuleType
    layer: Layer
    activation: str
    dropout: arrays.Dropout | None
    weight: Array  # W, or gamma
    bias: Array | None  # b, or beta
    d_weight: Array | None
    db: Array | None
    Y: Array
    kept: Array | None  # a second output, where forward must keep something other than Y
    dZ: Array | None

    @property
    def saved(self) -> Array | None:
        """What backward reads: `kept`, or Y itself."""
        return self.Y if self.kept is None else self.kept

    def below(self) -> tuple[Array | None, str, arrays.Dropout | None]:
        """This pass as the layer above sees it."""
        return self.saved, self.activation, self.dropout

    @abstractmethod
    def forward(self, X: Array) -> None:
        """Y, and `kept`, from X."""

    def again(self, X: Array) -> None:
        """What forward made, once more: the same bits."""
        self.forward(X)

    @abstractmethod
    def delta(self, X: Array, below: Any) -> None:
        """From this pass's dZ make `below.dZ` and `below.db`."""

    @abstractmethod
    def gradient(self, X: Array) -> None:
        """From this pass's dZ make its weight's gradient."""


class InputPass(Pass):
    """Dropout of the input itself: a batch norm that changes nothing, for its epilogue."""

    def again(self, X: Array) -> None:
        """Nothing: Y has a place of its own."""

    def forward(self, X: Array) -> None:
        zeros, ones = self.bias, self.weight
        out = (self.Y, None, None, None)
        self.backend.batch_norm_forward(
            X, ones, zeros, zeros, ones, False, 0.0, 0.0, "identity", self.dropout, out=out
        )

    def delta(self, X: Array, below: Pass) -> None:
        """Nothing lies below the input."""

    def gradient(self, X: Array) -> None:
        """Nothing is trained."""


class CastPass(InputPass):
    """The input as the products of the backend's precision read it."""

    def forward(self, X: Array) -> None:
        self.backend.cast(X, self.Y)


class LinearPass(Pass):
    def forward(self, X: Array) -> None:
        self.backend.linear_forward(
            X, self.weight, self.bias, self.activation, self.dropout, out=(self.Y, self.kept)
        )

    def delta(self, X: Array, below: Pass) -> None:
        self.backend.linear_dgrad(self.dZ, self.weight, *below.below(), out=(below.dZ, below.db))

    def gradient(self, X: Array) -> None:
        if self.d_weight is not None:
            self.backend.linear_wgrad(self.dZ, X, out=self.d_weight)


class RoundingPass(LinearPass):
    """For products that read rounded numbers, some of them along the batch: what another such pass
    reads is rounded as it is made, and copied where that is asked for."""

    X_rounded = Y_rounded = dZ_rounded = False
    X_copy: Array | None = None
    Y_copy: Array | None = None
    dZ_copy: Array | None = None

    def forward(self, X: Array) -> None:
        self.backend.linear_forward(
            X, self.weight, self.bias, self.activation, self.dropout, out=(self.Y, self.kept),
            X_rounded=self.X_rounded, Y_rounded=self.Y_rounded, copy=self.Y_copy,
        )  # fmt: skip

    def delta(self, X: Array, below: Any) -> None:
        self.backend.linear_dgrad(
            self.dZ, self.weight, *below.below(), out=(below.dZ, below.db),
            dZ_rounded=self.dZ_rounded, dZ_prev_rounded=getattr(below, "dZ_rounded", False),
            copy=getattr(below, "dZ_copy", None),
        )  # fmt: skip

    def gradient(self, X: Array) -> None:
        if self.d_weight is not None:
            copies = self.dZ_copy, self.X_copy
            self.backend.linear_wgrad(self.dZ, X, out=self.d_weight, copies=copies)


class SparseInputPass(LinearPass):
    """The first layer, where most of X is 0."""

    def forward(self, X: Array) -> None:
        self.backend.sparse_input_forward(
            X, self.weight, self.bias, self.activation, self.dropout, out=(self.Y, self.kept)
        )

    def gradient(self, X: Array) -> None:
        if self.d_weight is not None:
            self.backend.sparse_input_wgrad(self.dZ, X, out=self.d_weight)


@dataclass
class NormPass(Pass):
    mean: Array
    rstd: Array
    running: tuple[Array, Array] | None  # mean and variance, of batch norm
    training: bool

    def forward(self, X: Array) -> None:
        self._forward(X, getattr(self.layer, "momentum", 0.0))

    def again(self, X: Array) -> None:
        self._forward(X, 0.0)  # the running statistics have moved already

    def _forward(self, X: Array, momentum: float) -> None:
        common = (self.activation, self.dropout, (self.Y, self.kept, self.mean, self.rstd))
        if isinstance(self.layer, BatchNorm):
            self.backend.batch_norm_forward(
                X, self.weight, self.bias, *(self.running or ()), self.training,
                momentum, self.layer.eps, *common,
            )  # fmt: skip
        elif isinstance(self.layer, LayerNorm | RMSNorm):
            self.backend.layer_norm_forward(
                X, self.weight, self.bias, self.layer.eps, *common,
                centred=isinstance(self.layer, LayerNorm),
            )  # fmt: skip

    def delta(self, X: Array, below: Pass | None) -> None:
        rest = below.below() if below else (None, "identity", None)
        out = (below.dZ, below.db, self.d_weight) if below else (None, None, self.d_weight)
        given = (self.dZ, X, self.weight, self.mean, self.rstd, *rest, out)
        if isinstance(self.layer, BatchNorm):
            self.backend.batch_norm_backward(*given)
        else:
            self.backend.layer_norm_backward(*given, centred=isinstance(self.layer, LayerNorm))

    def gradient(self, X: Array) -> None:
        """Nothing: dgamma came with the delta."""


class Plan:
    """The passes of one network for one batch size, over given parameters and buffers."""

    def __init__(
        self,
        layers: Sequence[Layer],
        parameters: Array,
        statistics: Mapping[str, Array],
        backend: ModuleType,
        workspace: Workspace,
        batch: int,
        gradients: Array | None = None,
        stream: Array | None = None,
        frozen: Collection[str] = (),
        recompute: int = 1,
        sparse_input: bool = False,
    ) -> None:
        """Without `gradients` the plan only predicts: no dropout, running statistics.

        The last pass keeps no activation: training hands it to the loss (`output_activation`),
        prediction applies it. No gradient is made of the tensors in `frozen`, nor any delta below
        the first layer that is trained; batch norms down there predict. `sparse_input`: most of X
        is 0.

        In groups of `recompute` passes only the last one's activations are kept from forward to
        backward, which makes the others once more; two deltas take turns.
        """
        layout = Layout(layers)
        training = gradients is not None
        P = layout.views(parameters)
        real = parameters.dtype
        # What products read and write; in some precisions not what is summed and updated.
        stored = getattr(backend, "stored", real)
        self._backend, self._parameters, self._weights = backend, parameters, parameters
        if stored != real:
            self._weights = workspace.vector("weights", len(parameters), stored)
        weights = layout.views(self._weights)
        G = layout.views(gradients) if gradients is not None else {}
        G = {name: g for name, g in G.items() if name not in frozen}
        trained = {name.rpartition(".")[0] for name in G}
        bottom = next((i for i, name in enumerate(layout.prefixes) if name in trained), 0)
        self.batch = batch
        self.passes: list[Pass] = []
        self.recompute = recompute
        rounds = hasattr(backend, "reads_rounded") and backend.reads_rounded(parameters)
        linear = RoundingPass if rounds else LinearPass
        first = min(i for i, layer in enumerate(layers) if not isinstance(layer, Dropout))
        last = max(i for i, layer in enumerate(layers) if not isinstance(layer, Dropout))
        for i, layer in enumerate(layers):
            if isinstance(layer, Dropout):
                if i == 0 and training and stream is not None and layer.rate > 0:
                    drop = arrays.Dropout(layer.rate, stream, 0)
                    exact = getattr(backend, "exact", backend)
                    self.passes.append(_input_pass(exact, layers[1], drop, workspace, batch))
                continue
            if stored != real and i == first:
                X = workspace.rows("X", batch, _width(layer), stored)
                nothing = Dropout(0.0), "identity", None, None, None, None, None
                self.passes.append(CastPass(backend, *nothing, X, None, None))
            activation, dropout = layer.activation, None
            if training and i == last:
                self.output_activation, activation = activation, "identity"
            if training and stream is not None and i < last:
                after = layers[i + 1]
                if isinstance(after, Dropout) and after.rate > 0:
                    dropout = arrays.Dropout(after.rate, stream, i)
            columns = layer.out_features if isinstance(layer, Linear) else layer.features
            # What is not kept lies where other passes of this width have theirs.
            number = len(self.passes)
            kept_for_backward = number % recompute == recompute - 1 or i == last
            turns = recompute if training else 2
            passing = f"{number % turns} of {columns}"
            own = str(i) if training else passing
            name = own if kept_for_backward else passing
            delta = own if recompute == 1 else f"{number % 2} of {columns}"
            dropped, bits = dropout is not None, getattr(backend, "SAVES_BITS", False)
            kept = saved_beside(activation, columns, stored, dropped, bits) if training else None
            prefix = layout.prefixes[i]
            common: dict[str, Any] = {
                "backend": backend,
                "layer": layer,
                "activation": activation,
                "dropout": dropout,
                "weight": (weights if isinstance(layer, Linear) else P)[f"{prefix}.weight"],
                "bias": P.get(f"{prefix}.bias"),
                "d_weight": G.get(f"{prefix}.weight"),
                "db": G.get(f"{prefix}.bias"),
                "Y": workspace.rows(f"Y {name}", batch, columns, real if i == last else stored),
                "kept": workspace.rows(f"kept {name}", batch, *kept) if kept else None,
                "dZ": workspace.rows(f"dZ {delta}", batch, columns, stored) if training else None,
            }
            if isinstance(layer, Linear):
                sparse = sparse_input and not self.passes
                self.passes.append((SparseInputPass if sparse else linear)(**common))
                continue
            if isinstance(layer, RMSNorm):
                common["bias"] = workspace.vector(f"zeros {own}", columns)
            per = layer.features if isinstance(layer, BatchNorm) else batch
            running = None
            if isinstance(layer, BatchNorm):
                running = statistics[f"{prefix}.running_mean"], statistics[f"{prefix}.running_var"]
            self.passes.append(
                NormPass(
                    **common,
                    mean=workspace.vector(f"mean {own}", per),
                    rstd=workspace.vector(f"rstd {own}", per),
                    running=running,
                    training=training and i >= bottom,
                )
            )
        self.bottom = next((k for k, p in enumerate(self.passes) if p.layer is layers[bottom]), 0)
        self._prepare_products(workspace)

    def _prepare_products(self, workspace: Workspace) -> None:
        """What lies between two passes that read rounded numbers is rounded as it is made, and
        where a weight's gradient reads it along the batch, written so as well. What other passes
        make, the backend rounds and copies."""
        for below, above in pairwise(self.passes):
            if isinstance(below, RoundingPass) and isinstance(above, RoundingPass):
                below.Y_rounded = above.X_rounded = below.dZ_rounded = True
                if _reads_along_batch(above):
                    below.Y_copy = above.X_copy = workspace.transposed(below.Y, above.backend)
                if _reads_along_batch(below):
                    below.dZ_copy = workspace.transposed(below.dZ, below.backend)

    def forward(self, X: Array) -> Array:
        """Y of the last pass."""
        if self._weights is not self._parameters:
            self._backend.cast(self._parameters, self._weights)
        for p in self.passes:
            p.forward(X)
            X = p.Y
        return X

    def backward(self, X: Array) -> None:
        """Every gradient, from the last pass's dZ and db that the loss left there.

        All deltas first: after them no parameter is read again, and the weight gradients are
        independent of one another. With `recompute` each gradient at once, before other passes
        use the places of its delta and its input.
        """
        inputs = [X, *(p.Y for p in self.passes[:-1])]
        lowest = self.bottom
        if self.recompute > 1:
            self._group_by_group(inputs)
            return
        for i in reversed(range(lowest + 1, len(self.passes))):
            self.passes[i].delta(inputs[i], self.passes[i - 1])
        if isinstance(self.passes[lowest], NormPass):
            self.passes[lowest].delta(inputs[lowest], None)
        for i in reversed(range(lowest, len(self.passes))):
            self.passes[i].gradient(inputs[i])

    def _group_by_group(self, inputs: Sequence[Array]) -> None:
        for i in reversed(range(self.bottom, len(self.passes))):
            self.passes[i].gradient(inputs[i])
            if i == self.bottom:
                if isinstance(self.passes[i], NormPass):
                    self.passes[i].delta(inputs[i], None)
                return
            if i % self.recompute == 0:
                for k in range(i - self.recompute, i - 1):
                    self.passes[k].again(inputs[k])
            self.passes[i].delta(inputs[i], self.passes[i - 1])


def _reads_along_batch(p: Pass) -> bool:
    """Whether its weight's gradient does."""
    return p.d_weight is not None and p.backend.reads_along_batch(p.dZ, p.d_weight)


def _width(layer: Layer) -> int:
    """Of what it takes."""
    return layer.in_features if isinstance(layer, Linear) else getattr(layer, "features", 0)


class Predictor:
    """X → Y of up to `rows` rows, with the buffers for it: for one caller at a time.

    Y is good until the next call. In host memory each number of rows is captured on its first use.
    """

    def __init__(
        self, layers: Sequence[Layer], parameters: Array, statistics: Mapping[str, Array],
        backend: ModuleType, rows: int, memory: Memory,
    ) -> None:  # fmt: skip
        self.workspace = Workspace(rows, parameters.dtype, memory)
        self._given = layers, parameters, statistics, backend, self.workspace
        self._backend = backend
        self._captured: dict[int, tuple[Callable[..., object], Array]] = {}

    def __call__(self, X: Array) -> Array:
        """The outputs of X (batch, in_features)."""
        if len(X) not in self._captured:
            if len(self._captured) == MOST_CAPTURED:
                self._captured.clear()
            self._captured[len(X)] = self._capture(X)
        forward, Y = self._captured[len(X)]
        forward(X)
        return Y

    def _capture(self, X: Array) -> tuple[Callable[..., object], Array]:
        plan = Plan(*self._given, len(X))
        Y = plan.passes[-1].Y
        if on_gpu(X):
            return plan.forward, Y

        def forward(X: Array) -> None:
            plan.forward(X)

        return self._backend.capture(forward, X), Y


def _input_pass(
    backend: ModuleType, first: Layer, dropout: arrays.Dropout, workspace: Workspace, batch: int
) -> InputPass:
    columns = _width(first)
    ones = workspace.vector("ones of the input", columns)
    ones[...] = 1
    zeros = workspace.vector("zeros of the input", columns)
    Y = workspace.rows("Y of the input", batch, columns)
    return InputPass(
        backend, Dropout(dropout.rate), "identity", dropout, ones, zeros, None, None, Y, None, None
    )
