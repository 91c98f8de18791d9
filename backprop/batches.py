"""Where batches come from: arrays in memory, or files that are read while training runs.

A memory map, an HDF5 or Zarr dataset, anything else with `shape` and slicing, is *streamed*: a
thread reads and checks the next rows while the engine works on these. Memory then holds a few
windows of rows, whatever the size of the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from backprop_kernels import host_memory
from backprop_kernels.arrays import Array
from backprop_kernels.errors import BackpropError, ShapeError

from backprop.memory import HOST, Memory, on_gpu

if TYPE_CHECKING:
    from backprop.step import TrainStep

BLOCK_BYTES = 2**20  # rows read together: long enough for a disk's full speed
WINDOW_BLOCKS = 16  # blocks whose rows are shuffled together; three windows are held in memory
SAMPLE = 1024  # rows of X that are looked at for zeros
# Where zeros are skipped: batches of so many rows at least, this share of X not 0 at most.
# Elsewhere the dense products were faster.
SPARSE_ROWS, SPARSE = 128, 0.15
Item = TypeVar("Item")
Result = TypeVar("Result")


def is_streamed(source: Any) -> bool:
    """Whether `source` is read a slice at a time: a memory map, or a dataset that is no array."""
    if isinstance(source, np.ndarray):
        return isinstance(source, np.memmap)
    # Scalars, tensors, data frames, buffers.
    in_memory = ("__array_interface__", "__dlpack__", "to_numpy", "tobytes")
    sliced = hasattr(source, "shape") and hasattr(source, "__getitem__")
    return sliced and not any(hasattr(source, name) for name in in_memory)


class Rows:
    """A matrix outside memory: `read` gives rows of it as the kernels take them.

    `checked(slice, known)` turns a slice of `source` into such rows, or refuses it; `known` says
    that these rows were found good before, so that their numbers need not be looked at again.
    """

    def __init__(self, source: Any, checked: Callable[[Any, bool], Array]) -> None:
        self.source = source
        self.checked = checked
        # Wrong columns, a wrong kind: found before anything is read.
        sample = checked(source[:1], False)
        self.shape: tuple[int, ...] = (int(source.shape[0]), *sample.shape[1:])
        self.dtype = sample.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int, known: bool = False) -> Array:
        """Rows `start` … `stop` − 1, in place where they lie right, else copied."""
        try:
            rows = self.checked(self.source[start:stop], known)
        except BackpropError as problem:
            raise type(problem)(f"{problem} (rows are counted from row {start})") from None
        if len(rows) != stop - start:
            raise ShapeError(
                f"batches: source[{start}:{stop}]: expected {stop - start} rows, got {len(rows)}"
            )
        return rows


def parts(columns: Sequence[Array | Rows], rows: int) -> Iterator[list[Array]]:
    """`columns` in order, up to `rows` rows at a time; streamed ones are read one part ahead."""
    total = len(columns[0])

    def read(start: int) -> list[Array]:
        return [read_rows(column, start, min(start + rows, total)) for column in columns]

    streamed = any(isinstance(column, Rows) for column in columns)
    return (_ahead if streamed else map)(read, range(0, total, rows))


def read_rows(column: Array | Rows, start: int, stop: int, known: bool = False) -> Array:
    """Rows `start` … `stop` − 1 of a column of either kind."""
    return column.read(start, stop, known) if isinstance(column, Rows) else column[start:stop]


def mostly_zeros(X: Array | Rows, batch: int) -> bool:
    """Whether zeros are worth skipping: most columns are one-hot, or counts of rare things.

    The first rows stand for all: the same ones in memory, in a file and in a fit that is resumed.
    """
    if on_gpu(X) or batch < SPARSE_ROWS:
        return False
    sample = read_rows(X, 0, min(SAMPLE, len(X)))
    return bool(np.count_nonzero(sample) <= SPARSE * sample.size)


def _ahead(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`work(item)` of each item, the next one done by a thread while the caller uses this one."""
    from concurrent.futures import Future, ThreadPoolExecutor

    pending: Future[Result] | None = None
    reader = ThreadPoolExecutor(1, "backprop-reader")
    try:
        for item in items:
            following = reader.submit(work, item)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()
    finally:
        # Not waited for. Where an error left this unfinished it is the garbage collector that comes
        # here, at any moment, and to join a thread while another one is being started deadlocks.
        reader.shutdown(wait=False, cancel_futures=True)


