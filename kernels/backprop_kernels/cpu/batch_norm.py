"""batch_norm: statistics over the batch.  docs/derivations.md#batch_norm

X (batch, features), gamma, beta (features); backward dZ and the layer below's `saved`  read
Y, saved (batch, features), mean, rstd (features); dZ_prev, db_prev, dgamma           written
running_mean, running_var (features)                                          read and written
Fused: activation and dropout forward; the layer below backward.
Two phases: statistics by strips of columns, each over all rows in order; then blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable

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
    RUNNING_MEAN,
    RUNNING_VAR,
    STATISTICS_TICKET,
    X_,
)  # fmt: skip
from backprop_kernels.cpu.program import scratch

STRIP = 32  # columns per piece of the statistics: two cache lines of every row


def batch_norm_forward(
    X: Array,
    gamma: Array,
    beta: Array,
    running_mean: Array,
    running_var: Array,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "identity",
    dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None, Array | None, Array | None] | None = None,
) -> tuple[Array, Array | None, Array, Array]:
    """X (batch, features) → Y, saved, mean (features), rstd (features).

    Training uses the batch's mean and biased variance, and moves running_mean and running_var
    (unbiased, as PyTorch does) towards them by `momentum`; else the running ones are used.
    """
    checks.norm_forward(
        "batch_norm_forward", X, gamma, beta, activation, dropout, out, X.shape[1],
        running_mean=running_mean, running_var=running_var,
    )  # fmt: skip
    checks.contiguous(
        "batch_norm_forward", X=X, gamma=gamma, beta=beta, running_mean=running_mean,
        running_var=running_var, **checks.named_outputs(out, "Y", "saved", "mean", "rstd"),
    )  # fmt: skip
    numbers = scratch(4 + 2 * X.shape[1], "float64")  # then the sums of the statistics
    numbers[:3] = eps, momentum, training and len(X) > 0
    return norms.forward(
        _forward, X, gamma, beta, numbers, (running_mean, running_var), activation, dropout, out,
        X.shape[1],
    )  # fmt: skip


def batch_norm_backward(
    dZ: Array,
    X: Array,
    gamma: Array,
    mean: Array,
    rstd: Array,
    saved: Array | None = None,
    activation: str = "identity",
    dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None, Array | None] | None = None,
) -> tuple[Array, Array | None, Array | None]:
    """dZ (batch, features), the layer below → dZ_prev, db_prev, dgamma (dbeta is dZ's own db)."""
    checks.norm_backward(
        "batch_norm_backward", dZ, X, gamma, mean, rstd, saved, activation, dropout, out, X.shape[1]
    )
    checks.contiguous(
        "batch_norm_backward", dZ=dZ, X=X, gamma=gamma, mean=mean, rstd=rstd, saved=saved,
        **checks.named_outputs(out, "dZ_prev", "db_prev", "dgamma"),
    )  # fmt: skip
    partial = scratch((2, X.shape[1]), "float64")  # Σ dZ and Σ dZ x̂
    return norms.backward(
        _backward, dZ, X, gamma, mean, rstd, saved, activation, dropout, out, partial
    )


def _forward(dtype: str) -> Callable[..., None]:
    import numpy as np
    from numba import types

    from backprop_kernels.cpu.memory import barrier, call_epilogue, float64s, pointer, take

    real = getattr(types, dtype)
    floats = pointer(real)

    def kernel(args, sync, thread, threads):
        X, Y = floats(args[X_]), floats(args[OUT])
        gamma, beta = floats(args[GAMMA]), floats(args[BETA])
        mean, rstd = floats(args[MEAN]), floats(args[RSTD])
        running_mean, running_var = floats(args[RUNNING_MEAN]), floats(args[RUNNING_VAR])
        rows, width = args[ROWS], args[COLUMNS]
        strips, blocks = (width + STRIP - 1) // STRIP, (rows + LEAF_ROWS - 1) // LEAF_ROWS
        numbers, sums = float64s(args[NUMBERS]), float64s(args[NUMBERS] + 32)
        eps, momentum, training = numbers[0], numbers[1], numbers[2] != 0.0
        taken = 0
        while True:
            piece = take(args, STATISTICS_TICKET, strips, thread, threads, taken)
            if piece < 0:
                break
            taken += 1
            low = piece * STRIP
            high = min(low + STRIP, width)
            if not training:
                for j in range(low, high):
                    mean[j] = running_mean[j]
                    rstd[j] = real(1.0 / np.sqrt(types.float64(running_var[j]) + eps))
                continue
            for j in range(low, high):
                sums[j], sums[width + j] = 0.0, 0.0
            for i in range(rows):
                for j in range(low, high):
                    sums[j] += types.float64(X[i * width + j])
            for j in range(low, high):
                sums[j] /= rows
            for i in range(rows):
                for j in range(low, high):
                    d = types.float64(X[i * width + j]) - sums[j]
                    sums[width + j] += d * d
            for j in range(low, high):
                var = sums[width + j] / rows
                mean[j], rstd[j] = real(sums[j]), real(1.0 / np.sqrt(var + eps))
                unbiased = sums[width + j] / max(rows - 1, 1)
                old_mean, old_var = types.float64(running_mean[j]), types.float64(running_var[j])
                running_mean[j] = real(old_mean + momentum * (sums[j] - old_mean))
                running_var[j] = real(old_var + momentum * (unbiased - old_var))
        barrier(sync, threads)
        taken = 0
        while True:
            piece = take(args, BLOCK_TICKET, blocks, thread, threads, taken)
            if piece < 0:
                break
            taken += 1
            first = piece * LEAF_ROWS
            count = min(LEAF_ROWS, rows - first)
            for i in range(first, first + count):
                for j in range(width):
                    e = i * width + j
                    Y[e] = (X[e] - mean[j]) * rstd[j] * gamma[j] + beta[j]
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
    )

    real = getattr(types, dtype)
    floats = pointer(real)

    def kernel(args, sync, thread, threads):
        X, dZ, dX = floats(args[X_]), floats(args[IN]), floats(args[OUT])
        gamma, mean, rstd = floats(args[GAMMA]), floats(args[MEAN]), floats(args[RSTD])
        sums, dgamma = float64s(args[PARTIAL]), floats(args[DGAMMA])
        rows, width = args[ROWS], args[COLUMNS]
        strips, blocks = (width + STRIP - 1) // STRIP, (rows + LEAF_ROWS - 1) // LEAF_ROWS
        taken = 0
        while True:
            piece = take(args, STATISTICS_TICKET, strips, thread, threads, taken)
            if piece < 0:
                break
            taken += 1
            low = piece * STRIP
            high = min(low + STRIP, width)
            for j in range(low, high):
                sums[j], sums[width + j] = 0.0, 0.0
            for i in range(rows):
                for j in range(low, high):
                    e = i * width + j
                    d = types.float64(dZ[e])
                    sums[j] += d
                    sums[width + j] += d * types.float64((X[e] - mean[j]) * rstd[j])
            for j in range(low, high):
                dgamma[j] = real(sums[width + j])
        barrier(sync, threads)
        taken = 0
        while True:
            piece = take(args, BLOCK_TICKET, blocks, thread, threads, taken)
            if piece < 0:
                break
            taken += 1
            first = piece * LEAF_ROWS
            count = min(LEAF_ROWS, rows - first)
            for i in range(first, first + count):
                for j in range(width):
                    e = i * width + j
                    x_hat = (X[e] - mean[j]) * rstd[j]
                    d = dZ[e] - real(sums[j] / rows) - x_hat * real(sums[width + j] / rows)
                    dX[e] = gamma[j] * rstd[j] * d
            if args[EPILOGUE] != 0:
                call_epilogue(args[EPILOGUE], args[EPILOGUE_ARGS], first, count, 0, width)
        if args[FINISH] != 0:
            barrier(sync, threads)
            call_kernel(args[FINISH], args[EPILOGUE_ARGS], sync, thread, threads)

    return kernel
