"""How a product is cut into blocks of threads, and which kernel computes it: `choose`.

Three generations: "simt" multiplies `real` numbers one by one on any GPU (product.cuh); "ampere"
uses tensor cores, from sm_80 on (tensor_product.cuh); "hopper" those of sm_90 in the way that only
it has (hopper_product.cuh). Their tiles are the tables below. A fourth is NVIDIA's library, where
it is installed and was measured to be faster (cublaslt.py, tuning.py): it makes the sums, and the
same `.cu` does the rest (given_product.cuh).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np

from backprop_kernels.cuda import cublaslt
from backprop_kernels.cuda.tensor_map import ROWS_ON
from backprop_kernels.errors import OptionError
from backprop_kernels.precisions import PRECISIONS, Precision

TENSOR_CORES = 80  # the compute capability that has them for every precision of the table
HOPPER_ALONE = 90  # wgmma is neither on older GPUs nor on newer ones
STRIP_BYTES = 64  # of K, per row of a strip in shared memory, as tensor_product.cuh has it
# As hopper_product.cuh has them: K in a strip of 16-bit numbers, and bytes to write a tile by, for
# each warpgroup.
STRIP_K, WRITE_BYTES = 64, 64 * 36 * 4 + 2 * 32 * 32 * 4


class Tile(NamedTuple):
    """One block of threads computes rows × columns elements; a line of TILES."""

    generation: str
    name: str
    rows: int
    columns: int
    threads: int
    shared: int  # bytes of dynamic shared memory
    header: str
    numbers: tuple[int, ...]  # the template's arguments in that header
    summed_rows: int  # whose columns are added up at once
    writers: int  # threads that write as many rows
    cluster: int = 1  # blocks that share what they fetch: for tiles below one another

    def blocks(self, rows: int, columns: int) -> int:
        """How many blocks cover a matrix."""
        return -(-rows // self.rows) * -(-columns // self.columns)

    def clusters(self, rows: int, columns: int) -> int:
        """How many clusters of blocks do."""
        return -(-rows // (self.rows * self.cluster)) * -(-columns // self.columns)


def _simt(name: str, m: int, n: int, k: int, rows: int, columns: int) -> Tile:
    threads = m * n // (rows * columns)
    return Tile("simt", name, m, n, threads, 0, "product.cuh", (m, n, k, rows, columns), m, threads)


def _ampere(name: str, m: int, n: int, warp_m: int, warp_n: int, stages: int) -> Tile:
    threads, shared = 32 * (m // warp_m) * (n // warp_n), stages * (m + n) * STRIP_BYTES
    numbers = (m, n, warp_m, warp_n, stages)
    return Tile("ampere", name, m, n, threads, shared, "tensor_product.cuh", numbers, m, threads)


def _hopper(name: str, pieces: int, n: int, stages: int, cluster: int, ping_pong: bool) -> Tile:
    """`pieces` of 64 rows for each of two warpgroups, which share a tile or (ping_pong) do not."""
    m = 64 * pieces * (1 if ping_pong else 2)
    shared = stages * (m + n) * 2 * STRIP_K + 2 * WRITE_BYTES + (stages + 1) * 16
    numbers = (pieces, n, stages, cluster, int(ping_pong))
    header = "hopper_product.cuh"
    return Tile("hopper", name, m, n, 384, shared, header, numbers, 64 * pieces, 128, cluster)


# The largest first: it needs the least memory traffic, where there are blocks enough to fill a GPU.
SMALL = _simt("small", 32, 32, 16, 4, 4)
AMPERE = (
    _ampere("wide", 128, 256, 64, 64, 4),
    _ampere("large", 128, 128, 64, 64, 4),
    _ampere("small", 64, 64, 32, 32, 4),
)
# Where an operand is several factors, a warp has registers for half the sums.
PLANES = _ampere("halved", 128, 128, 64, 32, 4), AMPERE[-1]
# Where much is computed of each sum, one warpgroup does it while the other multiplies. A narrow
# tile may fill the last round of a GPU that a wide one leaves half empty: autotune finds out.
COOPERATIVE = _hopper("cooperative", 1, 256, 4, 2, False)
NARROW = _hopper("narrow", 1, 192, 4, 2, False)
PING_PONG = _hopper("ping-pong", 2, 128, 6, 2, True)
HOPPER = {
    "linear_forward": (PING_PONG, COOPERATIVE, NARROW),
    "linear_dgrad": (PING_PONG, COOPERATIVE, NARROW),
    "linear_wgrad": (COOPERATIVE, NARROW, PING_PONG),
}
HOPPERS = ("bf16", "fp16", "tf32")  # what wgmma takes
ALONG_K = ("tf32",)  # along K alone, and cut off: it is rounded before
LIBRARY = Tile(
    "cublaslt", "of its own", 32, 128, 256, 0, "given_product.cuh", (32, 128, 256), 32, 256
)
# What lies in memory, and what is multiplied: the C++ types of floats.cuh.
NUMBERS = {
    "float32": ("real", "real"),
    "float64": ("real", "real"),
    "tf32": ("real", "tf32"),
    "bf16": ("bf16", "bf16"),
    "fp16": ("fp16", "fp16"),
    "bf16x3": ("real", "bf16_planes<2>"),
    "bf16x6": ("real", "bf16_planes<3>"),
}
TILES = {
    "float32": (_simt("large", 128, 128, 8, 8, 8), SMALL),
    "float64": (_simt("large", 64, 64, 8, 4, 4), SMALL),
    "tf32": AMPERE,
    "bf16": AMPERE,
    "fp16": AMPERE,
    "bf16x3": PLANES,
    "bf16x6": PLANES,
}
ENOUGH_BLOCKS = 64  # fewer would leave multiprocessors of a large GPU without work
# How the batch of linear_wgrad is cut: into runs for about as many blocks, none shorter than that.
# Below, adding their sums costs as much as it saves.
BLOCKS_WANTED = {"simt": 512, "ampere": 512, "hopper": 128}  # two rounds of a large GPU; one
LEAST_TERMS = {"simt": 256, "ampere": 256, "hopper": 1024}


DECIDE: ContextVar[Callable[[Sequence[Choice]], Choice] | None] = ContextVar("DECIDE", default=None)


class Choice(NamedTuple):
    """The kernel for one product of rows × columns elements, of `terms` each."""

    operator: str
    precision: Precision
    rows: int
    columns: int
    terms: int
    tile: Tile
    blocks: int
    run: int  # sums are cut into runs of so many terms
    reason: str

    @property
    def question(self) -> str:
        """What was asked for, in words."""
        return (
            f"{self.operator} of {self.rows} × {self.columns} elements, {self.terms} terms each, "
            f"in {self.precision.name}"
        )

    @property
    def why(self) -> str:
        """What decided, in words."""
        return f"{self.question}: {self.reason}"

    @property
    def along_k(self) -> bool:
        """Whether both operands must be rounded and lie along K: copies of those that do not."""
        return self.tile.generation == "hopper" and self.precision.name in ALONG_K

    @property
    def name(self) -> str:
        """Of the kernel among others for this product."""
        return f"{self.tile.generation} {self.tile.name}"

    @property
    def types(self) -> tuple[str, ...]:
        """The lines of variant.cuh that make the kernel this one."""
        stored, operand = NUMBERS[self.precision.name]
        return (
            '#include "floats.cuh"',
            f"using stored = {stored};",
            f"using operand = {operand};",
            f'#define PRODUCT "{self.tile.header}"',
            f"#define TILE {', '.join(map(str, self.tile.numbers))}",
        )


def choose(
    operator: str, rows: int, columns: int, terms: int, precision: str, capability: int,
    can_map: bool = False,
) -> Choice:  # fmt: skip
    """The kernel that computes a product of rows × columns elements, each a sum of `terms`.

    `can_map`: whether TMA takes all its matrices (tensor_map.py). It is the same on every GPU of a
    generation, so that no bit depends on the GPU; but inside tuning.autotuned() it is what was the
    fastest here. `why` says in words what decided. Raises OptionError where the GPU cannot multiply
    in this precision.
    """
    chosen = _by_shape(operator, rows, columns, terms, precision, capability, can_map)
    decide = DECIDE.get()
    return chosen if decide is None else decide([chosen, *_others(chosen, capability, can_map)])


def _others(chosen: Choice, capability: int, can_map: bool) -> list[Choice]:
    """Every other kernel for the same product."""
    given, precision = chosen[:5], chosen.precision.name
    on_hopper = capability == HOPPER_ALONE and can_map and precision in HOPPERS
    each = (*(HOPPER[chosen.operator] if on_hopper else ()), *TILES[precision])
    tiles = [t for t in each if t is not chosen.tile]
    if can_map and precision in cublaslt.KINDS and cublaslt.available():
        tiles.append(LIBRARY)
    return [_made(*given, tile, "one of several") for tile in tiles]


def _made(
    operator: str, row: Precision, rows: int, columns: int, terms: int, tile: Tile, reason: str
) -> Choice:
    blocks, run = tile.blocks(rows, columns), _run(operator, tile, rows, columns, terms)
    return Choice(operator, row, rows, columns, terms, tile, blocks, run, reason)


def _by_shape(
    operator: str, rows: int, columns: int, terms: int, precision: str, capability: int,
    can_map: bool,
) -> Choice:  # fmt: skip
    row = PRECISIONS[precision]
    if row.tensor_cores and capability < TENSOR_CORES:
        raise OptionError(
            f'{operator}: precision: "{precision}" needs a GPU of compute capability 8.0 or more, '
            f"got {capability // 10}.{capability % 10}; use float32"
        )
    unit = "tensor cores by mma.sync" if row.tensor_cores else "ordinary arithmetic"
    tiles, note = TILES[precision], ""
    if capability == HOPPER_ALONE and row.tensor_cores:
        hopper = _for_hopper(operator, rows, columns, terms, precision, can_map)
        if isinstance(hopper, Tile):
            tiles, unit = (hopper,), "Hopper's tensor cores by wgmma"
        else:
            note = f"; not by wgmma, {hopper}"
    tile = next((t for t in tiles if t.blocks(rows, columns) >= ENOUGH_BLOCKS), tiles[-1])
    chosen = _made(operator, row, rows, columns, terms, tile, "")
    blocks, runs = chosen.blocks, -(-terms // chosen.run)
    enough = (
        f"the largest tile that gives {ENOUGH_BLOCKS} blocks or more"
        if blocks * (runs if tile.generation == "hopper" else 1) >= ENOUGH_BLOCKS
        else f"the smallest tile, as no tile gives {ENOUGH_BLOCKS} blocks"
    )
    return chosen._replace(
        reason=f"{unit}, {blocks} block(s) of {tile.rows} × {tile.columns}"
        f"{f', in {runs} runs' if runs > 1 else ''}, {enough}{note}"
    )


def _for_hopper(
    operator: str, rows: int, columns: int, terms: int, precision: str, can_map: bool
) -> Tile | str:
    """The tile for wgmma, or why there is none."""
    if precision not in HOPPERS:
        return "which takes numbers as they lie in memory, and no planes of them"
    if not can_map:
        width = ROWS_ON // np.dtype(PRECISIONS[precision].stored).itemsize
        return f"as rows do not all start on {ROWS_ON} bytes: make widths multiples of {width}"
    for tile in HOPPER[operator]:
        runs = -(-terms // _run(operator, tile, rows, columns, terms))
        if tile.blocks(rows, columns) * runs >= ENOUGH_BLOCKS:
            return tile
    return f"which would give less than {ENOUGH_BLOCKS} blocks"


def _run(operator: str, tile: Tile, rows: int, columns: int, terms: int) -> int:
    """How many terms are added up before the sums of others join them: by the shape alone."""
    if operator != "linear_wgrad" or tile is LIBRARY or not rows * columns * terms:
        return max(terms, 1)
    wanted = -(-BLOCKS_WANTED[tile.generation] // tile.blocks(rows, columns))
    run = max(-(-terms // wanted), LEAST_TERMS[tile.generation])
    # A power of two, so that a batch that comes in parts (part.py) can come in whole runs.
    return terms if wanted == 1 else min(terms, 1 << run.bit_length() - 1)