class Batches:
    """The batches of every epoch, in an order that depends on `seed` and the epoch alone.

    `columns` are X, target and (where given) weights, all checked: arrays, or `Rows`.
    """

    def __init__(
        self,
        backend: ModuleType,
        columns: Sequence[Array | Rows],
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        memory: Memory = HOST,
    ) -> None:
        self.backend = backend
        self.memory = memory
        self.columns = columns
        self.rows = len(columns[0])
        self.size = min(batch_size, self.rows)
        self.shuffle = shuffle
        self.seed = seed
        self._gathers: dict[tuple[int, int], Callable[..., None]] = {}
        self._views: dict[int, list[Array]] = {}
        self._index: Array | None = None  # of the next batches, a row each, where steps gather them
        streamed = [column for column in columns if isinstance(column, Rows)]
        self._stream = _Stream(self, streamed) if streamed else None
        # Data that lies on the device stays there, and what belongs to it goes there.
        self.resident = not streamed and (
            any(map(on_gpu, columns)) or memory.fits(cast(Sequence[Array], columns))
        )
        # Arrays like those of a full batch.
        self.full = [host_memory.zeros((self.size, *c.shape[1:]), c.dtype) for c in columns]
        if self.resident:
            self.columns = [memory.place(column) for column in columns]
            self.full = [memory.place(buffer) for buffer in self.full]

    def gather_in(self, step: TrainStep) -> None:
        """Let `step` begin with gathering its batch, where it can, and not be called twice for it.

        What Python touches between two calls a step has driven out of the caches. The arrays of a
        batch are then filled by the step.
        """
        if not self.shuffle or self._stream is not None or self.memory is not HOST:
            return
        index = self._index = np.zeros((step.TURNS, self.size), np.int64)
        columns = cast(list[Array], self.columns)
        listed = self._entries(columns[0]) if step.gradients.sparse_input else None
        if listed is not None:  # a row of them is a fifth of a row of X to fetch
            columns = [listed, *columns[1:]]
            self.full[0] = host_memory.zeros((self.size, *listed.shape[1:]), listed.dtype)

        def gather(rows: int) -> None:
            self._gather_rows(columns, index[0, :rows], self._buffers(rows))

        step.before, step.before_reads = gather, (index,)

    def _entries(self, X: Array) -> Array | None:
        """What a backend that skips zeros makes of X, where it can and that is smaller than X."""
        entries = getattr(self.backend.sparse_input, "entries", None)
        return None if entries is None else entries(X)

    def epoch(self, epoch: int) -> Iterator[Sequence[Array]]:
        """The batches of epoch `epoch` (from 0); each is good until the next. The last is short."""
        batches = self._epoch(epoch)
        return batches if self.resident else self.memory.ahead(batches)

    def _epoch(self, epoch: int) -> Iterator[Sequence[Array]]:
        if self._stream is not None:
            windows = self._stream.windows(self._rng(epoch))
        else:
            windows = iter([(cast(list[Array], self.columns), self._order(epoch))])
        for window, order in windows:
            for start in range(0, len(order), self.size):
                index = order[start : start + self.size]
                if self.shuffle:
                    yield self._gathered(window, index)
                else:
                    yield [column[index[0] : index[-1] + 1] for column in window]

    def several(
        self, epoch: int, first: int = 0, together: int = 1
    ) -> Iterator[tuple[int, Sequence[Array]]]:
        """(batches, arrays) from batch `first` of epoch `epoch` on.

        Up to `together` full batches are gathered by one call of a step; see `gather_in`.
        """
        if self._index is None or together == 1:
            for batch in islice(self.epoch(epoch), first, None):
                yield 1, batch
            return
        order = self._order(epoch)[first * self.size :]
        full = len(order) // self.size
        batches = order[: full * self.size].reshape(full, self.size)
        for start in range(0, full, together):
            index = batches[start : start + together]
            self._index[: len(index)] = index
            yield len(index), self._buffers(self.size)
        if rest := len(order) % self.size:
            yield 1, self._gathered(cast(list[Array], self.columns), order[-rest:])

    def _order(self, epoch: int) -> Array:
        if not self.shuffle:
            return np.arange(self.rows)
        return self._rng(epoch).permutation(self.rows)

    def _rng(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, epoch))

    def _buffers(self, rows: int) -> list[Array]:
        """Where a batch lies: the same arrays every time, so that a program knows them."""
        if rows not in self._views:
            self._views[rows] = [buffer[:rows] for buffer in self.full]
        return self._views[rows]

    def _gathered(self, columns: Sequence[Array], index: Array) -> list[Array]:
        """The rows `index` of `columns`, in buffers that every batch shares."""
        batch = self._buffers(len(index))
        if self._index is not None:
            self._index[0, : len(index)] = index
            return batch
        key = len(index), id(columns)
        if key not in self._gathers:
            self._gathers[key] = self._gather(columns, index, batch)
        self._gathers[key](index)
        return batch

    def _gather(
        self, columns: Sequence[Array], index: Array, batch: list[Array]
    ) -> Callable[..., None]:
        def by_kernel(index: Array) -> None:
            self._gather_rows(columns, index, batch)

        def here(index: Array) -> None:  # data that the device has no room for
            for column, rows in zip(columns, batch, strict=True):
                np.take(column, index, axis=0, out=rows, mode="clip")

        if not (self.resident or self.memory is HOST):
            return here
        program: Callable[..., None] = self.backend.capture(by_kernel, index)
        return program

    def _gather_rows(self, columns: Sequence[Array], index: Array, batch: Sequence[Array]) -> None:
        """The operators, to be captured."""
        for column, rows in zip(columns, batch, strict=True):
            if column.dtype.names is not None:  # entries: a word or two each
                column, rows = column.view(np.int64), rows.view(np.int64)
            self.backend.gather_rows(column, index, out=rows)


