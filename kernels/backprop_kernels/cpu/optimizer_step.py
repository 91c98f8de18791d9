"""optimizer_step: one update of the flat arena, or none.  docs/derivations.md#optimizer_step

G (parameters), scalars, guard ()             read
P, state (parameters)                         read and written
norm ()                                       written
Fused: the finite check, global-norm clipping, weight decay. One pass sums G², one updates; the sum
goes by fixed chunks, added in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.cpu.compile import code
from backprop_kernels.cpu.program import Arguments, Kernel, scratch, submit
from backprop_kernels.optimizers import OPTIMIZERS, regularised

CHUNK = 8192  # parameters per piece of work: five arrays of it fit in a 256 kB share of L2
FLOPS = 20  # of one parameter, roughly

(SUM_TICKET, CHUNK_TICKET, P_, G_, STATE_0, STATE_1, SCALARS, SIZE, NORM, GUARD, SQUARES, SPANS,
 SPAN_COUNT) = range(13)  # fmt: skip


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
    checks.optimizer_step(P, G, state, scalars, rule, guard, out, spans)
    named = dict(zip(OPTIMIZERS[rule].state, state, strict=True))
    checks.contiguous("optimizer_step", P=P, G=G, scalars=scalars, **named)
    norm = np.zeros(()) if out is None else out
    size = len(P)
    arguments = Arguments(
        (
            0, 0, P, G, state[0], state[1] if len(state) > 1 else None, scalars, size, norm, guard,
            scratch(max(-(-size // CHUNK), 1), np.float64),
            None if spans is None else np.array(spans, np.int64), len(spans or ()),
        )
    )  # fmt: skip
    entry = code(_kernel, 4, str(P.dtype), rule, scalars.shape[-1] - 1, int(spans is not None))
    submit(Kernel(entry, arguments, FLOPS * size, whole=True))
    return norm


def _kernel(dtype: str, rule: str, n_scalars: int, spanned: int) -> Callable[..., None]:
    from numba import types

    from backprop_kernels.cpu import vector_math
    from backprop_kernels.cpu.memory import barrier, float64s, int64s, numbers, take
    from backprop_kernels.cpu.vector_loop import sum_of_squares, vector_loop

    real = getattr(types, dtype)
    size = 4 if dtype == "float32" else 8
    row = OPTIMIZERS[rule]
    rule_update = regularised(row.update) if spanned else row.update
    states = len(row.state)
    two = states == 2

    def formula(p: Any, g: Any, *rest: Any) -> tuple[Any, ...]:
        state, clip, scalars = rest[:states], rest[states], rest[states + 1 :]
        new_p, new_state = rule_update(vector_math, p, g * clip, state, *scalars)
        return new_p, *new_state

    update = vector_loop(formula, dtype, 2 + states, 1 + n_scalars)
    squares = sum_of_squares(dtype)
    scalars_of = numbers(real, n_scalars)

    def kernel(args, sync, thread, threads):
        count = args[SIZE]
        P, G, S0, S1 = args[P_], args[G_], args[STATE_0], args[STATE_1]
        partial = float64s(args[SQUARES])
        chunks = (count + CHUNK - 1) // CHUNK
        taken = 0
        while True:
            t = take(args, SUM_TICKET, chunks, thread, threads, taken)
            if t < 0:
                break
            taken += 1
            partial[t] = squares(G + t * CHUNK * size, min(CHUNK, count - t * CHUNK))
        barrier(sync, threads)
        total = 0.0
        for t in range(chunks):
            total += partial[t]
        norm = np.sqrt(total)
        if thread == 0:
            float64s(args[NORM])[0] = norm
        guard = float64s(args[GUARD])[0] if args[GUARD] != 0 else 0.0
        if not (np.isfinite(norm) and np.isfinite(guard)):
            return
        clip = real(min(1.0, float64s(args[SCALARS])[0] / (norm + 1e-6)))
        taken = 0
        while True:
            t = take(args, CHUNK_TICKET, chunks, thread, threads, taken)
            if t < 0:
                break
            taken += 1
            first, last = t * CHUNK, min((t + 1) * CHUNK, count)
            for span in range(args[SPAN_COUNT] if spanned else 1):
                start, stop, row = first, last, 0
                if spanned:
                    start = max(first, int64s(args[SPANS])[3 * span])
                    stop = min(last, int64s(args[SPANS])[3 * span + 1])
                    row = int64s(args[SPANS])[3 * span + 2]
                if start >= stop:
                    continue
                scalars = (clip, *scalars_of(args[SCALARS] + 8 * (row * (1 + n_scalars) + 1)))
                at, n = start * size, stop - start
                if two:
                    update((P + at, G + at, S0 + at, S1 + at, P + at, S0 + at, S1 + at), scalars, n)
                else:
                    update((P + at, G + at, S0 + at, P + at, S0 + at), scalars, n)

    return kernel
