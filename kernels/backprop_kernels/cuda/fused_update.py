"""The optimizer's update where a weight's gradient is made, and a step still a transaction.

A step that is refused changes nothing, so nothing may be updated before it is certain that the
whole gradient is finite. Once all deltas are made, it mostly is: no |dW| exceeds
batch · max|dZ| · max|X|. Where that says so for every weight, each is updated where its gradient is
made and dW is never in memory; where it does not, or where a number is not finite, the same kernels
write dW, and the optimizer decides as ever. The device finds out, so one captured step does both.

The kernels and their contracts: fused_update.cu, linear_wgrad_update.cu.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from backprop_kernels import checks
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cuda.cast import cast
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.epilogue import plain_variant
from backprop_kernels.cuda.in_precision import InPrecision
from backprop_kernels.cuda.launch import constant, empty, launch
from backprop_kernels.cuda.linear_dgrad import dgrad
from backprop_kernels.cuda.linear_forward import forward
from backprop_kernels.cuda.linear_wgrad import WeightUpdate, can_update, chosen, squares, wgrad
from backprop_kernels.cuda.optimizer_step import MOST_SPANS, Done, finish, rule_text
from backprop_kernels.cuda.rows import THREADS, WARP, blocks_for
from backprop_kernels.cuda.tiles import Choice

LONGEST_SUM = 2**23  # rows of a batch: the bound's room for roundings is enough for so many
# Bytes of memory traffic that a parameter saves: its gradient is not written and not read twice.
# What `largest` has to read comes off that.
SAVED = 12
STORED = {"float32": "real", "uint16": "bf16"}

Span = tuple[int, int, int]  # of the arena: start, stop, row of the optimizer's scalars


class Product(NamedTuple):
    """A weight gradient that is still to be made."""

    dZ: Array
    X: Array
    dW: Array
    copies: tuple[Array | None, Array | None]  # as linear_wgrad.py has them


class FusedUpdate:
    """A backend for one captured step, with the functions and signatures of `backend`.

    Weight gradients are made by `optimizer_step`, together with the update; until then their deltas
    and inputs must stay as they are. For float32 parameters and no loss scale; nothing may clip by
    a norm. `layers` of the network at most. `why` says what is fused, once a step is captured.
    """

    def __init__(self, backend: Any, layers: int) -> None:
        self._backend = backend
        self._precision = backend.precision.name if isinstance(backend, InPrecision) else None
        # The first is for gradients that are there before those of the weights, two for what is
        # rounded at the start, one for an input that is not, two for each layer.
        self._cells = constant(np.zeros(4 + 2 * layers), np.uint32)
        self._places: dict[int, int] = {}  # of an array's cell, by the array's address
        self._products: list[Product] = []
        self.why = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def cast(self, values: Array, out: Array) -> None:
        cast(self._backend.precision.name, values, out, cell=self._cell(out))

    def linear_forward(
        self, X: Array, W: Array, b: Array | None, activation: str, dropout: Dropout | None,
        out: tuple[Array, Array | None], **rounded: Any,
    ) -> tuple[Array, Array | None]:  # fmt: skip
        cell = self._cell(out[0])
        return forward(self._precision, X, W, b, activation, dropout, out, cell=cell, **rounded)

    def linear_dgrad(
        self, dZ: Array, W: Array, saved: Array | None, activation: str, dropout: Dropout | None,
        out: tuple[Array, Array | None], **rounded: Any,
    ) -> tuple[Array, Array | None]:  # fmt: skip
        given = dZ, W, saved, activation, dropout, out
        return dgrad(self._precision, None, *given, cell=self._cell(out[0]), **rounded)

    def linear_wgrad(
        self, dZ: Array, X: Array, out: Array,
        copies: tuple[Array | None, Array | None] = (None, None),
    ) -> Array:  # fmt: skip
        checks.linear_wgrad(dZ, X, out, self._precision)
        self._products.append(Product(dZ, X, out, copies))
        return out

    sparse_input_forward, sparse_input_wgrad = linear_forward, linear_wgrad

    def optimizer_step(
        self, P: Array, G: Array, state: Sequence[Array], scalars: Array, rule: str = "SGD",
        guard: Array | None = None, out: Array | None = None, spans: Sequence[Span] | None = None,
    ) -> Array:  # fmt: skip
        """Every weight gradient that was asked for, then the update."""
        given = P, G, state, scalars, rule, guard, out, spans
        checks.optimizer_step(*given)
        fused = [p for p in self._products if can_update(self._chosen(p))]
        self.why = self._against(fused)
        if self.why:
            for product in self._products:
                self._make(product)
            return finish(None, *given)
        self.why = f"{len(fused)} of {len(self._products)} weights in their gradient's kernel"
        every = [(0, len(P), 0)] if spans is None else spans
        sure = self._verdict(guard, G, every)
        counts = [squares(self._chosen(p)) for p in fused]
        done = empty((sum(counts),), np.float64)
        text = rule_text(rule, scalars.shape[-1] - 1, spans is None)
        table, end = scalars.reshape(-1, scalars.shape[-1]), 0
        for product, count in zip(fused, counts, strict=True):
            start, stop = _place(product.dW, G)
            row = next(row for first, last, row in every if first <= start and stop <= last)
            W, *moments = (a[start:stop].reshape(product.dW.shape) for a in (P, *state))
            update = WeightUpdate(
                text, W, moments[0], moments[1] if len(moments) > 1 else None, table[row, 1:],
                sure, done[end : end + count],
            )  # fmt: skip
            self._make(product, update)
            end += count
        for product in self._products:
            if not can_update(self._chosen(product)):
                self._make(product)
        return finish(Done(sure, _without(every, fused, G), done), *given)

    def _against(self, fused: Sequence[Product]) -> str:
        """Why the update is a pass of its own; empty where it is not."""
        if not self._products:
            return "a pass of its own, as one kernel makes all gradients"
        if not fused:
            return (
                "a pass of its own, as no kernel has a weight's whole gradient at once: "
                + self._chosen(self._products[0]).why
            )
        if len(fused[0].dZ) > LONGEST_SUM:
            return f"a pass of its own, as sums of more than {LONGEST_SUM:,} rows have no bound"
        saved = SAVED * sum(product.dW.size for product in fused)
        read = sum(array.nbytes for array in self._unseen())
        if saved <= read:
            return (
                f"a pass of its own, as it would save {saved:,} bytes and read {read:,} to be "
                "certain that the gradient is finite"
            )
        return ""

    def _unseen(self) -> list[Array]:
        """What weight gradients are made of, and no kernel has told the largest magnitude of."""
        given = (array for product in self._products for array in product[:2])
        return [array for array in given if array.data.ptr not in self._places]

    def _chosen(self, product: Product) -> Choice:
        return chosen(self._precision, product.dZ, product.X, product.dW)

    def _make(self, product: Product, update: WeightUpdate | None = None) -> None:
        wgrad(self._precision, None, *product, update)

    def _cell(self, array: Array) -> Array:
        """For the largest magnitude in `array`."""
        place = self._places.setdefault(array.data.ptr, 1 + len(self._places))
        return self._cells[place : place + 1]

    def _find(self, values: Array, spans: Sequence[Span] | None, cell: Array) -> None:
        types = ('#include "floats.cuh"', f"using stored = {STORED[str(values.dtype)]};")
        longest = values.size if spans is None else max((b - a for a, b, _ in spans), default=0)
        count = 1 if spans is None else len(spans)
        grid = max(blocks_for(longest), 1), min(max(count, 1), MOST_SPANS)
        launch(
            Unit("fused_update.cu", plain_variant("float32", types)), "largest", grid, (THREADS,),
            values, values.size, constant(spans, np.int64) if spans else None, count, cell,
        )  # fmt: skip

    def _verdict(self, guard: Array | None, G: Array, every: Sequence[Span]) -> Array:
        """Whether every gradient of this step is certain to be finite, and the loss is."""
        for array in self._unseen():
            self._find(array, None, self._cell(array))
        self._find(G, _without(every, self._products, G), self._cells[:1])
        sure = empty((), np.uint32)
        pairs = [[self._places[array.data.ptr] for array in p[:2]] for p in self._products]
        launch(
            Unit("fused_update.cu", plain_variant("float32")), "verdict", (1,), (WARP,),
            self._cells, len(self._cells), constant(pairs, np.int64), len(pairs),
            len(self._products[0].dZ), guard, sure,
        )  # fmt: skip
        return sure


def _place(tensor: Array, flat: Array) -> tuple[int, int]:
    """Where in `flat` the tensor lies of which it is a view."""
    start = (tensor.data.ptr - flat.data.ptr) // flat.itemsize
    return start, start + tensor.size


def _without(spans: Iterable[Span], products: Iterable[Product], G: Array) -> list[Span]:
    """What is left of the spans of G without these weights."""
    left, taken = [], sorted(_place(product.dW, G) for product in products)
    for start, stop, row in spans:
        for first, last in taken:
            if start <= first and last <= stop:
                left.append((start, first, row))
                start = last
        left.append((start, stop, row))
    return [span for span in left if span[0] < span[1]]
