"""optimizer_step: one update of the flat arena, or none.  docs/derivations.md#optimizer_step

G (parameters), scalars, guard ()             read
P, state (parameters)                         read and written
norm ()                                       written
Fused: the finite check, global-norm clipping, weight decay. One pass sums G², one updates; the sum
goes by fixed chunks, added in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.cpu.compile import address
from backprop_kernels.cpu.program import Arguments, scratch, submit
from backprop_kernels.optimizers import OPTIMIZERS

CHUNK = 8192  # parameters per piece of work: five arrays of it fit in a 256 kB share of L2
FLOPS = 20  # of one parameter, roughly

(SUM_TICKET, CHUNK_TICKET, P_, G_, STATE_0, STATE_1, SCALARS, SIZE, NORM, GUARD, SQUARES) = range(
    11
)


def optimizer_step(
    P: Array,
    G: Array,
    state: Sequence[Array],
    scalars: Array,
    rule: str = "SGD",
    guard: Array | None = None,
    out: Array | None = None,
) -> Array:
    """P, G and each state (parameters,); updates P and state in place and returns ‖G‖₂.

    scalars (float64) are [max_norm, *OPTIMIZERS[rule].scalars(step, …)]; a gradient longer than
    max_norm is scaled down to it. Where ‖G‖ or `guard` (the loss) is not finite, nothing changes.
    """
    checks.optimizer_step(P, G, state, scalars, rule, guard, out)
    named = dict(zip(OPTIMIZERS[rule].state, state, strict=True))
    checks.contiguous("optimizer_step", P=P, G=G, scalars=scalars, **named)
    norm = np.zeros(()) if out is None else out
    size = len(P)
    arguments = Arguments(
        (
            0, 0, P, G, state[0], state[1] if len(state) > 1 else None, scalars, size, norm, guard,
            scratch(max(-(-size // CHUNK), 1), np.float64),
        )
    )  # fmt: skip
    submit(address(_kernel, 4, str(P.dtype), rule, len(scalars) - 1), arguments, FLOPS * size)
    return norm


def _kernel(dtype: str, rule: str, n_scalars: int) -> Callable[..., None]:
    import numba
    from numba import types

    from backprop_kernels.cpu import vector_math
    from backprop_kernels.cpu.memory import barrier, float64s, numbers, pointer, rule_of, ticket

    real = getattr(types, dtype)
    floats = pointer(real)
    row = OPTIMIZERS[rule]
    two = len(row.state) == 2
    float64 = types.float64
    update = rule_of(
        lambda p, g, s0, s1, scalars: row.update(
            vector_math, p, g, (s0, s1) if two else (s0,), *scalars
        )
    )
    scalars_of = numbers(real, n_scalars)

    @numba.njit(error_model="numpy", _nrt=False)
    def squares(G, first, last):
        """Σ g² in float64, in eight sums: one would wait for each addition."""
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = 0.0
        i = first
        while i + 8 <= last:
            s0 += float64(G[i]) * float64(G[i])
            s1 += float64(G[i + 1]) * float64(G[i + 1])
            s2 += float64(G[i + 2]) * float64(G[i + 2])
            s3 += float64(G[i + 3]) * float64(G[i + 3])
            s4 += float64(G[i + 4]) * float64(G[i + 4])
            s5 += float64(G[i + 5]) * float64(G[i + 5])
            s6 += float64(G[i + 6]) * float64(G[i + 6])
            s7 += float64(G[i + 7]) * float64(G[i + 7])
            i += 8
        while i < last:
            s0 += float64(G[i]) * float64(G[i])
            i += 1
        return ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))

    def kernel(args, sync, thread, threads):
        size = args[SIZE]
        P, G = floats(args[P_]), floats(args[G_])
        S0, S1 = floats(args[STATE_0]), floats(args[STATE_1])
        partial = float64s(args[SQUARES])
        chunks = (size + CHUNK - 1) // CHUNK
        while True:
            t = ticket(args, SUM_TICKET, threads)
            if t >= chunks:
                break
            partial[t] = squares(G, t * CHUNK, min((t + 1) * CHUNK, size))
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
        scalars = scalars_of(args[SCALARS] + 8)
        while True:
            t = ticket(args, CHUNK_TICKET, threads)
            if t >= chunks:
                break
            for i in range(t * CHUNK, min((t + 1) * CHUNK, size)):
                if two:
                    p, s0, s1 = update(P[i], G[i] * clip, S0[i], S1[i], scalars)
                    S1[i] = s1
                else:
                    p, s0, s1 = update(P[i], G[i] * clip, S0[i], real(0), scalars)
                P[i] = p
                S0[i] = s0

    return kernel