class _Stream:
    """Windows of rows, read by a thread while the batches of the last one are used.

    A window is blocks from anywhere in the file, its rows shuffled together. What fits in a single
    window is thus shuffled like an array.
    """

    def __init__(self, batches: Batches, streamed: Sequence[Rows]) -> None:
        self.batches = batches
        row_bytes = sum(c.dtype.itemsize * math.prod(c.shape[1:]) for c in streamed)
        self.block = max(1, BLOCK_BYTES // max(row_bytes, 1))
        chunks = getattr(streamed[0].source, "chunks", None)  # HDF5's and Zarr's: read them whole
        if isinstance(chunks, tuple) and isinstance(chunks[0], int):
            self.block = -(-self.block // chunks[0]) * chunks[0]
        self._windows: list[list[Array]] = []  # two: one to read into, one in use
        self._known = False  # whether every row has been checked

    def order(self, rng: np.random.Generator) -> Iterator[tuple[list[tuple[int, int]], Array]]:
        """(blocks, order) of each window: (start, stop) of what is read, then how rows are put."""
        rows, shuffle = self.batches.rows, self.batches.shuffle
        starts = np.arange(0, rows, self.block)
        if shuffle and len(starts) > WINDOW_BLOCKS:
            rng.shuffle(starts)
        for first in range(0, len(starts), WINDOW_BLOCKS):
            blocks = [
                (int(start), min(int(start) + self.block, rows))
                for start in starts[first : first + WINDOW_BLOCKS]
            ]
            count = sum(stop - start for start, stop in blocks)
            yield blocks, rng.permutation(count) if shuffle else np.arange(count)

    def windows(self, rng: np.random.Generator) -> Iterator[tuple[list[Array], Array]]:
        """(columns, order) of each window. In all but the last, `order` is whole batches."""
        batches = self.batches
        if not self._windows:
            rows = min(self.block * WINDOW_BLOCKS, batches.rows) + batches.size - 1
            shapes = [((rows, *c.shape[1:]), c.dtype) for c in batches.columns]
            self._windows = [[np.empty(*shape) for shape in shapes] for _ in range(2)]
        left = np.arange(0)  # rows of the window before, too few for a batch
        done = 0

        def fill(window: tuple[list[tuple[int, int]], Array]) -> tuple[list[Array], Array]:
            nonlocal left, done
            blocks, order = window
            before, into = self._windows
            self._windows.reverse()
            for column, source, target in zip(batches.columns, before, into, strict=True):
                target[: len(left)] = source[left]
                end = len(left)
                for start, stop in blocks:
                    target[end : end + stop - start] = read_rows(column, start, stop, self._known)
                    end += stop - start
            order = np.concatenate([np.arange(len(left)), len(left) + order])
            done += end - len(left)
            whole = end if done == batches.rows else end // batches.size * batches.size
            self._known = self._known or done == batches.rows
            left = order[whole:]
            return into, order[:whole]

        return _ahead(fill, self.order(rng))
