"""The memory of one GPU: arrays there, copies to and from it, batches sent ahead of their use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from backprop_kernels.arrays import Array
from backprop_kernels.cuda.launch import cupy, empty, expect_aligned, is_array, no_room
from backprop_kernels.errors import KindError

if TYPE_CHECKING:
    from backprop_kernels.cuda.stepping import Stepping

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
        # Of CuPy's own arrays, which `empty` does not make.
        if isinstance(problem[1], cupy().cuda.memory.OutOfMemoryError):
            raise no_room(str(problem[1])) from problem[1]

    def taken(self, where: str, argument: str, value: Any) -> Array:
        kind = f"{type(value).__module__}.{type(value).__name__}"
        if not is_array(value):
            raise KindError(
                f"{where}: {argument}: expected a NumPy or CuPy array, got {kind}; convert with "
                "cupy.asarray(x), which copies nothing"
            )
        if value.device.id != self.number:
            raise KindError(
                f"{where}: {argument}: expected an array on device {self.number}, where the model "
                f"is, got one on device {value.device.id}; copy it there"
            )
        expect_aligned(where, argument, value)
        return value

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

    def rows(self, array: Array, index: Array) -> Array:
        if not is_array(array):
            return array[index]
        from backprop_kernels.cuda.gather_rows import gather_rows

        with cupy().cuda.Device(self.number):
            return gather_rows(array, self.place(index))

    def fits(self, arrays: Sequence[Array]) -> bool:
        with cupy().cuda.Device(self.number):
            free = int(cupy().cuda.runtime.memGetInfo()[0])
        return bool(sum(array.nbytes for array in arrays) <= SHARE * free)

    def ahead(self, batches: Iterable[Sequence[Array]]) -> Iterator[Sequence[Array]]:
        """The batches as device arrays; while one is used the next is on its way.

        What was yielded is good until the next is taken.
        """
        feed: Feed | None = None
        pending: Turn | None = None
        for batch in batches:
            feed = feed or self.feed(len(batch[0]))
            turn = feed.send(batch)
            if pending is not None:
                yield pending.take()
                pending.release()
            pending = turn
        if pending is not None:
            yield pending.take()
            pending.release()

    def feed(self, rows: int) -> Feed:
        """A way for NumPy batches of up to `rows` rows to the device."""
        with cupy().cuda.Device(self.number):
            return Feed(self.number, rows)

    def autotuned(self) -> AbstractContextManager[None]:
        from backprop_kernels.cuda.tuning import autotuned

        return autotuned()

    def stepping(self, *given: Any) -> Stepping:
        """What a captured training step keeps here: `Stepping` takes the same arguments."""
        from backprop_kernels.cuda.stepping import Stepping

        with cupy().cuda.Device(self.number):
            return Stepping(*given)


class Feed:
    """Batches through pinned memory: their copies run beside the kernels, on a stream of their own.

    Two sets of buffers take turns: one is filled while kernels still read the other.
    """

    def __init__(self, number: int, rows: int) -> None:
        self.number, self.rows = number, rows
        self._turns: list[Turn] = []
        self._sent = 0
        self._stream = cupy().cuda.Stream(non_blocking=True)

    def expect(self, batch: Sequence[Array]) -> None:
        """Make buffers for batches of this kind, where it is another than before."""
        kinds = [(array.shape[1:], array.dtype) for array in batch]
        if not self._turns or self._turns[0].kinds != kinds:
            device = cupy().cuda.Device(self.number)
            device.synchronize()  # the old buffers may be in use
            with device:
                self._turns = [Turn(batch, self.rows) for _ in range(2)]

    def send(self, batch: Sequence[Array]) -> Turn:
        """Start copying `batch`, whose arrays may change once this returns."""
        self.expect(batch)
        with cupy().cuda.Device(self.number):
            turn = self._turns[self._sent % 2]
            self._sent += 1
            turn.send(batch, self._stream)
        return turn


class Turn:
    """Pinned and device buffers for one batch, and how far their use has come."""

    def __init__(self, batch: Sequence[Array], rows: int) -> None:
        self.kinds = [(array.shape[1:], array.dtype) for array in batch]
        self.pinned = [pinned((rows, *shape), dtype) for shape, dtype in self.kinds]
        self.buffers = [empty((rows, *shape), dtype) for shape, dtype in self.kinds]
        self.ready, self.used = cupy().cuda.Event(), cupy().cuda.Event()
        self.rows = 0

    def send(self, batch: Sequence[Array], stream: Any) -> None:
        self.ready.synchronize()  # the copy that reads the pinned memory is over
        stream.wait_event(self.used)  # and so are the kernels that read the device's
        self.rows = len(batch[0])
        for array, here, there in zip(batch, self.pinned, self.buffers, strict=True):
            part = here[: self.rows]
            part[...] = array
            there.data.copy_from_host_async(part.ctypes.data, part.nbytes, stream)
        self.ready.record(stream)

    def take(self) -> list[Array]:
        """The device arrays; what this thread launches from now on waits for the copy."""
        cupy().cuda.get_current_stream().wait_event(self.ready)
        return [buffer[: self.rows] for buffer in self.buffers]

    def release(self) -> None:
        """All that uses the arrays has been launched."""
        self.used.record(cupy().cuda.get_current_stream())


def pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Host memory that the device copies to and from by itself."""
    count = prod(shape)
    memory = cupy().cuda.alloc_pinned_memory(max(count * dtype.itemsize, 1))
    return np.frombuffer(memory, dtype, count).reshape(shape)
