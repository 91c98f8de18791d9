"""linear_forward: Y = dropout(act(X Wᵀ + b)).  docs/derivations.md#linear_forward

The kernel and its contract: linear_forward.cu.
"""

from __future__ import annotations

from backprop_kernels import checks
from backprop_kernels.activations import saved_output
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cuda.by_tiles import along_k, grid, operands, result, written
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.epilogue import SAVES_BITS, dropout_arguments, variant
from backprop_kernels.cuda.launch import capability, empty, launch, on_device
from backprop_kernels.cuda.part import rows_of_whole
from backprop_kernels.cuda.tensor_map import can_map
from backprop_kernels.cuda.tiles import choose
from backprop_kernels.cuda.transpose import transposed


def linear_forward(
    X: Array,
    W: Array,
    b: Array | None = None,
    activation: str = "identity",
    dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array | None]:
    """X (batch, in), W (out, in), b (out) → Y (batch, out), and what backward needs or None."""
    return forward(None, X, W, b, activation, dropout, out)


def forward(
    precision: str | None, X: Array, W: Array, b: Array | None = None,
    activation: str = "identity", dropout: Dropout | None = None,
    out: tuple[Array | None, Array | None] | None = None, X_rounded: bool = False,
    Y_rounded: bool = False, copy: Array | None = None, cell: Array | None = None,
) -> tuple[Array, Array | None]:  # fmt: skip
    """`linear_forward` in a precision, or X's own. Y may be `stored` or, given as such, `real`.

    In tf32, whether X holds rounded numbers, and Y shall; `copy` (out, batch): Yᵀ of these, as
    transpose.py has it."""
    checks.linear_forward(X, W, b, activation, dropout, out, precision, SAVES_BITS)
    Y, kept = out or (None, None)
    on_device("linear_forward", X=X, W=W, b=b, out_Y=Y, out_saved=kept)
    (batch, in_features), out_features = X.shape, len(W)
    if Y is None:
        Y = empty((batch, out_features), X.dtype)
    saved, kept = saved_output(Y, kept, activation, dropout, None if out else empty, SAVES_BITS)
    if Y.size:
        choice = choose(
            "linear_forward", rows_of_whole(batch), out_features, in_features,
            precision or str(X.dtype), capability(X), can_map(X, W, Y),
        )  # fmt: skip
        tile = choice.tile
        stored = "stored" if Y.dtype == X.dtype else "real"
        real = choice.precision.real
        fused = copy if choice.along_k else None  # what its epilogue writes; another's follows
        A, B = along_k(choice, X, X_rounded), along_k(choice, W, False)
        types = (*choice.types, *result(stored, Y_rounded, fused))
        launch(
            Unit("linear_forward.cu", variant(real, activation, types)),
            "linear_forward", grid(choice, batch, out_features, 1, X), (tile.threads,),
            *operands(choice, A, B, batch, out_features), b, written(tile, Y, fused), kept, batch,
            out_features, in_features, *dropout_arguments(dropout, real), cell,
            shared=tile.shared,
        )  # fmt: skip
        if copy is not fused:
            transposed(Y, copy)
    return Y, saved
