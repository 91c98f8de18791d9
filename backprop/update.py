"""From gradients to new parameters: what is clipped, penalised, scaled or left alone, by tensor.

The arithmetic is `optimizer_step`'s, one launch over the arena. Where tensors differ (weight decay
spares biases, a layer learns more slowly, another is frozen) it gets a row of scalars for each kind
and the spans of the arena that it serves. Only what no operator does, clipping each tensor by its
norm and the limit on a neuron's weights, comes before and after it: as array code, or on a device
that steps by itself as kernels of the captured step.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import isfinite
from types import ModuleType
from typing import Any

import numpy as np
from backprop_kernels.arrays import Array
from backprop_kernels.errors import OptionError
from backprop_kernels.optimizers import OPTIMIZERS

from backprop.arena import Layout
from backprop.memory import HOST, Memory
from backprop.optimizers import Optimizer

PREFIX = 4  # max_norm, max_value, l1, l2: what a row holds before the rule's own scalars


@dataclass(frozen=True)
class Treatment:
    """How one tensor is updated. `max_norm` bounds the rows of a weight."""

    lr_scale: float = 1.0
    weight_decay: float = 0.0
    l1: float = 0.0
    l2: float = 0.0
    max_norm: float | None = None


def treatments(optimizer: Optimizer, layout: Layout) -> dict[str, Treatment]:
    """By tensor: decay and penalties for the weights of Linear layers, then what `groups` says.

    A group's name is that of a tensor, of a layer or a pattern; of two that match the later holds.
    """
    common = optimizer.common
    weight = Treatment(
        1.0,
        optimizer.options.get("weight_decay", 0.0),
        common["l1"],
        common["l2"],
        common["max_norm"],
    )
    chosen = {
        name: weight if len(shape) == 2 else Treatment() for name, shape in layout.shapes.items()
    }
    for pattern, options in common["groups"].items():
        for name in matching(pattern, layout.shapes, f"{optimizer.rule}: groups"):
            if "max_norm" in options and len(layout.shapes[name]) != 2:
                continue  # a bias has no incoming weights
            chosen[name] = replace(chosen[name], **options)
    return chosen


def matching(pattern: str, names: Collection[str], where: str) -> list[str]:
    """The tensors a name means: "layers.0.bias", all of "layers.0", or a pattern: "*.bias"."""
    found = [
        name
        for name in names
        if isinstance(pattern, str)
        and (fnmatchcase(name, pattern) or name.startswith(f"{pattern}."))
    ]
    if not found:
        raise OptionError(
            f"{where}: expected the name of a tensor or a layer, or a pattern, of "
            f"{', '.join(names)}; got {pattern!r}"
        )
    return found


class Update:
    """One optimizer over one arena: its moments, its scalars, and the operator that applies it."""

    unattended = True  # whether a device can do it without the host

    def __init__(
        self,
        optimizer: Optimizer,
        layout: Layout,
        parameters: Array,
        gradient: Array,
        clip_norm: float | None = None,
        frozen: Collection[str] = (),
        memory: Memory = HOST,
        turns: int = 1,
    ) -> None:
        self.optimizer = optimizer
        # Or in the kernels that make the weight gradients: where steps are captured, they say so.
        self.why = "a pass of its own, as the host takes part in a step"
        self._clip_norm = clip_norm
        self.parameters, self.gradient = parameters, gradient
        rule = OPTIMIZERS[optimizer.operator_rule]
        self.memory = memory
        self.state = {name: memory.zeros(layout.size, parameters.dtype) for name in rule.state}
        self._moments = tuple(self.state.values())
        # What changes from step to step has a row for each of those that one call makes.
        self.norms = memory.zeros(turns, np.dtype(np.float64))
        self.norm = self.norms[:1].reshape(())
        self.lr_factors = [1.0] * turns  # of a schedule
        trained = {n: t for n, t in treatments(optimizer, layout).items() if n not in frozen}
        if not trained:
            raise OptionError(
                "TrainStep: model: expected parameters to train, got all of them frozen; "
                "use model.unfreeze(…)"
            )
        self._rows = list(dict.fromkeys(replace(t, max_norm=None) for t in trained.values()))
        limit = optimizer.common["clip_value"]
        ordinary = self._rows == [Treatment(weight_decay=optimizer.options.get("weight_decay", 0))]
        self.spans: list[tuple[int, int, int]] | None = None
        if not ordinary or limit is not None or len(trained) < len(layout.shapes):
            self.spans = _spans(layout, {n: self._row(t) for n, t in trained.items()})
        own = len(optimizer.scalars(1))
        shape = (1 + own,) if self.spans is None else (len(self._rows), PREFIX + own)
        self.tables = np.zeros((turns, *shape))
        self.scalars = self.tables[0]
        self.tables[..., 0] = np.inf if clip_norm is None else clip_norm
        if self.spans is not None:
            self.tables[..., 1] = np.inf if limit is None else limit
            self.tables[..., 2:PREFIX] = [(t.l1, t.l2) for t in self._rows]
        self._placed = memory.place(self.scalars)  # what the operator reads
        self._limits = [
            (layout.views(parameters)[name], t.max_norm)
            for name, t in trained.items()
            if t.max_norm is not None
        ]
        tensor_norm = optimizer.common["clip_tensor_norm"]
        self._clipped = (
            []
            if tensor_norm is None
            else [(layout.views(gradient)[name], tensor_norm) for name in trained]
        )

    @property
    def fused(self) -> bool:
        """Whether gradients and update can be captured as one program."""
        return not self._clipped

    @property
    def by_element(self) -> bool:
        """Whether an element's update needs no other's gradient."""
        return self._clip_norm is None and not self._clipped

    @property
    def whole(self) -> bool:
        """Whether the operator is all of it."""
        return self.fused and not self._limits

    def _row(self, treatment: Treatment) -> int:
        return self._rows.index(replace(treatment, max_norm=None))

    @property
    def treated(self) -> list[tuple[float, dict[str, Any]]]:
        """(scale of the learning rate, options of the rule) of each row of scalars."""
        options = self.optimizer.options
        if self.spans is None:
            return [(1.0, options)]
        decays = "weight_decay" in options
        return [
            (t.lr_scale, {**options, "weight_decay": t.weight_decay} if decays else options)
            for t in self._rows
        ]

    def stepping(self, value: Array, stream: Array, statistics: Sequence[Array]) -> Any:
        """What lets a device count steps and make the scalars itself, where it can."""
        if not self.unattended:
            return None
        return self.memory.stepping(
            self.optimizer.rule, self.treated, self._placed, self.first, value, self.norm, stream,
            statistics,
        )  # fmt: skip

    @property
    def lr_factor(self) -> float:
        """Of the next step; set, also of those after it."""
        return self.lr_factors[0]

    @lr_factor.setter
    def lr_factor(self, value: float) -> None:
        self.lr_factors[:] = [value] * len(self.lr_factors)

    @property
    def lr(self) -> float:
        """The learning rate of the next step: the optimizer's, by the factor of a schedule."""
        return self.optimizer.lr * self.lr_factor

    def prepare(self, step: int, steps: int = 1) -> None:
        """Set the scalars of step `step` (from 1) and the `steps` − 1 after it."""
        treated = self.treated
        for i in range(steps):
            lr = self.optimizer.lr * self.lr_factors[i]
            rows = self.tables[i].reshape(len(treated), -1)
            for row, (scale, options) in zip(rows, treated, strict=True):
                row[self.first :] = self.optimizer.scalars(
                    step + i, **{**options, "lr": lr * scale}
                )
        self.memory.fill(self._placed, self.scalars)

    @property
    def first(self) -> int:
        """Where a row's scalars of the rule begin."""
        return 1 if self.spans is None else PREFIX

    def before(self) -> None:
        """Clip each tensor's gradient by its norm. A NaN stays: the operator refuses it."""
        for g, limit in self._clipped:
            norm = math.sqrt(float(np.square(g, dtype=np.float64).sum()))
            if isfinite(norm) and norm > limit:
                g *= limit / norm

    def operator(self, backend: ModuleType, guard: Array) -> None:
        """`optimizer_step`, to be captured."""
        backend.optimizer_step(
            self.parameters, self.gradient, self._moments, self._placed,
            self.optimizer.operator_rule, guard, out=self.norm, spans=self.spans,
        )  # fmt: skip

    def operators(self, backend: ModuleType, device: Any) -> None:
        """`before`, `operator` and `after` as kernels, to be captured on a device."""
        for g, limit in self._clipped:
            device.limit_tensor(g, limit)
        self.operator(backend, device.guard)
        for W, limit in self._limits:
            device.limit_rows(W, limit)

    def after(self) -> None:
        """Scale every row of weights that is longer than its limit down to it."""
        for W, limit in self._limits:
            norm = np.sqrt(np.square(W, dtype=np.float64).sum(axis=1, keepdims=True))
            if (norm > limit).any():
                W *= (limit / np.maximum(norm, limit)).astype(W.dtype)


def _spans(layout: Layout, rows: Mapping[str, int]) -> list[tuple[int, int, int]]:
    """(start, stop, row) of the tensors in `rows`; neighbours of one row are one span."""
    spans: list[tuple[int, int, int]] = []
    following = None  # where the next tensor of the arena starts
    for name, shape in layout.shapes.items():
        start = layout.offsets[name]
        stop = start + math.prod(shape)
        if name in rows:
            if spans and following == start and spans[-1][2] == rows[name]:
                start = spans.pop()[0]
            spans.append((start, stop, rows[name]))
            following = -(-stop // 16) * 16
    return spans
