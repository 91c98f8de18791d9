"""Networks: layers, one flat parameter arena, prediction, and files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from os import PathLike
from typing import Any, TypeVar

import numpy as np
from backprop_kernels import checks
from backprop_kernels.activations import ACTIVATIONS, sigmoid
from backprop_kernels.arrays import Array
from backprop_kernels.errors import (
    CheckpointFormatError,
    CheckpointMismatchError,
    KindError,
    OptionError,
    ShapeError,
)

from backprop import transfer
from backprop.arena import Layout
from backprop.batches import Rows, is_streamed, parts
from backprop.dispatch import for_device, memory_of
from backprop.initializers import INITIALIZERS
from backprop.layers import NORMS, Dropout, Layer, Linear, check_chain, mlp_layers
from backprop.losses import as_numbers, refuse_non_finite
from backprop.memory import HOST, contiguous, on_gpu
from backprop.passes import Predictor
from backprop.pieces import Room
from backprop.precision import products

DTYPES = ("float32", "float64")
PREDICT_ROWS = 8192  # rows per pass of predict: activations stay in cache at common widths
KEPT, KEPT_BYTES = 8, 2**24  # predictors to keep, of how many batch sizes and up to which size
Result = TypeVar("Result")
ARCHITECTURE = "fused-backprop"  # the metadata entry of a file that holds a model
FORMAT = "fused-backprop 1"
MAX_PARAMETERS = 2**40  # of a file: refused before anything is allocated


class Sequential:
    """A chain of layers with its parameters in one flat array.

    Args:
        layers: Linear, BatchNorm, LayerNorm, RMSNorm and Dropout, in order.
        dtype: "float32" or "float64".
        device: "auto", "cpu", "cuda", "cuda:N", or "reference" (plain NumPy, slow and exact).
        seed: of the initial weights.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        dtype: str = "float32",
        device: str = "auto",
        seed: int | None = 0,
    ) -> None:
        self.layers = list(layers)
        check_chain(self.layers)
        try:
            self.dtype = np.dtype(dtype)
        except TypeError:
            self.dtype = np.dtype(object)
        if str(self.dtype) not in DTYPES:
            raise OptionError(
                f"Sequential: dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}"
            )
        if seed is not None:
            checks.integer("Sequential", "seed", seed, 0)
        self.device = device
        self.backend = for_device(device)
        self.memory = memory_of(device)
        self.frozen: set[str] = set()  # names of tensors that training leaves alone
        self.encoder: Any = None  # how raw table rows become X, where the model was fitted on one
        self.layout = Layout(self.layers)
        self.parameters = self.memory.zeros(self.layout.size, self.dtype)
        self.statistics = {
            name: self.memory.zeros(shape, self.dtype)
            for name, shape in self.layout.statistics.items()
        }
        for name, statistic in self.statistics.items():
            self.memory.fill(statistic, 1.0 if name.endswith("var") else 0.0)
        # By rows: predictors that no call is using. A thread takes one, or makes its own.
        self._waiting: dict[int, list[Predictor]] = {}
        self._initialize(np.random.default_rng(seed))

    def _initialize(self, rng: np.random.Generator) -> None:
        views = self.layout.views(self.parameters)
        for layer, prefix in zip(self.layers, self.layout.prefixes, strict=True):
            if isinstance(layer, Linear):
                init = ACTIVATIONS[layer.activation].init if layer.init == "auto" else layer.init
                draw = INITIALIZERS[init]
                weight = draw(rng, layer.out_features, layer.in_features)
                self.memory.fill(views[f"{prefix}.weight"], weight)
            elif not isinstance(layer, Dropout):
                self.memory.fill(views[f"{prefix}.weight"], 1.0)

    @cached_property
    def in_features(self) -> int:
        """Columns of X."""
        first = next(layer for layer in self.layers if not isinstance(layer, Dropout))
        return first.in_features if isinstance(first, Linear) else first.features

    @cached_property
    def out_features(self) -> int:
        """Columns of the output."""
        last = next(layer for layer in reversed(self.layers) if not isinstance(layer, Dropout))
        return last.out_features if isinstance(last, Linear) else last.features

    @property
    def n_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(view.size for view in self.layout.views(self.parameters).values())

    def inputs(self, X: Any, where: str, finite: bool = True) -> Array:
        """X as the kernels take it: (batch, in_features), C order; searched for NaN if `finite`."""
        X = as_numbers(where, "X", X, self.memory)
        self._check_shape(X.shape, where)
        if finite:
            refuse_non_finite(where, "X", X)
        if not on_gpu(X) and X.dtype == self.dtype and X.flags.c_contiguous:
            return X  # what follows would find the same, a microsecond at a time
        with np.errstate(over="ignore"), self.memory:
            converted = contiguous(X, self.dtype)
        if finite and X.dtype.itemsize > self.dtype.itemsize:
            refuse_non_finite(where, f"X as {self.dtype}", converted)
        return converted

    def _check_shape(self, shape: tuple[int, ...], where: str) -> None:
        if len(shape) != 2 or shape[1] != self.in_features:
            hint = "; is X transposed?" if len(shape) == 2 and shape[0] == self.in_features else ""
            raise ShapeError(
                f"{where}: X: expected shape (batch, in_features={self.in_features}), "
                f"got {shape}{hint}"
            )

    def column(self, X: Any, where: str) -> Array | Rows:
        """`inputs` of an array; of what is streamed, the rows as they will be read and checked."""
        if not is_streamed(X):
            return self.inputs(X, where)
        self._check_shape(X.shape, where)
        return Rows(X, lambda part, known: self.inputs(part, where, finite=not known))

    def predict(self, X: Any, batch_size: int | None = None, precision: str | None = None) -> Array:
        """The network's output (batch, out_features) for X (batch, in_features).

        No dropout, running statistics, the last layer's activation applied. For classifiers
        these are logits; see `predict_proba`. A model with an encoder also takes raw
        rows: a `Table`, a pandas DataFrame or an Arrow table.
        A memory map or a dataset (HDF5, Zarr) is read as it goes. A CuPy array gives a CuPy array.
        `precision` as in `TrainStep`.
        """
        if self.encoder is not None:
            X = self._encoded(X)
        if batch_size is not None:
            checks.integer("predict", "batch_size", batch_size, 1)
        X = self.column(X, "predict")
        shape, there = (len(X), self.out_features), on_gpu(X)
        Y, start = self.memory.zeros(shape, self.dtype) if there else np.empty(shape, self.dtype), 0
        for out in self.outputs([X], lambda out, _: out, batch_size or PREDICT_ROWS, precision):
            Y[start : start + len(out)] = out if there else self.memory.numpy(out)
            start += len(out)
        return Y

    def outputs(
        self,
        columns: Sequence[Array | Rows],
        work: Callable[[Array, list[Array]], Result],
        rows: int = PREDICT_ROWS,
        precision: str | None = None,
        where: str = "predict",
    ) -> Iterator[Result]:
        """work(Y, part) of the outputs for the first of `columns`, up to `rows` rows at a time.

        `part` is these rows of all columns. Y is good until the next. Where a device has no room
        for so many, neither for what `work` allocates, it goes on with fewer.
        """
        rows = min(rows, max(len(columns[0]), 1))
        backend, room = products(self, precision, where), Room(where, rows)

        def predictor() -> Predictor:
            return Predictor(
                self.layers, self.parameters, self.statistics, backend, room.rows, self.memory
            )

        try:  # another thread may take the last one between a look and a grip
            predict = self._waiting[rows].pop()
        except (KeyError, IndexError):
            predict = predictor()

        def make_room() -> None:
            nonlocal predict
            predict = predictor()

        def outputs(part: list[Array], start: int) -> tuple[int, Result]:
            piece = [column[start : start + room.rows] for column in part]
            with self.memory as memory:
                return len(piece[0]), work(predict(memory.place(piece[0])), piece)

        try:
            for part in parts(columns, rows):
                start = 0
                while start < len(part[0]):
                    done, result = room.attempt(partial(outputs, part, start), make_room)
                    start += done
                    yield result
        finally:  # nobody reads Y any more
            self._keep(predict)

    def _keep(self, predict: Predictor) -> None:
        """Leave it to the next call, if small: a service predicts few rows, again and again."""
        if self.memory is HOST and predict.workspace.nbytes <= KEPT_BYTES:
            if len(self._waiting) >= KEPT:
                self._waiting.clear()
            self._waiting.setdefault(predict.workspace.batch, []).append(predict)

    def _encoded(self, X: Any) -> Any:
        """X of raw rows, where X is a table or a data frame; anything else as it is."""
        from backprop.table import Table, read_table
        from backprop.table.frames import is_frame

        if is_frame(X):
            columns = [column.name for column in self.encoder.columns]
            X = read_table(X, columns=columns, kinds=self.encoder.kinds, max_refused=0.0)
        return self.encoder.transform(X) if isinstance(X, Table) else X

    def predict_proba(
        self, X: Any, batch_size: int | None = None, precision: str | None = None
    ) -> Array:
        """Class probabilities of a classifier that was trained on logits.

        One output column: sigmoid, (batch, 1). Several: softmax, (batch, classes).
        """
        from backprop_kernels.reference import array_math as m

        found = self.predict(X, batch_size, precision)
        Z = self.memory.numpy(found)
        if self.out_features == 1:
            with np.errstate(under="ignore"):
                P = np.asarray(sigmoid(m, Z), self.dtype)
        else:
            E = np.exp(Z - Z.max(axis=1, keepdims=True))
            P = np.asarray(E / E.sum(axis=1, keepdims=True))
        return self.memory.place(P) if on_gpu(found) else P

    def freeze(self, *names: str, depth: int | None = None) -> None:
        """Leave parameters alone from the next fit on: by name, by depth, or all.

        A name is that of a tensor ("layers.0.bias"), of a layer ("layers.0") or a pattern
        ("*.bias"); `depth=2` means the first two Linear layers and what lies between and behind
        them, up to the third. Below the lowest layer that is trained nothing is computed
        backward, and batch norms predict.
        """
        self.frozen |= transfer.tensors_of(self, names, depth, "freeze")

    def unfreeze(self, *names: str, depth: int | None = None) -> None:
        """Train parameters again: by name, by depth, or all."""
        self.frozen -= transfer.tensors_of(self, names, depth, "unfreeze")

    def with_head(
        self, out_features: int, activation: str | None = None, init: str | None = None,
        seed: int = 0,
    ) -> Sequential:  # fmt: skip
        """A copy with a new last Linear layer, freshly initialised; the rest is kept.

        `activation` and `init` are those of the old one unless given; "zeros" starts undecided.
        """
        return transfer.with_head(self, out_features, activation, init, seed)

    def warm_start(self, source: Any) -> transfer.Match:
        """Take what fits by name and shape from `source`: a model, a file or a state_dict.

        The report says what matched and what did not; print it.
        """
        return transfer.warm_start(self, source)

    def state_dict(self) -> dict[str, Array]:
        """Copies of all parameters and running statistics, in PyTorch's layout and order."""
        tensors = {**self.layout.views(self.parameters), **self.statistics}
        return {name: self.memory.numpy(view.copy()) for name, view in tensors.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the values of `state`; every name and shape must match, or nothing changes."""
        tensors = {**self.layout.views(self.parameters), **self.statistics}
        problems = [f"missing {name}" for name in tensors if name not in state]
        problems += [f"unexpected {name}" for name in state if name not in tensors]
        for name, view in tensors.items():
            if name in state and np.shape(state[name]) != view.shape:
                problems.append(f"{name}: expected {view.shape}, got {np.shape(state[name])}")
        if problems:
            raise CheckpointMismatchError(f"load_state_dict: {'; '.join(problems)}")
        values = {name: as_numbers("load_state_dict", name, state[name]) for name in tensors}
        for name, value in values.items():
            self.memory.fill(tensors[name], value)

    def config(self) -> dict[str, Any]:
        """The architecture as plain data, from which `load` builds the model again."""
        return {
            "format": FORMAT,
            "dtype": str(self.dtype),
            "layers": [{"kind": type(layer).__name__, **asdict(layer)} for layer in self.layers],
            "encoder": None if self.encoder is None else self.encoder.to_dict(),
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file: tensors, checksums, architecture. Atomic and durable."""
        from backprop.checkpoint import write_tensors

        write_tensors(path, *self.content())

    def content(self) -> tuple[dict[str, Array], dict[str, str]]:
        """(tensors, metadata) of the model's file."""
        from backprop.tensor_header import parse_text

        architecture = json.dumps(self.config(), allow_nan=False)
        parse_text(architecture, "save: architecture")  # what could not be read is not written
        return self.state_dict(), {"format": "pt", ARCHITECTURE: architecture}

    def __getstate__(self) -> dict[str, Any]:
        """For `copy` and `pickle` within a program; `save` is for files."""
        kept = {name: getattr(self, name) for name in ("layers", "device", "frozen", "encoder")}
        return {**kept, "dtype": str(self.dtype), "tensors": self.state_dict()}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        Sequential.__init__(
            self, state["layers"], dtype=state["dtype"], device=state["device"], seed=None
        )
        self.frozen, self.encoder = set(state["frozen"]), state["encoder"]
        self.load_state_dict(state["tensors"])

    def __repr__(self) -> str:
        inner = ", ".join(map(repr, self.layers))
        return f"{type(self).__name__}([{inner}], dtype={str(self.dtype)!r})"


class MLP(Sequential):
    """A multi-layer perceptron: `MLP([155, 256, 128, 1])` has two hidden layers.

    Args:
        sizes: in_features, every hidden width, out_features.
        activation: of the hidden layers. The output is linear: losses take logits.
        dropout: rate after every hidden layer.
        norm: None, "batch", "layer" or "rms", between each hidden product and its activation.
        init: "auto" (by activation) or a name from `backprop.initializers`.
        output_activation: of the last layer.
        input_dropout: rate at the input.
        dtype, device, seed: as for Sequential.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str = "relu",
        dropout: float = 0.0,
        norm: str | None = None,
        init: str = "auto",
        *,
        output_activation: str = "identity",
        input_dropout: float = 0.0,
        dtype: str = "float32",
        device: str = "auto",
        seed: int | None = 0,
    ) -> None:
        if not isinstance(sizes, Sequence) or isinstance(sizes, str) or len(sizes) < 2:
            raise KindError(
                f"MLP: sizes: expected at least [in_features, out_features], got {sizes!r}"
            )
        layers = mlp_layers(
            list(sizes), activation, output_activation, dropout, norm, init, input_dropout
        )
        super().__init__(list(layers), dtype=dtype, device=device, seed=seed)


LAYERS = {kind.__name__: kind for kind in (Linear, Dropout, *NORMS.values())}


def load(path: str | PathLike[str], device: str = "auto") -> Sequential:
    """The model in `path`, checked byte for byte. Nothing in the file is executed.

    A checkpoint of `fit` holds a model too; of a folder of them the newest whole one is taken.
    Raises CheckpointFormatError where the file is not a model of this library, and
    CheckpointCorruptError where its checksums do not match.
    """
    from backprop.generations import model_part, read_checkpoint
    from backprop.tensor_header import parse_text

    path, tensors, metadata = read_checkpoint(path)
    tensors = model_part(tensors)
    if ARCHITECTURE not in metadata:
        raise CheckpointFormatError(
            f"load: {path}: expected a model saved by fused-backprop, got a safetensors file "
            "without its architecture; build the model and use load_state_dict"
        )
    try:
        config = parse_text(metadata[ARCHITECTURE], f"load: {path}: architecture")
        if config["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT!r}, got {config['format']!r}")
        layers = [LAYERS[entry.pop("kind")](**entry) for entry in config["layers"]]
        size = Layout(layers).size
        if size > MAX_PARAMETERS or size > 2 * sum(t.size for t in tensors.values()) + 16 * len(
            tensors
        ):
            raise ValueError(f"the architecture wants {size} parameters, the file holds fewer")
        model = Sequential(layers, dtype=config["dtype"], device=device, seed=None)
        if config["encoder"] is not None:
            from backprop.table import Encoder

            model.encoder = encoder = Encoder.from_dict(config["encoder"])
            ends = len(encoder.feature_names), encoder.outputs
            if ends != (model.in_features, model.out_features):
                raise ValueError(f"the encoder wants {ends[0]} inputs and {ends[1]} outputs")
    except (KeyError, TypeError, ValueError, RecursionError) as problem:
        raise CheckpointFormatError(f"load: {path}: architecture: {problem}") from problem
    model.load_state_dict(tensors)
    return model
