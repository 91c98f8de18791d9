"""Where a model's arrays live: NumPy's memory, or a GPU's.

Kernels compute with arrays where they are. Everything else that touches them, from the initial
weights to a checkpoint, goes through these few methods, which `cuda.memory.DeviceMemory` has too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
from backprop_kernels import host_memory
from backprop_kernels.arrays import Array
from backprop_kernels.errors import KindError


class Memory(Protocol):
    """`with memory:` makes its device the current one and no room there a DeviceMemoryError."""

    def __enter__(self) -> Memory: ...

    def __exit__(self, *problem: object) -> None: ...

    def taken(self, where: str, argument: str, value: Any) -> Array:
        """`value`, an array on a GPU, where it lies in this memory; or an error."""

    def zeros(self, shape: Any, dtype: Any) -> Array:
        """A new array."""

    def place(self, array: Array) -> Array:
        """`array` where kernels can read it: itself, or a copy on the device."""

    def fill(self, array: Array, values: Any) -> None:
        """Copy a number, a NumPy array or an array of this memory into `array`."""

    def numpy(self, array: Array) -> Array:
        """`array` where NumPy can read it: itself, or a copy of what lies on the device."""

    def rows(self, array: Array, index: Array) -> Array:
        """Copies of these rows of an array that lies here or with NumPy; index is NumPy's."""

    def fits(self, arrays: Sequence[Array]) -> bool:
        """Whether copies of these arrays may be kept here."""

    def ahead(self, batches: Iterable[Sequence[Array]]) -> Iterator[Sequence[Array]]:
        """NumPy batches, each placed while the one before is used; good until the next."""

    def feed(self, rows: int) -> Any:
        """What sends single batches of up to `rows` rows; nothing where they are read in place."""

    def autotuned(self) -> AbstractContextManager[None]:
        """Captures inside choose the kernels that are the fastest here."""

    def stepping(self, *given: Any) -> Any:
        """What lets a captured step run without the host; nothing where the host runs it."""


class HostMemory:
    """NumPy arrays, aligned as the CPU's kernels like them."""

    def __enter__(self) -> HostMemory:
        return self

    def __exit__(self, *problem: object) -> None:
        pass

    def taken(self, where: str, argument: str, value: Any) -> Array:
        raise KindError(
            f"{where}: {argument}: expected an array in host memory, got one on a GPU "
            f"({type(value).__module__}.{type(value).__name__}); copy with cupy.asnumpy(x), or use "
            'a model with device="cuda"'
        )

    def zeros(self, shape: Any, dtype: Any) -> Array:
        return host_memory.zeros(shape, dtype)

    def place(self, array: Array) -> Array:
        return array

    def fill(self, array: Array, values: Any) -> None:
        if array is not values:
            array[...] = values

    def numpy(self, array: Array) -> Array:
        return array

    def rows(self, array: Array, index: Array) -> Array:
        return array[index]

    def fits(self, arrays: Sequence[Array]) -> bool:
        return True

    def ahead(self, batches: Iterable[Sequence[Array]]) -> Iterator[Sequence[Array]]:
        return iter(batches)

    def feed(self, rows: int) -> None:
        return None

    def autotuned(self) -> AbstractContextManager[None]:
        return nullcontext()

    def stepping(self, *given: Any) -> None:
        return None


HOST = HostMemory()


def on_gpu(value: Any) -> bool:
    """Whether `value` is an array of CuPy's or of another library for GPUs."""
    return hasattr(value, "__cuda_array_interface__")


def expect_one_kind(where: str, **arrays: Any) -> None:
    """Refuse a mixture of arrays in host memory and arrays on a GPU; None is neither."""
    there = [name for name, value in arrays.items() if on_gpu(value)]
    if not there:
        return
    here = [name for name, value in arrays.items() if value is not None and not on_gpu(value)]
    if here:
        raise KindError(
            f"{where}: expected arrays of one kind, got {', '.join(there)} on a GPU and "
            f"{', '.join(here)} in host memory; copy with cupy.asarray(x) or cupy.asnumpy(x)"
        )


def contiguous(array: Array, dtype: Any) -> Array:
    """`array` in C order and this dtype, where it lies; itself or a copy."""
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array, dtype)
    return array.astype(dtype, order="C", copy=False)
