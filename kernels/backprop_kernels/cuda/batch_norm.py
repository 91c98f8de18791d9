"""batch_norm: statistics over the batch.  docs/derivations.md#batch_norm

The kernels and their contract: batch_norm.cu; sums over the blocks: column_sums.cu.
"""

from __future__ import annotations

from backprop_kernels import checks
from backprop_kernels.activations import saved_output
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.epilogue import (
    SAVES_BITS,
    column_sums,
    dropout_arguments,
    storage,
    variant,
)
from backprop_kernels.cuda.launch import empty, launch, on_device
from backprop_kernels.cuda.part import adds_up, rows_before, rows_of_whole
from backprop_kernels.cuda.rows import THREADS, division


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
    given = X, gamma, beta, running_mean, running_var, training, momentum, eps
    return forward(None, *given, activation, dropout, out)


def forward(
    precision: str | None, X: Array, gamma: Array, beta: Array, running_mean: Array,
    running_var: Array, training: bool = True, momentum: float = 0.1, eps: float = 1e-5,
    activation: str = "identity", dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None, Array | None, Array | None] | None = None,
) -> tuple[Array, Array | None, Array, Array]:  # fmt: skip
    """`batch_norm_forward` of arrays as a precision stores them; Y may be `real`, given as such."""
    checks.norm_forward(
        "batch_norm_forward", X, gamma, beta, activation, dropout, out, X.shape[1],
        SAVES_BITS, precision, running_mean=running_mean, running_var=running_var,
    )  # fmt: skip
    Y, kept, mean, rstd = out or (None, None, None, None)
    on_device(
        "batch_norm_forward", X=X, gamma=gamma, beta=beta, running_mean=running_mean,
        running_var=running_var, out_Y=Y, out_saved=kept, out_mean=mean, out_rstd=rstd,
    )  # fmt: skip
    (rows, columns), dtype = X.shape, gamma.dtype
    Y = empty(X.shape, X.dtype) if Y is None else Y
    mean = empty((columns,), dtype) if mean is None else mean
    rstd = empty((columns,), dtype) if rstd is None else rstd
    saved, kept = saved_output(Y, kept, activation, dropout, None if out else empty, SAVES_BITS)
    if not columns:
        return Y, saved, mean, rstd

    types = storage(precision, Y.dtype != X.dtype)
    unit = Unit("batch_norm.cu", variant(dtype, activation, types))
    work, real = division(rows, columns), dtype.type
    grid, strips, block = (work.blocks,), (-(-columns // THREADS),), (THREADS,)
    if training and rows:
        adds_up(rows_of_whole(rows), "batch_norm")
        sums, squares = (empty((work.blocks, columns), dtype) for _ in range(2))
        launch(unit, "batch_norm_blocks", grid, block, X, sums, squares, *work.arguments)
        launch(
            unit, "batch_norm_statistics", strips, block, sums, squares, work.blocks, mean, rstd,
            running_mean, running_var, real(momentum), real(eps), rows, columns,
            work.rows_per_block,
        )  # fmt: skip
    else:
        launch(
            unit, "batch_norm_running", strips, block, running_mean, running_var, mean, rstd,
            real(eps), columns,
        )  # fmt: skip
    if rows:
        launch(
            unit, "batch_norm_forward", grid, block, X, gamma, beta, mean, rstd, Y, kept,
            *work.arguments, *dropout_arguments(dropout, dtype),
        )  # fmt: skip
    return Y, saved, mean, rstd


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
    return backward(None, None, dZ, X, gamma, mean, rstd, saved, activation, dropout, out)


def backward(
    precision: str | None, unscale: Array | None, dZ: Array, X: Array, gamma: Array, mean: Array,
    rstd: Array, saved: Array | None = None, activation: str = "identity",
    dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None, Array | None] | None = None,
) -> tuple[Array, Array | None, Array | None]:  # fmt: skip
    """`batch_norm_backward` of arrays as a precision stores them. dZ and dZ_prev may be multiplied
    by a scale: `unscale` is its inverse, on the device, and db_prev and dgamma are true ones."""
    checks.norm_backward(
        "batch_norm_backward", dZ, X, gamma, mean, rstd, saved, activation, dropout, out,
        X.shape[1], SAVES_BITS, precision,
    )  # fmt: skip
    (rows, columns), real = X.shape, gamma.dtype
    dZ_prev, db_prev, dgamma = out or (None, empty((columns,), real), None)
    on_device(
        "batch_norm_backward", dZ=dZ, X=X, gamma=gamma, mean=mean, rstd=rstd, saved=saved,
        out_dZ_prev=dZ_prev, out_db_prev=db_prev, out_dgamma=dgamma,
    )  # fmt: skip
    dZ_prev = empty(X.shape, X.dtype) if dZ_prev is None else dZ_prev
    dgamma = empty((columns,), real) if dgamma is None else dgamma
    # Of these rows alone, and as dZ is multiplied, so are these.
    dbeta, scaled, before = empty((columns,), real), dgamma, rows_before()
    if unscale is not None or before is not None:
        scaled = empty((columns,), real)

    unit = Unit("batch_norm.cu", variant(real, activation, storage(precision, False)))
    work = division(rows, columns)
    grid, block = (work.blocks,), (THREADS,)
    sums, products, partial = (empty((work.blocks, columns), real) for _ in range(3))
    if dZ_prev.size:
        launch(
            unit, "batch_norm_products", grid, block, dZ, X, mean, rstd, sums, products,
            *work.arguments,
        )  # fmt: skip
    column_sums(sums, dbeta)
    column_sums(products, scaled)
    if scaled is not dgamma:
        column_sums(products, dgamma, unscale, before)
    if dZ_prev.size:
        launch(
            unit, "batch_norm_backward", grid, block, dZ, X, gamma, mean, rstd, dbeta, scaled,
            saved, dZ_prev, None if db_prev is None else partial, *work.arguments,
            *dropout_arguments(dropout, real),
        )  # fmt: skip
    if db_prev is not None:
        column_sums(partial, db_prev, unscale, before)
    return dZ_prev, db_prev, dgamma
