"""What forward saves for backward, as each backend keeps it: Y or Z, or a bit for each element."""

from __future__ import annotations

from typing import Any

import numpy as np
from backprop_kernels.activations import ACTIVATIONS, saved_as_bits, saved_beside
from backprop_kernels.arrays import Array
from backprop_kernels.reference.epilogue import as_bits

from tests.guarded import Guards
from tests.tolerances import assert_within

# Where operators that carry the layer below take what it saved; its activation comes next.
TAKES_SAVED = {"linear_dgrad": 2, "batch_norm_backward": 5, "layer_norm_backward": 5}


def _bits(backend: Any, activation: str) -> bool:
    return saved_as_bits(activation, getattr(backend, "SAVES_BITS", False))


def output(
    guards: Guards, backend: Any, activation: str, shape: tuple[int, ...], dtype: np.dtype
) -> Array | None:
    """A guarded array for it, also where Y would be enough."""
    beside = saved_beside(activation, shape[1], dtype, True, _bits(backend, activation))
    return None if beside is None else guards.output((shape[0], beside[0]), np.dtype(beside[1]))


def as_kept(backend: Any, activation: str, saved: Array | None) -> Array | None:
    """The table's Y or Z as this backend keeps it."""
    return as_bits(saved, activation) if saved is not None and _bits(backend, activation) else saved


def arguments(backend: Any, name: str, given: tuple[Any, ...]) -> list[Any]:
    """The arguments of an operator, with Y or Z for what was saved, as this backend takes them."""
    taken, place = list(given), TAKES_SAVED.get(name)
    if place is not None and len(given) > place + 1:
        taken[place] = as_kept(backend, given[place + 1], given[place])
    return taken


def assert_saved(
    backend: Any, activation: str, saved: Array | None, Y: Array, Z: Array, error: Array
) -> None:
    """`saved` belongs to Y, and to Z within `error`."""
    saves = ACTIVATIONS[activation].saves
    if saves == "" or saved is None:
        assert saved is None and saves == ""
    elif _bits(backend, activation):
        assert np.array_equal(saved, as_bits(Z if saves == "Z" else Y, activation))
    elif saves == "Z":
        assert_within(saved, Z, error, f"saved Z of {activation}")
    else:
        assert np.array_equal(saved, Y)
