"""Where a model's arrays live: NumPy's memory, or a GPU's.

Kernels compute with arrays where they are. Everything else that touches them, from the initial
weights to a checkpoint, goes through these few methods, which `cuda.memory.DeviceMemory` has too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from backprop_kernels import host_memory
from backprop_kernels.arrays import Array


class Memory(Protocol):
    """`with memory:` makes its device the current one."""

    def __enter__(self) -> Memory: ...

    def __exit__(self, *problem: object) -> None: ...

    def zeros(self, shape: Any, dtype: Any) -> Array:
        """A new array."""

    def place(self, array: Array) -> Array:
        """`array` where kernels can read it: itself, or a copy on the device."""

    def fill(self, array: Array, values: Any) -> None:
        """Copy a number, a NumPy array or an array of this memory into `array`."""

    def numpy(self, array: Array) -> Array:
        """`array` where NumPy can read it: itself, or a copy of what lies on the device."""

    def fits(self, arrays: Sequence[Array]) -> bool:
        """Whether copies of these arrays may be kept here."""

    def ahead(self, batches: Iterable[Sequence[Array]]) -> Iterator[Sequence[Array]]:
        """NumPy batches, each placed while the one before is used; good until the next."""


class HostMemory:
    """NumPy arrays, aligned as the CPU's kernels like them."""

    def __enter__(self) -> HostMemory:
        return self

    def __exit__(self, *problem: object) -> None:
        pass

    def zeros(self, shape: Any, dtype: Any) -> Array:
        return host_memory.zeros(shape, dtype)

    def place(self, array: Array) -> Array:
        return array

    def fill(self, array: Array, values: Any) -> None:
        if array is not values:
            array[...] = values

    def numpy(self, array: Array) -> Array:
        return array

    def fits(self, arrays: Sequence[Array]) -> bool:
        return True

    def ahead(self, batches: Iterable[Sequence[Array]]) -> Iterator[Sequence[Array]]:
        return iter(batches)


HOST = HostMemory()
