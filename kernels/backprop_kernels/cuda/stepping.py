"""The step count, the learning rate and the outcome of training steps, kept on the device.

A captured step counts itself, makes the optimizer's scalars of its number and refuses what is not
finite, so the host may launch many before it looks at one. After a refused step all later ones
change nothing until the host says `go_on`. The kernels and their contract: stepping.cu.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from backprop_kernels.arrays import Array
from backprop_kernels.cuda import code
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.epilogue import plain_variant
from backprop_kernels.cuda.fused_update import FusedUpdate
from backprop_kernels.cuda.launch import constant, cupy, empty, launch
from backprop_kernels.cuda.limits import limit_rows, limit_tensor
from backprop_kernels.cuda.memory import pinned
from backprop_kernels.cuda.part import Part, part_of
from backprop_kernels.cuda.rows import blocks_for
from backprop_kernels.errors import KindError
from backprop_kernels.optimizers import OPTIMIZERS

THREADS = 256  # as stepping.cu has it
# Of `state`, likewise.
STEPS, RATE, STOPPED, LOSS, NORM, APPLIED, GUARD, MASS, SHARES, FIELDS = range(10)
DEPTH = 16  # outcomes that may be on their way to the host


class Outcome(NamedTuple):
    """What became of a step."""

    loss: float
    norm: float
    applied: bool


class Stepping:
    """One training step's numbers. `remember` … `end` are operators, to be captured around it.

    table is the optimizer's scalars, of which the first `first` columns stay as they are; each row
    has its options. statistics are arrays that forward moves before the step is known to be good.
    """

    depth = DEPTH

    def __init__(
        self, rule: str, options: Sequence[tuple[float, Mapping[str, Any]]], table: Array,
        first: int, value: Array, norm: Array, stream: Array, statistics: Sequence[Array],
    ) -> None:  # fmt: skip
        self.rule, self.table, self.first = rule, table, first
        self.value, self.norm, self.stream = value, norm, stream
        self.state = empty((FIELDS,), np.float64)
        self.state.fill(0)
        self.guard = self.state[GUARD:MASS].reshape(())
        self.before = constant(np.zeros(1), np.int64)  # rows of this step, in parts that are over
        self.statistics = [(now, empty(now.shape, now.dtype)) for now in statistics]
        self._options = empty((len(options), 1 + len(_numbers(options[0][1]))), np.float64)
        self._unit = Unit("stepping.cu", _variant(rule, _switches(options[0][1])))
        self._outcomes = pinned((DEPTH, FIELDS), np.dtype(np.float64))
        self._rates, self._sent = pinned((DEPTH + 1,), np.dtype(np.float64)), 0
        self._there = [cupy().cuda.Event() for _ in range(DEPTH)]

    def set_options(self, options: Sequence[tuple[float, Mapping[str, Any]]]) -> None:
        """(scale of the learning rate, options of the rule) of each row."""
        rows = [[scale, *_numbers(given)] for scale, given in options]
        self._options.set(np.array(rows, np.float64))

    def set_rate(self, rate: float) -> None:
        """Not waited for, as a schedule may change it every step."""
        # Each from a place of its own, until the step that it was for has been looked at.
        self._sent = (self._sent + 1) % len(self._rates)
        host = self._rates[self._sent : self._sent + 1]
        host[...] = rate
        there = self.state[RATE : RATE + 1].data
        there.copy_from_host_async(host.ctypes.data, host.nbytes, cupy().cuda.get_current_stream())

    def set_steps(self, steps: int) -> None:
        self.state[STEPS : STEPS + 1].set(np.array([steps], np.float64))
        self.stream[1:2].set(np.array([steps], np.int64))

    def fused(self, backend: Any, layers: int) -> FusedUpdate:
        """`backend` for one captured step, with the update where weight gradients are made."""
        return FusedUpdate(backend, layers)

    def remember(self) -> None:
        """Operator, before forward."""
        for now, before in self.statistics:
            self._words("remember", self.before, now, before)

    def part(self, rows: int, whole: int) -> AbstractContextManager[Part]:
        """Around the operators of a batch that is a part of a step's batch of `whole` rows."""
        return part_of(Part(rows, whole, self.before, empty((1,), np.float64)))

    def part_end(self, part: Part, room: int) -> None:
        """Operator, after backward of a part, which may have `room` rows."""
        launch(
            self._unit, "part_end", (1,), (32,), self.state, self.value, part.mass, self.before,
            np.float64(part.whole), room,
        )  # fmt: skip
        self._take_back()

    def to_mean(self, G: Array, whole: int) -> None:
        """Operator, after the last part: G, divided by `whole` so far, by what the rows weigh."""
        unit, mass = Unit("part.cu", plain_variant(G.dtype)), self.state[MASS : MASS + 1]
        launch(unit, "to_mean", (blocks_for(G.size),), (THREADS,), G, mass, whole, G.size)

    def parts(self) -> tuple[float, float]:
        """(what the rows of the parts so far weighed, the sum of their shares of the loss)."""
        mass, shares = self.state[MASS:FIELDS].get()
        return float(mass), float(shares)

    def set_parts(self, rows: int, mass: float, shares: float) -> None:
        """Go on from parts that had room for `rows` rows."""
        self.before.set(np.array([rows], np.int64))
        self.state[MASS:FIELDS].set(np.array([mass, shares], np.float64))

    def scalars(self) -> None:
        """Operator, after backward and before the optimizer, whose guard is `guard`."""
        rows, width = len(self._options), self.table.shape[-1]
        launch(
            self._unit, "step_scalars", (1,), (THREADS,), self.state, self.value, self._options,
            self.table, rows, self._options.shape[1], width, self.first,
        )  # fmt: skip

    def limit_tensor(self, G: Array, limit: float) -> None:
        """Operator, before the optimizer: no tensor of the gradient is longer."""
        limit_tensor(G, limit)

    def limit_rows(self, W: Array, limit: float) -> None:
        """Operator, after the optimizer: no row is longer, where the step was applied."""
        limit_rows(W, limit, self.norm, self.guard)

    def end(self) -> None:
        """Operator, after all others."""
        launch(
            self._unit, "step_end", (1,), (32,), self.state, self.value, self.norm, self.stream,
            self.before,
        )  # fmt: skip
        self._take_back()

    def _take_back(self) -> None:
        for now, before in self.statistics:
            self._words("take_back", self.state, before, now)

    def _words(self, entry: str, *arrays: Array) -> None:
        words = arrays[-1].nbytes // 4
        launch(self._unit, entry, (-(-words // THREADS),), (THREADS,), *arrays, words)

    def fetch(self, number: int) -> None:
        """Send the outcome of the step launched last on its way; at most DEPTH may be."""
        slot, stream = number % DEPTH, cupy().cuda.get_current_stream()
        host = self._outcomes[slot]
        self.state.data.copy_to_host_async(host.ctypes.data, host.nbytes, stream)
        self._there[slot].record(stream)

    def outcome(self, number: int) -> Outcome:
        """Wait for what `fetch(number)` sent."""
        slot = number % DEPTH
        self._there[slot].synchronize()
        state = self._outcomes[slot]
        return Outcome(float(state[LOSS]), float(state[NORM]), bool(state[APPLIED]))

    def go_on(self) -> None:
        """Apply steps again, after one that was refused; what it was made of is forgotten."""
        self.state[STOPPED : STOPPED + 1].set(np.zeros(1))
        self.set_parts(0, 0.0, 0.0)


def _numbers(options: Mapping[str, Any]) -> list[float]:
    """The options that are numbers, one after the other; lr is set apart."""
    found: list[float] = []
    for name, value in options.items():
        if name != "lr" and not isinstance(value, bool):
            found += np.atleast_1d(value).tolist()
    return found


def _switches(options: Mapping[str, Any]) -> tuple[tuple[str, bool], ...]:
    """The options that are true or false."""
    return tuple((name, value) for name, value in options.items() if isinstance(value, bool))


@cache
def _variant(rule: str, switches: tuple[tuple[str, bool], ...]) -> str:
    """variant.cuh: `scalars(step, lr, numbers, row)`, the rule's in float64."""
    optimizer = OPTIMIZERS[rule]

    def formula(step: Any, lr: Any, *numbers: Any) -> tuple[Any, ...]:
        given, rest = {"lr": lr, **dict(switches)}, iter(numbers)
        for name, default in optimizer.options.items():
            if isinstance(default, tuple):
                given[name] = tuple(next(rest) for _ in default)
            elif name not in given:
                given[name] = next(rest)
        try:
            return optimizer.scalars(step, **given)
        except TypeError as problem:
            raise KindError(
                f"{rule}: scalars: expected arithmetic of step and options alone (** 0.5 for a "
                f"root), got {problem}"
            ) from problem

    count = len(_numbers(optimizer.options))
    results = len(optimizer.scalars(1, **optimizer.options))
    names = ["step", "lr", *(f"o{i}" for i in range(count))]
    given = ["step", "lr", *(f"o[{i}]" for i in range(count))]
    call = ", ".join([*given, *(f"row[{i}]" for i in range(results))])
    return code.variant(
        np.dtype(np.float64),
        code.function("formula", names, formula),
        "DEVICE void scalars(double step, double lr, const double* o, double* row) {\n"
        f"    formula({call});\n}}\n",
    )
