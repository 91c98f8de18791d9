"""optimizer_step: one update of the flat arena, or none.  docs/derivations.md#optimizer_step

The kernels and their contract: optimizer_step.cu.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.cuda import code
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.launch import constant, empty, launch, on_device
from backprop_kernels.cuda.rows import THREADS, blocks_for
from backprop_kernels.optimizers import OPTIMIZERS, regularised

MOST_SPANS = 65535  # side by side: the largest grid in y


class Done(NamedTuple):
    """What was applied already, where `sure` () is not 0: all but the spans `left`."""

    sure: Array
    left: Sequence[tuple[int, int, int]]
    squares: Array  # of those gradients, whose elements of G are not read


def optimizer_step(
    P: Array,
    G: Array,
    state: Sequence[Array],
    scalars: Array,
    rule: str = "SGD",
    guard: Array | None = None,
    out: Array | None = None,
    spans: Sequence[tuple[int, int, int]] | None = None,
) -> Array:
    """P, G and each state (parameters,); updates P and state in place and returns ‖G‖₂.

    scalars (float64) are [max_norm, *OPTIMIZERS[rule].scalars(step, …)]; a gradient longer than
    max_norm is scaled down to it. Where ‖G‖ or `guard` (the loss) is not finite, nothing changes.
    With `spans`, only P[start:stop] of each (start, stop, row) is updated, by
    scalars[row] = [max_norm, max_value, l1, l2, *those of the rule].
    """
    return finish(None, P, G, state, scalars, rule, guard, out, spans)


def finish(
    done: Done | None, P: Array, G: Array, state: Sequence[Array], scalars: Array,
    rule: str = "SGD", guard: Array | None = None, out: Array | None = None,
    spans: Sequence[tuple[int, int, int]] | None = None,
) -> Array:  # fmt: skip
    """`optimizer_step` of what is not `done` yet."""
    checks.optimizer_step(P, G, state, scalars, rule, guard, out, spans)
    named = dict(zip(OPTIMIZERS[rule].state, state, strict=True))
    on_device(
        "optimizer_step", P=P, G=G, scalars=scalars, guard=guard, out_norm=out, **named
    )  # fmt: skip
    norm = empty((), np.float64) if out is None else out
    size, n_spans = len(P), 1 if spans is None else len(spans)
    longest = size if spans is None else max((stop - start for start, stop, _ in spans), default=0)
    text = rule_text(rule, scalars.shape[-1] - 1, spans is None)
    unit = Unit("optimizer_step.cu", code.variant(P.dtype, text))
    squares = empty((blocks_for(size),), np.float64)
    sure, terms, left = (None, None, ()) if done is None else (done.sure, done.squares, done.left)
    rest = constant(left, np.int64) if left else None
    if size:
        launch(
            unit, "gradient_squares", squares.shape, (THREADS,), G, squares, size, sure, rest,
            len(left), terms, 0 if terms is None else len(terms),
        )  # fmt: skip
    table = constant(spans, np.int64) if spans else None
    grid = max(blocks_for(longest), 1), min(max(n_spans, 1), MOST_SPANS)
    launch(
        unit, "optimizer_update", grid, (THREADS,), P, G, state[0],
        state[1] if len(state) > 1 else None, scalars, guard, squares, len(squares), norm, size,
        table, n_spans, sure, rest, len(left),
    )  # fmt: skip
    return norm


@cache
def rule_text(rule: str, n_scalars: int, plain: bool) -> str:
    """`step(p, g, s, c)` in C++, the rule's update of an element in place, wherever it is done."""
    row = OPTIMIZERS[rule]
    formula = row.update if plain else regularised(row.update)
    states = [f"s{i}" for i in range(len(row.state))]
    scalars = [f"c{i}" for i in range(n_scalars)]

    def update(p: Any, g: Any, *rest: Any) -> tuple[Any, ...]:
        new, state = formula(code, p, g, rest[: len(states)], *rest[len(states) :])
        return new, *state

    held = [f"s[{i}]" for i in range(len(states))]
    given = [f"c[{i}]" for i in range(n_scalars)]
    call = ", ".join(["p", "g", *held, *given, "p", *held])
    return (
        code.function("update", ["p", "g", *states, *scalars], update)
        + f"constexpr int STATES = {len(states)}, SCALARS = {n_scalars};\n"
        f"DEVICE void step(real& p, real g, real (&s)[2], const real (&c)[SCALARS]) {{\n"
        f"    update({call});\n}}\n"
    )
