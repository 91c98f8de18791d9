"""optimizer_step: one update of the flat arena, or none.  docs/derivations.md#optimizer_step"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.optimizers import OPTIMIZERS
from backprop_kernels.reference import array_math as m
from backprop_kernels.reference.epilogue import write


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
    with np.errstate(all="ignore"):
        norm = np.sqrt(np.sum(np.square(G, dtype=np.float64)))
        if np.isfinite(norm) and (guard is None or np.isfinite(guard)):
            clip = min(1.0, float(scalars[0]) / (float(norm) + 1e-6))
            arguments = [P.dtype.type(s) for s in scalars[1:]]
            new = OPTIMIZERS[rule].update(m, P, G * P.dtype.type(clip), tuple(state), *arguments)
            P[...] = new[0]
            for old, value in zip(state, new[1], strict=True):
                old[...] = value
    return write(out, np.asarray(norm))
