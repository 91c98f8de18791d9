"""The memory of one GPU: arrays there, copies to and from it, batches sent ahead of their use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from backprop_kernels.arrays import Array
from backprop_kernels.cuda.launch import cupy, empty, is_array

SHARE = 0.5  # of the free memory that a data set may take


class DeviceMemory:
    """Arrays of device `number`. `backprop/memory.py` says what each method is for."""

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def __enter__(self) -> DeviceMemory:
        cupy().cuda.Device(self.number).__enter__()
        return self

    def __exit__(self, *problem: object) -> None:
        cupy().cuda.Device(self.number).__exit__(*problem)

    def zeros(self, shape: Any, dtype: Any) -> Array:
        with cupy().cuda.Device(self.number):
            array = empty(shape, dtype)
            array.fill(0)
        return array

    def place(self, array: Array) -> Array:
        if is_array(array):
            return array
        with cupy().cuda.Device(self.number):
            placed = empty(array.shape, array.dtype)
            self.fill(placed, array)
        return placed

    def fill(self, array: Array, values: Any) -> None:
        with cupy().cuda.Device(self.number):
            if isinstance(values, np.ndarray):
                array.set(np.ascontiguousarray(values, array.dtype).reshape(array.shape))
            else:
                array[...] = values

    def numpy(self, array: Array) -> Array:
        if not is_array(array):
            return array
        with cupy().cuda.Device(self.number):
            return array.get()

    def fits(self, arrays: Sequence[Array]) -> bool:
        with cupy().cuda.Device(self.number):
            free = int(cupy().cuda.runtime.memGetInfo()[0])
        return bool(sum(array.nbytes for array in arrays) <= SHARE * free)

    def ahead(self, batches: Iterable[Sequence[Array]]) -> Iterator[Sequence[Array]]:
        """The batches as device arrays; while one is used the next is on its way.

        Each goes through pinned memory, so that its copy runs beside the kernels, on a stream of
        its own. Two sets of buffers take turns: what was yielded is good until the next is taken.
        """
        turns: list[_Turn] = []
        pending: _Turn | None = None
        with cupy().cuda.Device(self.number):
            stream = cupy().cuda.Stream(non_blocking=True)
        for number, batch in enumerate(batches):
            with cupy().cuda.Device(self.number):
                if number < 2:
                    turns.append(_Turn(batch))
                turn = turns[number % 2]
                turn.send(batch, stream)
            if pending is not None:
                yield pending.take()
                pending.release()
            pending = turn
        if pending is not None:
            yield pending.take()
            pending.release()


class _Turn:
    """Pinned and device buffers for one batch, and how far their use has come."""

    def __init__(self, batch: Sequence[Array]) -> None:
        self.pinned = [_pinned(array) for array in batch]
        self.buffers = [empty(array.shape, array.dtype) for array in batch]
        self.ready, self.used = cupy().cuda.Event(), cupy().cuda.Event()
        self.rows = 0

    def send(self, batch: Sequence[Array], stream: Any) -> None:
        """Start copying `batch`; no longer than the first one."""
        self.ready.synchronize()  # the copy that reads the pinned memory is over
        stream.wait_event(self.used)  # and so are the kernels that read the device's
        self.rows = len(batch[0])
        for array, pinned, buffer in zip(batch, self.pinned, self.buffers, strict=True):
            part = pinned[: self.rows]
            part[...] = array
            buffer.data.copy_from_host_async(part.ctypes.data, part.nbytes, stream)
        self.ready.record(stream)

    def take(self) -> list[Array]:
        """The device arrays; what this thread launches from now on waits for the copy."""
        cupy().cuda.get_current_stream().wait_event(self.ready)
        return [buffer[: self.rows] for buffer in self.buffers]

    def release(self) -> None:
        """All that uses the arrays has been launched."""
        self.used.record(cupy().cuda.get_current_stream())


def _pinned(like: Array) -> Array:
    memory = cupy().cuda.alloc_pinned_memory(max(like.nbytes, 1))
    return np.frombuffer(memory, like.dtype, like.size).reshape(like.shape)
