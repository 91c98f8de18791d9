"""optimizer_step: one update of the flat arena, or none.  docs/derivations.md#optimizer_step"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.optimizers import OPTIMIZERS, regularised
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
    spans: Sequence[tuple[int, int, int]] | None = None,
) -> Array:
    """P, G and each state (parameters,); updates P and state in place and returns ‖G‖₂.

    scalars (float64) are [max_norm, *OPTIMIZERS[rule].scalars(step, …)]; a gradient longer than
    max_norm is scaled down to it. Where ‖G‖ or `guard` (the loss) is not finite, nothing changes.
    With `spans`, only P[start:stop] of each (start, stop, row) is updated, by
    scalars[row] = [max_norm, max_value, l1, l2, *those of the rule].
    """
    checks.optimizer_step(P, G, state, scalars, rule, guard, out, spans)
    with np.errstate(all="ignore"):
        norm = np.sqrt(np.sum(np.square(G, dtype=np.float64)))
        if np.isfinite(norm) and (guard is None or np.isfinite(guard)):
            update = OPTIMIZERS[rule].update
            if spans is not None:
                update = regularised(update)
            for start, stop, row in ((0, len(P), 0),) if spans is None else spans:
                max_norm, *numbers = scalars if spans is None else scalars[row]
                clip = min(1.0, float(max_norm) / (float(norm) + 1e-6))
                part = slice(start, stop)
                g, old = G[part] * P.dtype.type(clip), tuple(s[part] for s in state)
                new = update(m, P[part], g, old, *(P.dtype.type(s) for s in numbers))
                P[part] = new[0]
                for array, value in zip(old, new[1], strict=True):
                    array[...] = value
    return write(out, np.asarray(norm))
