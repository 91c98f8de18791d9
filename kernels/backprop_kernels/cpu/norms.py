"""What batch_norm and layer_norm share: slots, and how their kernels are submitted."""

from __future__ import annotations

from typing import Any

from backprop_kernels.activations import saved_output
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cpu.compile import code
from backprop_kernels.cpu.epilogue import backward_epilogue, forward_epilogue
from backprop_kernels.cpu.program import Arguments, Kernel, scratch, submit

FLOPS = 20  # of one element, roughly

# Slots. IN is X or dZ, OUT is Y or dZ_prev; MEAN and RSTD are written forward, read backward.
(STATISTICS_TICKET, BLOCK_TICKET, X_, IN, OUT, GAMMA, BETA, MEAN, RSTD, ROWS, COLUMNS, NUMBERS,
 RUNNING_MEAN, RUNNING_VAR, DGAMMA, PARTIAL, EPILOGUE, EPILOGUE_ARGS, FINISH,
) = range(19)  # fmt: skip


def forward(
    make: Any, X: Array, gamma: Array, beta: Array, numbers: Array, running: tuple[Any, Any],
    activation: str, dropout: Dropout | None, out: Any, statistics: int,
) -> tuple[Array, Array | None, Array, Array]:  # fmt: skip
    """Submit a forward kernel: normalise a block into Y, then the epilogue of products on it."""
    Y, kept, mean, rstd = out or (None, None, None, None)
    Y = scratch(X.shape, X.dtype) if Y is None else Y
    mean = scratch(statistics, X.dtype) if mean is None else mean
    rstd = scratch(statistics, X.dtype) if rstd is None else rstd
    saved, kept = saved_output(Y, kept, activation, dropout, None if out else scratch)
    entry, args = forward_epilogue(Y, None, activation, dropout, kept) or (0, None)
    arguments = Arguments(
        (
            0, 0, X, X, Y, gamma, beta, mean, rstd, *X.shape, numbers, *running, None, None,
            entry, args, 0,
        )
    )  # fmt: skip
    submit(Kernel(code(make, 4, str(X.dtype)), arguments, FLOPS * X.size))
    return Y, saved, mean, rstd


def backward(
    make: Any, dZ: Array, X: Array, gamma: Array, mean: Array, rstd: Array, saved: Array | None,
    activation: str, dropout: Dropout | None, out: Any, partial: Array,
    numbers: Array | None = None,
) -> tuple[Array, Array | None, Array | None]:  # fmt: skip
    """Submit a backward kernel: a block of dX, then the layer below's epilogue on it."""
    features = X.shape[1]
    dZ_prev, db_prev, dgamma = out or (
        None, scratch(features, X.dtype), scratch(features, X.dtype)
    )  # fmt: skip
    dZ_prev = scratch(X.shape, X.dtype) if dZ_prev is None else dZ_prev
    dgamma = scratch(features, X.dtype) if dgamma is None else dgamma
    epilogue, finish = backward_epilogue(dZ_prev, saved, activation, dropout, db_prev)
    entry, args = epilogue or (0, None)
    arguments = Arguments(
        (
            0, 0, X, dZ, dZ_prev, gamma, None, mean, rstd, *X.shape, numbers, None, None, dgamma,
            partial, entry, args, finish,
        )
    )  # fmt: skip
    submit(Kernel(code(make, 4, str(X.dtype)), arguments, FLOPS * X.size))
    return dZ_prev, db_prev, dgamma
