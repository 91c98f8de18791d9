"""Whether one kernel can train a whole network, and how the network lies in it: `choose`.

What is limited is a multiprocessor: the shared memory that holds weights, activations and deltas
of a tile of rows, and the registers that hold the sums of the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.arrays import LinearLayer
from backprop_kernels.cuda.epilogue import SAVES
from backprop_kernels.cuda.rows import THREADS, WARP
from backprop_kernels.losses import LOSSES

PRECISION = "bf16"
WIDEST = 128  # of a layer
WARPS = THREADS // WARP
TILES = (128, 64, 32, 16)  # rows of a tile, the most first: they share what is read of the weights
# KiB of shared memory that a block may ask for, by compute capability; every other one from 8.0 on
# gives 99 or more.
SHARED = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}
LEAST_SHARED = 99
STATIC = 1024  # bytes besides: of sums over the block
# Fours of sums that a thread keeps in its registers, those of the layer at work included.
IN_REGISTERS = 39
BLOCKS, LEAST_ROWS = 256, 64  # at most so many blocks, of so many rows at least: by the batch alone


class Place(NamedTuple):
    """Where a layer's things begin in shared memory, in bytes; sums in registers at -1."""

    weights_at: int
    bias_at: int
    input_at: int
    output_at: int
    kept_at: int
    sums_at: int
    warps_down: int  # how the warps share its dW: so many above one another


class Fit(NamedTuple):
    """A network in one kernel."""

    tile: int
    places: tuple[Place, ...]
    z_at: int  # of the last layer, in float32, and ∂L/∂Z
    d_at: int
    ahead_at: int  # of the input of the next tile, in float32; -1 where there is no room
    shared: int  # bytes of dynamic shared memory


class Choice(NamedTuple):
    """`fit` is None where one kernel cannot do it; `why` says in words what decided."""

    fit: Fit | None
    why: str


def choose(
    layers: Sequence[LinearLayer], loss: str, precision: str, capability: int, rows: int
) -> Choice:
    """One kernel for the whole network where it fits, else None: layer by layer then."""
    widths = "-".join(str(n) for n in (layers[0].in_features, *(x.out_features for x in layers)))
    where = f"network {widths} in {precision}"
    widest = max(max(layer.in_features, layer.out_features) for layer in layers)
    reason = ""
    if precision != PRECISION:
        reason = f"one kernel for all is there for {PRECISION} alone"
    elif widest > WIDEST:
        reason = f"a layer is {widest} wide, more than {WIDEST}"
    elif LOSSES[loss].value is None and loss != "cross_entropy":
        reason = f"the loss is {loss}"
    if reason:
        return Choice(None, f"{where}: layer by layer, as {reason}")
    most = SHARED.get(capability, LEAST_SHARED) * 1024 - STATIC
    tiles = [tile for tile in TILES if tile <= rows_per_block(rows)]
    fits = [_fit(layers, loss, tile, ahead) for tile in tiles for ahead in (True, False)]
    fit = next((fit for fit in fits if fit.shared <= most), None)
    if fit is None:
        least = fits[-1].shared
        return Choice(
            None,
            f"{where}: layer by layer, as one kernel needs {least:,} bytes of shared memory and "
            f"this GPU has {most:,}",
        )
    spilled = sum(place.sums_at >= 0 for place in fit.places)
    ahead = ", the next ones fetched ahead" if fit.ahead_at >= 0 else ""
    return Choice(
        fit,
        f"{where}: one kernel, {fit.tile} rows at a time{ahead}, {fit.shared:,} of {most:,} bytes "
        f"of shared memory, gradients of {len(layers) - spilled} of {len(layers)} layers in "
        "registers",
    )


def rows_per_block(rows: int) -> int:
    """A multiple of LEAST_ROWS."""
    return -(-max(rows, 1) // (BLOCKS * LEAST_ROWS)) * LEAST_ROWS


def padded(width: int) -> int:
    return -(-width // 16) * 16


def matrix_bytes(rows: int, width: int) -> int:
    """Of a matrix of bf16 in shared memory, as mlp_step.cu has it."""
    return rows * (padded(width) + 8) * 2


def warps_down(layer: LinearLayer) -> int:
    """How to share dW so that a warp has the fewest pieces, operands to read, and sums of db."""

    def cost(down: int) -> tuple[int, int, int]:
        high, wide = _pieces(layer, down)
        return high * wide, high + wide, high

    return min((1, 2, 4, 8), key=cost)


def _pieces(layer: LinearLayer, down: int) -> tuple[int, int]:
    """Pieces of 16 x 16 of dW that a warp has, above one another and side by side."""
    high, wide = padded(layer.out_features) // 16, padded(layer.in_features) // 16
    return -(-high // down), -(-wide // (WARPS // down))


def sums(layer: LinearLayer) -> tuple[int, int]:
    """Fours of sums of dW and db that a thread has: in all, and of one row of its pieces."""
    high, wide = _pieces(layer, warps_down(layer))
    return high * (2 * wide + 1), 2 * wide + 1


def _in_registers(layers: Sequence[LinearLayer]) -> set[int]:
    """The layers whose sums stay in registers: the largest, with room for a row of any other's."""
    chosen: set[int] = set()
    for i in sorted(range(len(layers)), key=lambda i: (-sums(layers[i])[0], i)):
        tried = {*chosen, i}
        rows = [sums(layer)[1] for k, layer in enumerate(layers) if k not in tried]
        if sum(sums(layers[k])[0] for k in tried) + max(rows, default=0) <= IN_REGISTERS:
            chosen = tried
    return chosen


def _fit(layers: Sequence[LinearLayer], loss: str, tile: int, ahead: bool) -> Fit:
    """Everything one after the other in shared memory."""
    end = 0

    def take(size: int) -> int:
        nonlocal end
        start, end = end, -(-(end + size) // 16) * 16
        return start

    last, resident = len(layers) - 1, _in_registers(layers)
    places = []
    delta = take(matrix_bytes(tile, layers[0].in_features))
    for i, layer in enumerate(layers):
        keeps = i < last and SAVES[ACTIVATIONS[layer.activation].saves] == 2
        below = delta
        delta = take(matrix_bytes(tile, layer.out_features))
        places.append(
            Place(
                weights_at=take(matrix_bytes(padded(layer.out_features), layer.in_features)),
                bias_at=take(4 * padded(layer.out_features)),
                input_at=below,
                output_at=delta,
                kept_at=take(matrix_bytes(tile, layer.out_features)) if keeps else 0,
                sums_at=-1 if i in resident else take(16 * THREADS * sums(layer)[0]),
                warps_down=warps_down(layer),
            )
        )
    row = 4 * (layers[last].out_features | 1)
    z_at = take(tile * row)
    d_at = take(tile * row) if LOSSES[loss].value is None else z_at  # in its place
    ahead_at = take(tile * 4 * layers[0].in_features) if ahead else -1
    return Fit(tile, tuple(places), z_at, d_at, ahead_at, end)
