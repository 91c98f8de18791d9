"""What the launchers ask for, without running it: every unit, entry, block and argument size."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from backprop_kernels import cuda
from backprop_kernels.activations import ACTIVATIONS, saved_beside
from backprop_kernels.arrays import Dropout
from backprop_kernels.cuda import compile as nvrtc
from backprop_kernels.cuda import cublaslt, fused_update, tensor_map, tiles, tuning
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.in_precision import InPrecision
from backprop_kernels.cuda.limits import limit_rows, limit_tensor
from backprop_kernels.cuda.mlp_fit import choose
from backprop_kernels.cuda.part import STRIP, Part, part_of
from backprop_kernels.cuda.stepping import Stepping
from backprop_kernels.losses import LOSSES
from backprop_kernels.optimizers import OPTIMIZERS

from tests.cuda_host import cupy_stand_in as stand_in
from tests.cuda_host.tensor_map import encode
from tests.networks import Network


@dataclass
class Asked:
    """One entry of a unit as it was launched."""

    sizes: list[int]  # of the arguments, in bytes
    threads: set[int] = field(default_factory=set)
    shared: int = 0  # dynamic


Record = dict[Unit, dict[str, Asked]]


@contextmanager
def recording() -> Iterator[Record]:
    """Launchers called inside compute nothing; what they launch is in the record."""
    record: Record = {}
    units: list[Unit] = []

    class Module:
        def load(self, number: bytes) -> None:
            self.unit = units[int(number)]

        def get_function(self, name: str) -> Any:
            def run(grid: Any, block: Any, args: Sequence[Any], shared: int = 0) -> None:
                asked = record[self.unit].setdefault(name, Asked([a.nbytes for a in args]))
                assert asked.sizes == [a.nbytes for a in args], name
                asked.threads.add(int(np.prod(block)))
                asked.shared = max(asked.shared, shared)

            run.ptr = name  # type: ignore[attr-defined]
            return run

    def cubin(unit: Unit, arch: str) -> bytes:
        units.append(unit)
        record.setdefault(unit, {})
        return str(len(units) - 1).encode()

    cupy = ModuleType("cupy")
    vars(cupy).update(vars(stand_in))
    cupy.cuda = SimpleNamespace(**vars(stand_in.cuda))  # type: ignore[attr-defined]
    cupy.cuda.function = SimpleNamespace(Module=Module)  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", cupy)
        patch.setattr(nvrtc, "cubin", cubin)
        patch.setattr(tensor_map, "encode", encode)
        yield record


def everything(
    dtypes: Sequence[str], activations: Sequence[str], losses: Sequence[str], rules: Sequence[str]
) -> Record:
    """The record of every launcher, for these rows of the tables."""
    with recording() as record:
        for dtype in map(np.dtype, dtypes):
            for activation in activations:
                _layers(dtype, activation)
            for loss in losses:
                _loss(dtype, loss, "identity")
            for activation in activations:
                _loss(dtype, losses[0], activation)
            for rule in rules:
                _optimizer(dtype, rule)
                _stepping(rule)
                if dtype == np.float32:
                    for spans in (None, [(0, 12, 0)]):
                        _fused(cuda, dtype, rule, 3, 4, 8, spans)
                    _fused(cuda, dtype, rule, 8192, 4, 1)
            for batch in (8, 3000):  # one split, several
                cuda.linear_wgrad(_empty(dtype, batch, 3), _empty(dtype, batch, 4))
            cuda.linear_wgrad(_empty(dtype, 1, 8192), _empty(dtype, 1, 4))
            _part(cuda, dtype, 3, 4)
            cuda.gather_rows(_empty(dtype, 5, 3), _empty(np.dtype(np.int64), 2))
    return record


# Widths of whole networks: those that leave the fewest registers, and others.
NETWORKS = (
    (128, 128, 128), (128, 128, 128, 10), (64, 64, 64, 64, 64, 10), (64, 128, 128, 10),
    (100, 33, 7), (3, 5), (32,) * 9,
)  # fmt: skip
# Rows and columns of products that the tiles on tensor cores serve: small, large, wide.
EACH_TILE = ((8, 4), (4096, 256), (8192, 4))


def products(
    precision: str,
    activations: Sequence[str],
    sizes: Sequence[tuple[int, int]] = EACH_TILE,
    terms: int = 3,
    capability: int = 80,
) -> Record:
    """The record of the linear layers in a precision, also into float32, in tf32 for the next."""
    with recording() as record, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stand_in.Device, "compute_capability", str(capability))
        backend = InPrecision(precision)
        stored, real = np.dtype(backend.precision.stored), np.dtype(backend.precision.real)
        drop = Dropout(0.5, _empty(np.dtype(np.int64), 2), 1)
        for rows, columns in sizes:
            A, B = _empty(stored, rows, terms), _empty(stored, columns, terms)
            b = _empty(real, columns)
            tf32 = precision == "tf32"
            copy = _empty(stored, columns, rows) if tf32 else None
            for activation in activations:
                backend.linear_forward(A, B, b, activation, drop, Y_rounded=tf32, copy=copy)
                saved, W = _saved(stored, activation, rows, columns), _empty(stored, terms, columns)
                backend.linear_dgrad(A, W, saved, activation, drop, copy=copy)
            backend.linear_forward(A, B, out=(_empty(real, rows, columns), None))
            backend.linear_wgrad(_empty(stored, terms, rows), _empty(stored, terms, columns))
            _part(backend, stored, rows, columns)
            if precision not in ("fp16", "float64"):  # their updates are passes of their own
                _fused(backend, stored, "AdamW", rows, columns, terms)
        if stored != real:
            for activation in activations:
                _norms(backend, stored, real, activation, drop)
        backend.cast(_empty(real, 8), _empty(stored, 8))
    return record


def hopper_products(
    precision: str, activations: Sequence[str], only: Sequence[tiles.Tile]
) -> Record:
    """The same by each of the tiles for Hopper, whatever the size."""
    record: Record = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "ENOUGH_BLOCKS", 1)
        for tile in only:
            patch.setattr(tiles, "HOPPER", dict.fromkeys(tiles.HOPPER, (tile,)))
            record |= products(precision, activations, ((8, 8),), terms=8, capability=90)
    return record


def given_products(precision: str, activations: Sequence[str]) -> Record:
    """The same with sums that the library makes."""
    with pytest.MonkeyPatch.context() as patch, tuning.deciding(lambda found: found[-1]):
        patch.setattr(cublaslt, "available", lambda: True)
        patch.setattr(cublaslt, "product", lambda *_: None)
        return products(precision, activations, ((8, 8),), terms=8, capability=90)


def networks(
    capability: int, names: Sequence[str], losses: Sequence[str],
    networks: Sequence[Sequence[int]] = NETWORKS, rows: int = 2**18,
) -> Record:  # fmt: skip
    """The record of `mlp_step` in bf16: the widest networks that fit a GPU, and small ones."""
    with recording() as record, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stand_in.Device, "compute_capability", str(capability))
        backend, real = InPrecision("bf16"), np.dtype(np.float32)
        for name, loss, widths in product(names, losses, networks):
            made = Network.of(widths, name)
            if choose(made.layers, loss, "bf16", capability, rows).fit is None:
                continue
            X, P = _empty(real, rows, widths[0]), _empty(real, made.size)
            ids = loss == "cross_entropy"
            target = _empty(np.dtype(np.int64), rows) if ids else _empty(real, rows, widths[-1])
            out = stand_in.zeros((), np.float64), _empty(real, made.size)
            cuda.capture(
                lambda X, t, P, loss=loss, made=made, backend=backend, out=out: backend.mlp_step(
                    X, t, P, made.layers, loss, out=out
                ), X, target, P,
            )  # fmt: skip
    return record


def whole() -> tuple[Sequence[str], Sequence[str], Sequence[str], Sequence[str]]:
    """Every row of every table."""
    return ("float32", "float64"), tuple(ACTIVATIONS), tuple(LOSSES), tuple(OPTIMIZERS)


def _part(backend: Any, dtype: np.dtype, rows: int, columns: int) -> None:
    """`linear_wgrad` of a part of a batch that is one run, and of one that is several."""
    terms = STRIP  # or it would be served as if it were no part
    before, mass = _empty(np.dtype(np.int64), 1), _empty(np.dtype(np.float64), 1)
    for whole in (2 * terms, 2**20):
        with part_of(Part(terms, whole, before, mass)):
            backend.linear_wgrad(_empty(dtype, terms, rows), _empty(dtype, terms, columns))


def _empty(dtype: np.dtype, *shape: int) -> Any:
    return stand_in.empty(shape, dtype)


def _saved(dtype: np.dtype, activation: str, rows: int, columns: int) -> Any:
    kept = saved_beside(activation, columns, dtype, True, cuda.SAVES_BITS)
    return None if kept is None else _empty(np.dtype(kept[1]), rows, kept[0])


def _layers(dtype: np.dtype, activation: str) -> None:
    stream = _empty(np.dtype(np.int64), 2)
    for batch in (8, 8192):  # small tiles, large tiles
        X, W, b = _empty(dtype, batch, 4), _empty(dtype, 3, 4), _empty(dtype, 3)
        drop = Dropout(0.5, stream, 1)
        cuda.linear_forward(X, W, b, activation, drop)
        saved = _saved(dtype, activation, batch, 4)
        cuda.linear_dgrad(_empty(dtype, batch, 3), W, saved, activation, drop)
    _norms(cuda, dtype, dtype, activation, drop)


def _norms(
    backend: Any, stored: np.dtype, real: np.dtype, activation: str, drop: Dropout
) -> None:  # fmt: skip
    after = activation, drop
    for columns in (4, 100, 5000):
        X, vector = _empty(stored, 8, columns), _empty(real, columns)
        row, saved = _empty(real, 8), _saved(stored, activation, 8, columns)
        vectors = vector, vector, vector
        backend.layer_norm_forward(X, vector, vector, 1e-5, *after)
        backend.layer_norm_backward(X, X, vector, row, row, saved, *after)
        for training in (True, False):
            backend.batch_norm_forward(X, *vectors, vector, training, 0.1, 1e-5, *after)
        backend.batch_norm_backward(X, X, *vectors, saved, *after)
        if stored != real:
            out = _empty(real, 8, columns), None, row, row
            backend.layer_norm_forward(X, vector, vector, out=out)


def _loss(dtype: np.dtype, name: str, activation: str) -> None:
    Z, weight = _empty(dtype, 8, 4), _empty(dtype, 8)
    target = _empty(dtype, 8, 2 if name == "gaussian_nll" else 4)
    cuda.loss(Z, target, name, None, activation, weight)
    if name == "cross_entropy":
        ids = stand_in.zeros(8, np.int64)
        out = stand_in.zeros((), np.float64), _empty(dtype, 8, 4), _empty(dtype, 4)
        cuda.capture(
            lambda: cuda.loss(Z, ids, name, {"class_weight": np.ones(4)}, activation, weight, out)
        )()


def _optimizer(dtype: np.dtype, rule: str) -> None:
    row = OPTIMIZERS[rule]
    count = len(row.scalars(1, **row.options))
    P = _empty(dtype, 64)
    state = tuple(_empty(dtype, 64) for _ in row.state)
    double = np.dtype(np.float64)
    guard = _empty(double)
    cuda.optimizer_step(P, P, state, _empty(double, 1 + count), rule, guard)
    scalars = _empty(double, 1, 4 + count)
    cuda.optimizer_step(P, P, state, scalars, rule, guard, spans=[(0, 64, 0)])


def _fused(
    backend: Any, stored: np.dtype, rule: str, rows: int, columns: int, terms: int,
    spans: Any = None,
) -> None:  # fmt: skip
    """The update where the gradient of a weight (rows, columns) is made."""
    row, real = OPTIMIZERS[rule], np.dtype(np.float32)
    count = len(row.scalars(1, **row.options))
    shape = (1 + count,) if spans is None else (1, 4 + count)
    P, G, *state = (_empty(real, rows * columns) for _ in range(2 + len(row.state)))
    step = fused_update.FusedUpdate(backend, 1)
    given = _empty(stored, terms, rows), _empty(stored, terms, columns)
    step.linear_wgrad(*given, G.reshape(rows, columns))
    double = np.dtype(np.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_update, "SAVED", 1 << 40)
        step.optimizer_step(
            P, G, state, _empty(double, *shape), rule, _empty(double), spans=spans
        )  # fmt: skip


def _stepping(rule: str) -> None:
    double, options = np.dtype(np.float64), OPTIMIZERS[rule].options
    table = _empty(double, 1 + len(OPTIMIZERS[rule].scalars(1, **options)))
    step = Stepping(
        rule, [(1.0, options)], table, 1, _empty(double), _empty(double),
        _empty(np.dtype(np.int64), 2), [_empty(double, 40)],
    )  # fmt: skip
    step.remember()
    with step.part(8, 16) as part:
        step.part_end(part, 8)
    step.scalars()
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        limit_tensor(_empty(dtype, 64), 1.0)
        limit_rows(_empty(dtype, 8, 8), 1.0, step.norm, step.guard)
        step.to_mean(_empty(dtype, 64), 16)
    step.end()
