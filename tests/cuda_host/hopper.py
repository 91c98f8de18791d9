"""Hopper's products at sizes that the emulator runs in no time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from backprop_kernels.cuda import tiles
from backprop_kernels.cuda.tiles import Tile, _hopper

# Two stages, blocks of a cluster, a tile for two warpgroups or for one.
SHARED = _hopper("shared", 1, 64, 2, 1, False)
IN_CLUSTERS = _hopper("in clusters", 1, 128, 2, 2, False)
IN_TURN = _hopper("in turn", 1, 64, 3, 1, True)
TALL_IN_TURN = _hopper("tall, in turn", 2, 128, 2, 2, True)
TINY = (SHARED, IN_CLUSTERS, IN_TURN, TALL_IN_TURN)


@contextmanager
def on_hopper(tile: Tile) -> Iterator[None]:
    """Whatever TMA takes is multiplied by this tile, batches in runs of 64 rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "HOPPER", dict.fromkeys(tiles.HOPPER, (tile,)))
        patch.setattr(tiles, "ENOUGH_BLOCKS", 1)
        patch.setitem(tiles.BLOCKS_WANTED, "hopper", 1000)
        patch.setitem(tiles.LEAST_TERMS, "hopper", 64)
        yield
