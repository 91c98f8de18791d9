"""layer_norm: statistics over the features of each row.  docs/derivations.md#layer_norm

The kernels and their contract: layer_norm.cu; sums over the blocks: column_sums.cu.
"""

from __future__ import annotations

from typing import Any

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
from backprop_kernels.cuda.rows import THREADS, WARP, division

WIDE = 1024  # columns: a wider row is shared by a block, a narrower one by a warp


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
    return forward(None, X, gamma, beta, eps, activation, dropout, out, centred)


def forward(
    precision: str | None, X: Array, gamma: Array, beta: Array, eps: float = 1e-5,
    activation: str = "identity", dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None, Array | None, Array | None] | None = None,
    centred: bool = True,
) -> tuple[Array, Array | None, Array, Array]:  # fmt: skip
    """`layer_norm_forward` of arrays as a precision stores them; Y may be `real`, given as such."""
    checks.norm_forward(
        "layer_norm_forward", X, gamma, beta, activation, dropout, out, len(X), SAVES_BITS,
        precision,
    )  # fmt: skip
    Y, kept, mean, rstd = out or (None, None, None, None)
    on_device(
        "layer_norm_forward", X=X, gamma=gamma, beta=beta, out_Y=Y, out_saved=kept, out_mean=mean,
        out_rstd=rstd,
    )  # fmt: skip
    (rows, columns), real = X.shape, gamma.dtype
    Y = empty(X.shape, X.dtype) if Y is None else Y
    mean = empty((rows,), real) if mean is None else mean
    rstd = empty((rows,), real) if rstd is None else rstd
    saved, kept = saved_output(Y, kept, activation, dropout, None if out else empty, SAVES_BITS)
    if rows:
        team = _team(columns)
        launch(
            _unit(real, activation, storage(precision, Y.dtype != X.dtype), team),
            "layer_norm_forward", (-(-rows * team // THREADS),), (THREADS,), X, gamma, beta, Y,
            kept, mean, rstd, rows, columns, real.type(eps), int(centred),
            *dropout_arguments(dropout, real),
        )  # fmt: skip
    return Y, saved, mean, rstd


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
    return backward(
        None, None, dZ, X, gamma, mean, rstd, saved, activation, dropout, out, centred
    )  # fmt: skip


def backward(
    precision: str | None, unscale: Array | None, dZ: Array, X: Array, gamma: Array, mean: Array,
    rstd: Array, saved: Array | None = None, activation: str = "identity",
    dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None, Array | None] | None = None, centred: bool = True,
) -> tuple[Array, Array | None, Array | None]:  # fmt: skip
    """`layer_norm_backward` of arrays as a precision stores them. dZ and dZ_prev may be multiplied
    by a scale: `unscale` is its inverse, on the device, and db_prev and dgamma are true ones."""
    checks.norm_backward(
        "layer_norm_backward", dZ, X, gamma, mean, rstd, saved, activation, dropout, out,
        len(X), SAVES_BITS, precision,
    )  # fmt: skip
    (rows, columns), real = X.shape, gamma.dtype
    dZ_prev, db_prev, dgamma = out or (None, empty((columns,), real), None)
    on_device(
        "layer_norm_backward", dZ=dZ, X=X, gamma=gamma, mean=mean, rstd=rstd, saved=saved,
        out_dZ_prev=dZ_prev, out_db_prev=db_prev, out_dgamma=dgamma,
    )  # fmt: skip
    dZ_prev = empty(X.shape, X.dtype) if dZ_prev is None else dZ_prev
    dgamma = empty((columns,), real) if dgamma is None else dgamma
    work = division(rows, columns, rows_of_whole(rows))
    adds_up(work.rows_per_block, "layer_norm_backward")
    products, partial = (empty((work.blocks, columns), real) for _ in range(2))
    if dZ_prev.size:
        launch(
            _unit(real, activation, storage(precision, False), _team(columns)),
            "layer_norm_backward", (work.blocks,), (THREADS,), dZ, X, gamma, mean, rstd, saved,
            dZ_prev, products, None if db_prev is None else partial, *work.arguments, int(centred),
            *dropout_arguments(dropout, real),
        )  # fmt: skip
    column_sums(products, dgamma, unscale, rows_before())
    if db_prev is not None:
        column_sums(partial, db_prev, unscale, rows_before())
    return dZ_prev, db_prev, dgamma


def _team(columns: int) -> int:
    """How many threads share a row."""
    return THREADS if columns > WIDE else WARP


def _unit(real: Any, activation: str, types: tuple[str, ...], team: int) -> Unit:
    text = variant(real, activation, types) + f"constexpr int TEAM = {team};\n"
    return Unit("layer_norm.cu", text)
