"""How kernels that walk over the rows of an array divide them: by its shape alone."""

from __future__ import annotations

from typing import NamedTuple

THREADS = 256  # of a block; this and WARP as reduce.cuh has them
WARP = 32
MOST_BLOCKS = 512  # partial sums of as many blocks are added up in order


def across(columns: int) -> int:
    """How many threads stand side by side in a row: a power of two, up to a warp."""
    return min(1 << max(columns - 1, 0).bit_length(), WARP)


class Division(NamedTuple):
    """Blocks of rows."""

    blocks: int
    rows: int
    columns: int
    rows_per_block: int
    across: int

    @property
    def arguments(self) -> tuple[int, ...]:
        """rows, columns, rows_per_block, across: what kernels take."""
        return self[1:]


def division(rows: int, columns: int, whole: int = 0) -> Division:
    """At least one element for each thread of a block, and no more than MOST_BLOCKS blocks.

    By `whole`, the rows of the batch that these are a part of, or by these. A block takes a power
    of two of rows, so that parts hold whole blocks.
    """
    side = across(columns)
    wanted = max(THREADS // side, -(-max(whole, rows) // MOST_BLOCKS))
    rows_per_block = 1 << (wanted - 1).bit_length()
    return Division(-(-rows // rows_per_block), rows, columns, rows_per_block, side)


def blocks_for(count: int) -> int:
    """Blocks for `count` elements, each thread taking every so-many-th."""
    return min(-(-count // THREADS), MOST_BLOCKS)
