"""Where batches come from: arrays in memory, or files that are read while training runs.

A memory map, an HDF5 or Zarr dataset, anything else with `shape` and slicing, is *streamed*: a
thread reads and checks the next rows while the engine works on these. Memory then holds a few
windows of rows, whatever the size of the file. Of a memory map that lies as the kernels take it
nothing is copied: the thread has its pages fetched, and they are checked between steps. An HDF5
dataset that lies in its file in one piece is mapped.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

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
Blocks: TypeAlias = list[tuple[int, int]]  # rows from, to
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


def map_file(dataset: Any) -> Any:
    """A memory map of the numbers of an HDF5 dataset where they lie in its file as in an array.

    Anything else is given back. Nobody may be writing: what HDF5 has in its buffers is not there.
    """
    try:
        file = dataset.file
        if file.mode != "r" or file.driver not in ("sec2", "stdio") or dataset.external:
            return dataset
        offset = dataset.id.get_offset()  # None of chunks, and of what is spread over files
        if offset is None:
            return dataset
        found = np.memmap(file.filename, dataset.dtype, "r", offset, dataset.shape)
        ends = (slice(0, 1), slice(len(found) - 1, len(found)))
        same = all(found[end].tobytes() == dataset[end].tobytes() for end in ends)
    except (AttributeError, OSError, TypeError, ValueError):
        return dataset
    return found if same else dataset


class Rows:
    """A matrix outside memory: `read` gives rows of it as the kernels take them.

    `checked(slice, known)` turns a slice of `source` into such rows, or refuses it; `known` says
    that these rows were found good before, so that their numbers need not be looked at again.
    """

    def __init__(self, source: Any, checked: Callable[[Any, bool], Array]) -> None:
        self.source = source = map_file(source)
        self.checked = checked
        # Wrong columns, a wrong kind: found before anything is read.
        sample = checked(source[:1], False)
        self.shape: tuple[int, ...] = (int(source.shape[0]), *sample.shape[1:])
        self.dtype = sample.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def in_place(self) -> Array | None:
        """All rows where they lie, not yet checked, if a memory map has them as kernels do."""
        if not isinstance(self.source, np.ndarray):
            return None
        two = self.checked(self.source[:2], True)  # of all a copy might be made
        return self.checked(self.source[:], True) if np.may_share_memory(two, self.source) else None

    def read(self, start: int, stop: int, known: bool = False) -> Array:
        """Rows `start` … `stop` − 1, in place where they lie right, else copied."""
        return self._good(self.source[start:stop], start, stop, known)

    def read_into(self, target: Array, start: int, known: bool) -> None:
        """Copy as many rows as `target` has from `start` on."""
        stop = start + len(target)
        direct = getattr(self.source, "read_direct", None)  # HDF5's, without an array in between
        kind = tuple(self.source.shape[1:]), getattr(self.source, "dtype", None)
        if direct is not None and kind == (target.shape[1:], target.dtype):
            direct(target, np.s_[start:stop])
            self._good(target, start, stop, known)
        else:
            target[...] = self.read(start, stop, known)

    def _good(self, rows: Any, start: int, stop: int, known: bool) -> Array:
        try:
            checked = self.checked(rows, known)
        except BackpropError as problem:
            raise type(problem)(f"{problem} (rows are counted from row {start})") from None
        if len(checked) != stop - start:
            raise ShapeError(
                f"batches: source[{start}:{stop}]: expected {stop - start} rows, got {len(checked)}"
            )
        return checked


def parts(columns: Sequence[Array | Rows], rows: int) -> Iterator[list[Array]]:
    """`columns` in order, up to `rows` rows at a time; streamed ones are read one part ahead."""
    total = len(columns[0])
    there = [column.in_place() if isinstance(column, Rows) else column for column in columns]

    def read(start: int) -> list[Array | None]:
        stop = min(start + rows, total)
        found: list[Array | None] = []
        for column, array in zip(columns, there, strict=True):
            if array is not None and isinstance(column, Rows):
                fetch(array[start:stop])  # checked once it is needed, when that brings it to caches
                found.append(None)
            else:
                found.append(read_rows(column, start, stop))
        return found

    starts = range(0, total, rows)
    streamed = any(isinstance(column, Rows) for column in columns)
    for start, part in zip(starts, (_ahead if streamed else map)(read, starts), strict=True):
        stop = min(start + rows, total)
        yield [
            read_rows(column, start, stop) if found is None else found
            for column, found in zip(columns, part, strict=True)
        ]


def fetch(rows: Array) -> None:
    """Have what a memory map maps in memory: a byte of each page is read."""
    rows.reshape(-1).view(np.uint8)[:: mmap.PAGESIZE].sum()


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
    from concurrent.futures import ThreadPoolExecutor

    waiting = iter(items)
    reader = ThreadPoolExecutor(1, "backprop-reader")
    try:
        begun = [reader.submit(work, item) for item in islice(waiting, 1)]
        while begun:
            # Not before this one is there: the caller may still have the last, and no more than
            # two should be in memory.
            result = begun.pop().result()
            begun += [reader.submit(work, item) for item in islice(waiting, 1)]
            yield result
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
        self._gathers: dict[int, Callable[..., None]] = {}
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
        if not self.shuffle or self.memory is not HOST:
            return
        index = self._index = np.zeros((step.TURNS, self.size), np.int64)
        columns = self._sources
        listed = None
        if step.gradients.sparse_input and self._stream is None:
            listed = self._entries(columns[0])
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
        for order in self._orders(epoch):
            full, rest = divmod(len(order), self.size)
            skipped = min(first, full)
            first -= skipped
            batches = order[skipped * self.size : full * self.size].reshape(-1, self.size)
            for start in range(0, len(batches), together):
                index = batches[start : start + together]
                self._index[: len(index)] = index
                yield len(index), self._buffers(self.size)
            if rest and not first:
                yield 1, self._gathered(order[-rest:])

    def _epoch(self, epoch: int) -> Iterator[Sequence[Array]]:
        for order in self._orders(epoch):
            for start in range(0, len(order), self.size):
                index = order[start : start + self.size]
                if self.shuffle:
                    yield self._gathered(index)
                else:
                    yield [column[index[0] : index[-1] + 1] for column in self._sources]

    def _orders(self, epoch: int) -> Iterator[Array]:
        """Where the rows of the epoch lie in `_sources`; in all but the last, whole batches."""
        rng = np.random.default_rng((self.seed, epoch))
        if self._stream is not None:
            return self._stream.windows(rng)
        return iter([rng.permutation(self.rows) if self.shuffle else np.arange(self.rows)])

    @property
    def _sources(self) -> list[Array]:
        """What batches are rows of: the columns, or the windows of a stream."""
        return cast(list[Array], self.columns) if self._stream is None else self._stream.sources

    def _buffers(self, rows: int) -> list[Array]:
        """Where a batch lies: the same arrays every time, so that a program knows them."""
        if rows not in self._views:
            self._views[rows] = [buffer[:rows] for buffer in self.full]
        return self._views[rows]

    def _gathered(self, index: Array) -> list[Array]:
        """The rows `index` of the sources, in buffers that every batch shares."""
        batch = self._buffers(len(index))
        if self._index is not None:
            self._index[0, : len(index)] = index
            return batch
        if len(index) not in self._gathers:
            self._gathers[len(index)] = self._gather(index, batch)
        self._gathers[len(index)](index)
        return batch

    def _gather(self, index: Array, batch: list[Array]) -> Callable[..., None]:
        def by_kernel(index: Array) -> None:
            self._gather_rows(self._sources, index, batch)

        def here(index: Array) -> None:  # data that the device has no room for
            for column, rows in zip(self._sources, batch, strict=True):
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
    window is thus shuffled like an array. `sources` are the columns where they lie, if all do as
    kernels take them, and reading a window then means to have it fetched; else two windows of each,
    one to read into and one in use.
    """

    def __init__(self, batches: Batches, streamed: Sequence[Rows]) -> None:
        self.batches = batches
        row_bytes = sum(c.dtype.itemsize * math.prod(c.shape[1:]) for c in streamed)
        self.block = max(1, BLOCK_BYTES // max(row_bytes, 1))
        chunks = getattr(streamed[0].source, "chunks", None)  # HDF5's and Zarr's: read them whole
        if isinstance(chunks, tuple) and isinstance(chunks[0], int):
            self.block = -(-self.block // chunks[0]) * chunks[0]
        self._known = False  # whether every row has been checked
        columns = batches.columns
        there = [c.in_place() if isinstance(c, Rows) else c for c in columns]
        self._copies = any(column is None for column in there)
        self._window = min(self.block * WINDOW_BLOCKS, batches.rows) + batches.size - 1  # rows
        self._first = 0  # of the window to read into
        self.sources: list[Array] = (
            [np.empty((2 * self._window, *c.shape[1:]), c.dtype) for c in columns]
            if self._copies
            else cast(list[Array], there)
        )

    def order(self, rng: np.random.Generator) -> Iterator[tuple[Blocks, Array]]:
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

    def windows(self, rng: np.random.Generator) -> Iterator[Array]:
        """Where the rows of each window lie in `sources`. In all but the last, whole batches."""
        batches = self.batches
        left = np.arange(0)  # rows of the window before, too few for a batch
        done = 0

        def read(window: tuple[Blocks, Array]) -> tuple[Array, Blocks]:
            nonlocal left, done
            blocks, order = window
            place = self._copied if self._copies else self._fetched
            left, rows = place(left, blocks)
            order = np.concatenate([left, rows[order]])
            done += len(rows)
            whole = (
                len(order) if done == batches.rows else len(order) // batches.size * batches.size
            )
            left = order[whole:]
            return order[:whole], blocks

        for order, blocks in _ahead(read, self.order(rng)):
            if not (self._copies or self._known):  # here: a third busy thread would be in the way
                for column in batches.columns:
                    for start, stop in blocks:
                        read_rows(column, start, stop)
            yield order
        self._known = True

    def _fetched(self, left: Array, blocks: Blocks) -> tuple[Array, Array]:
        """Have the blocks in memory; where `left` and their rows lie."""
        for start, stop in blocks:
            for column, source in zip(self.batches.columns, self.sources, strict=True):
                if isinstance(column, Rows):
                    fetch(source[start:stop])
        return left, np.concatenate([np.arange(start, stop) for start, stop in blocks])

    def _copied(self, left: Array, blocks: Blocks) -> tuple[Array, Array]:
        """Copy the rows `left` and the blocks into a window; where both lie then."""
        first, self._first = self._first, self._window - self._first
        end = first + len(left)
        for column, target in zip(self.batches.columns, self.sources, strict=True):
            target[first:end] = target[left]
            at = end
            for start, stop in blocks:
                into = target[at : at + stop - start]
                if isinstance(column, Rows):
                    column.read_into(into, start, self._known)
                else:
                    into[...] = column[start:stop]
                at += stop - start
        return np.arange(first, end), np.arange(end, at)
