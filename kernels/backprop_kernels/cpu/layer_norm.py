"""layer_norm: statistics over the features of each row.  docs/derivations.md#layer_norm

X (batch, features), gamma, beta (features); backward dZ and the layer below's `saved`  read
Y, saved (batch, features), mean, rstd (batch); dZ_prev, db_prev, dgamma              written
Fused: activation and dropout forward; the layer below backward.
Rows are taken in blocks; dgamma goes by partial sums of a block, as db does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from backprop_kernels import checks
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cpu import norms
from backprop_kernels.cpu.epilogue import LEAF_ROWS
from backprop_kernels.cpu.norms import (
    BETA,
    BLOCK_TICKET,
    COLUMNS,
    DGAMMA,
    EPILOGUE,
    EPILOGUE_ARGS,
    FINISH,
    GAMMA,
    IN,
    MEAN,
    NUMBERS,
    OUT,
    PARTIAL,
    ROWS,
    RSTD,
    X_,
)  # fmt: skip
from backprop_kernels.cpu.program import scratch


def layer_norm_forward(
    X: Array,
    gamma: Array,
    beta: Array,
    eps: float = 1e-5,
    activation: str = "identity",
    dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None, Array | None, Array | None] | None = None,
    centred: bool = True,
) -> tuple[Array, Array | None, Array, Array]:
    """X (batch, features) → Y, saved, mean (batch), rstd (batch).

    Not `centred`, it is RMS norm: the mean is taken as 0, so that rstd = 1/√(mean X² + eps).
    """
    checks.norm_forward("layer_norm_forward", X, gamma, beta, activation, dropout, out, len(X))
    checks.contiguous(
        "layer_norm_forward", X=X, gamma=gamma, beta=beta,
        **checks.named_outputs(out, "Y", "saved", "mean", "rstd"),
    )  # fmt: skip
    numbers = np.array([eps, centred], np.float64)
    return norms.forward(
        _forward, X, gamma, beta, numbers, (None, None), activation, dropout, out, len(X)
    )


def layer_norm_backward(
    dZ: Array,
    X: Array,
    gamma: Array,
    mean: Array,
    rstd: Array,
    saved: Array | None = None,
    activation: str = "identity",
    dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None, Array | None] | None = None,
    centred: bool = True,
) -> tuple[Array, Array | None, Array | None]:
    """dZ (batch, features), the layer below → dZ_prev, db_prev, dgamma (dbeta is dZ's own db)."""
    checks.norm_backward(
        "layer_norm_backward", dZ, X, gamma, mean, rstd, saved, activation, dropout, out, len(X)
    )
    checks.contiguous(
        "layer_norm_backward", dZ=dZ, X=X, gamma=gamma, mean=mean, rstd=rstd, saved=saved,
        **checks.named_outputs(out, "dZ_prev", "db_prev", "dgamma"),
    )  # fmt: skip
    partial = scratch((max(-(-len(X) // LEAF_ROWS), 1), X.shape[1]), X.dtype)
    return norms.backward(
        _backward, dZ, X, gamma, mean, rstd, saved, activation, dropout, out, partial,
        np.array([0.0, centred], np.float64),
    )  # fmt: skip


def _forward(dtype: str) -> Callable[..., None]:
    from numba import types

    from backprop_kernels.cpu.memory import call_epilogue, float64s, pointer, take
    from backprop_kernels.cpu.vector_math import elementwise

    real = getattr(types, dtype)
    floats = pointer(real)
    root = elementwise(lambda m, x: m.sqrt(x), 1)

    def kernel(args, sync, thread, threads):
        X, Y = floats(args[X_]), floats(args[OUT])
        gamma, beta = floats(args[GAMMA]), floats(args[BETA])
        mean, rstd = floats(args[MEAN]), floats(args[RSTD])
        rows, width = args[ROWS], args[COLUMNS]
        blocks = (rows + LEAF_ROWS - 1) // LEAF_ROWS
        eps, centred = float64s(args[NUMBERS])[0], float64s(args[NUMBERS])[1]
        taken = 0
        while True:
            piece = take(args, BLOCK_TICKET, blocks, thread, threads, taken)
            if piece < 0:
                break
            taken += 1
            first = piece * LEAF_ROWS
            count = min(LEAF_ROWS, rows - first)
            for i in range(first, first + count):
                e = i * width
                total, square = 0.0, 0.0  # float64: a row's sum has one order and no rounding
                for j in range(width):
                    total += types.float64(X[e + j])
                middle = total / width if centred != 0 else 0.0
                for j in range(width):
                    d = types.float64(X[e + j]) - middle
                    square += d * d
                scale = 1.0 / root(square / width + eps)
                mean[i], rstd[i] = real(middle), real(scale)
                for j in range(width):
                    Y[e + j] = (X[e + j] - mean[i]) * rstd[i] * gamma[j] + beta[j]
            if args[EPILOGUE] != 0:
                call_epilogue(args[EPILOGUE], args[EPILOGUE_ARGS], first, count, 0, width)

    return kernel


def _backward(dtype: str) -> Callable[..., None]:
    from numba import types

    from backprop_kernels.cpu.memory import (
        barrier,
        call_epilogue,
        call_kernel,
        float64s,
        pointer,
        take,
    )  # fmt: skip

    real = getattr(types, dtype)
    floats = pointer(real)

    def kernel(args, sync, thread, threads):
        X, dZ, dX = floats(args[X_]), floats(args[IN]), floats(args[OUT])
        gamma, mean, rstd = floats(args[GAMMA]), floats(args[MEAN]), floats(args[RSTD])
        partial, dgamma = floats(args[PARTIAL]), floats(args[DGAMMA])
        rows, width = args[ROWS], args[COLUMNS]
        blocks = (rows + LEAF_ROWS - 1) // LEAF_ROWS
        centred = float64s(args[NUMBERS])[1]
        taken = 0
        while True:
            block = take(args, BLOCK_TICKET, blocks, thread, threads, taken)
            if block < 0:
                break
            taken += 1
            first = block * LEAF_ROWS
            count = min(LEAF_ROWS, rows - first)
            p = block * width
            for j in range(width):
                partial[p + j] = real(0)
            for i in range(first, first + count):
                e = i * width
                shift, slope = 0.0, 0.0
                for j in range(width):
                    x_hat = (X[e + j] - mean[i]) * rstd[i]
                    d = dZ[e + j] * gamma[j]
                    shift += types.float64(d)
                    slope += types.float64(d) * types.float64(x_hat)
                a, c = real(shift / width if centred != 0 else 0.0), real(slope / width)
                for j in range(width):
                    x_hat = (X[e + j] - mean[i]) * rstd[i]
                    partial[p + j] += dZ[e + j] * x_hat
                    dX[e + j] = rstd[i] * (dZ[e + j] * gamma[j] - a - x_hat * c)
            if args[EPILOGUE] != 0:
                call_epilogue(args[EPILOGUE], args[EPILOGUE_ARGS], first, count, 0, width)
        barrier(sync, threads)
        for j in range(thread * width // threads, (thread + 1) * width // threads):
            total = real(0)
            for block in range(blocks):
                total += partial[block * width + j]
            dgamma[j] = total
        if args[FINISH] != 0:
            call_kernel(args[FINISH], args[EPILOGUE_ARGS], sync, thread, threads)

    return kernel
