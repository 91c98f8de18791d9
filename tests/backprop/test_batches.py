"""Streamed data: the bits of the same data in memory, in a bounded amount of memory."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from backprop_kernels.arrays import Array

import backprop as bp
from backprop import batches
from backprop.batches import Batches, Rows, _ahead, is_streamed, map_file, parts
from backprop.memory import HOST
from backprop.resume import SAMPLE_ROWS, digest
from tests.outside import outside
from tests.watching import Watches

rng = np.random.default_rng(0)
X = rng.standard_normal((1003, 6)).astype(np.float32)
y = rng.standard_normal(1003).astype(np.float32)
ids = rng.integers(0, 4, 1003)


class Dataset:
    """What HDF5 and Zarr have in common: shape, slices of rows, chunks; and a log of the reads."""

    def __init__(self, array: Array, chunks: tuple[int, ...] | None = None) -> None:
        self.array, self.shape, self.chunks = array, array.shape, chunks
        self.reads: list[tuple[int, int]] = []

    def __getitem__(self, rows: slice) -> Array:
        assert isinstance(rows, slice) and rows.step is None
        self.reads.append((rows.start or 0, min(rows.stop, len(self.array))))
        return self.array[rows].copy()


class Direct(Dataset):
    """HDF5's way to read without an array in between."""

    def __init__(self, array: Array, chunks: tuple[int, ...] | None = None) -> None:
        super().__init__(array, chunks)
        self.dtype = array.dtype

    def read_direct(self, target: Array, rows: slice) -> None:
        target[...] = self[rows]


def whole(part: Any, known: bool) -> Array:
    """Rows as they are."""
    return np.asarray(part)


def mapped(folder: Path, array: Array, order: Any = "C") -> np.memmap:
    file = np.memmap(folder / "rows", array.dtype, "w+", shape=array.shape, order=order)
    file[...] = array
    return file


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 10 rows of X, windows of 40: many windows, a short block, batches across both."""
    monkeypatch.setattr(batches, "BLOCK_BYTES", 10 * X.strides[0])
    monkeypatch.setattr(batches, "WINDOW_BLOCKS", 4)


def test_what_is_streamed(tmp_path: Path) -> None:
    assert is_streamed(mapped(tmp_path, X)) and is_streamed(Dataset(X))
    for in_memory in (X, X.tolist(), np.float32(3), 3.0, memoryview(X), "text"):
        assert not is_streamed(in_memory)
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    assert not is_streamed(pandas.DataFrame(X))


def epoch_of(model: bp.Sequential, data: Any, **options: Any) -> tuple[list[float], bytes]:
    history = bp.fit(model, *data, epochs=3, progress=False, **options)
    return history["loss"], model.parameters.tobytes()


@pytest.mark.parametrize("batch_size", [1, pytest.param(7, marks=pytest.mark.long), 10, 1003, 5000])
@pytest.mark.usefixtures("small_windows")
def test_unshuffled_fit_has_the_bits_of_memory(device: str, batch_size: int) -> None:
    """Batches smaller than a block, larger than a window, larger than the data."""
    common: dict[str, Any] = {"batch_size": batch_size, "shuffle": False}
    rows = 203 if batch_size == 1 else 1003
    expected = epoch_of(bp.MLP([6, 5, 1], device=device), (X[:rows], y[:rows]), **common)
    streamed = (Dataset(X[:rows]), y[:rows])
    assert epoch_of(bp.MLP([6, 5, 1], device=device), streamed, **common) == expected


@pytest.mark.usefixtures("small_windows")
def test_shuffled_fit_has_the_bits_of_memory_in_its_order(device: str) -> None:
    weight = rng.random(1003).astype(np.float32)
    model, twin = bp.MLP([6, 5, 4], device=device), bp.MLP([6, 5, 4], device=device)
    streamed = epoch_of(
        model, (Dataset(X), ids), loss="cross_entropy", batch_size=32, sample_weight=weight, seed=3
    )
    step, losses = bp.TrainStep(twin, "cross_entropy", "Adam", 32, seed=3), []
    host = bp.MLP([1, 1], device="reference").backend  # the order is the same on every backend
    source = Batches(host, [Rows(Dataset(X), whole), np.arange(1003)], 32, seed=3)
    for epoch in range(3):
        total = 0.0
        for _, rows in source.epoch(epoch):
            total += len(rows) * step(X[rows], ids[rows], weight[rows])
        losses.append(total / 1003)
    assert streamed == (losses, twin.parameters.tobytes())


class Hdf5(Direct):
    """What h5py says of a dataset in one piece, which lies in a file behind `offset` bytes."""

    mode, driver, external, file = "r", "sec2", None, property(lambda self: self)

    def __init__(self, array: Array, folder: Path, offset: int | None = 64) -> None:
        super().__init__(array)
        self.filename, self.offset = str(folder / "rows.h5"), offset
        Path(self.filename).write_bytes(bytes(64) + array.tobytes())

    @property
    def id(self) -> Any:
        return SimpleNamespace(get_offset=lambda: self.offset)


def test_hdf5_in_one_piece_is_mapped(tmp_path: Path) -> None:
    for dtype in ("f4", "f8", "i2", ">f4"):
        array = (100 * X).astype(dtype)
        found = map_file(Hdf5(array, tmp_path))
        assert isinstance(found, np.memmap) and found.dtype == array.dtype
        assert found.tobytes() == array.tobytes()


def test_other_datasets_are_not_mapped(tmp_path: Path) -> None:
    """Chunks; open for writing; in memory; in several files; another place; gone."""
    strange = {"mode": "r+", "driver": "core", "external": [("part", 0, 8)]}
    sources = [Dataset(X), Hdf5(X, tmp_path, None), Hdf5(X, tmp_path, 60)]
    sources += [Hdf5(X, tmp_path, 10**6), Hdf5(X, tmp_path)]
    sources[-1].filename += "x"
    for name, value in strange.items():
        sources.append(Hdf5(X, tmp_path))
        setattr(sources[-1], name, value)
    for source in sources:
        assert map_file(source) is source


def test_hdf5_itself(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(tmp_path / "rows.h5", "w", userblock_size=512) as file:
        file["piece"] = X
        file.create_dataset("chunks", data=X, chunks=(10, 6))
        assert map_file(file["piece"]) == file["piece"]
    with h5py.File(tmp_path / "rows.h5") as file:
        found = map_file(file["piece"])
        assert isinstance(found, np.memmap) and found.tobytes() == X.tobytes()
        assert map_file(file["chunks"]) == file["chunks"]
        model, twin = bp.MLP([6, 1]), bp.MLP([6, 1])
        assert epoch_of(model, (file["piece"], y)) == epoch_of(twin, (Dataset(X), y))


KINDS = ("map", "hdf5", "map by columns", "map of float64", "read_direct", "chunks")


def source_of(kind: str, folder: Path, array: Array) -> Any:
    if kind == "hdf5":
        return Hdf5(array, folder)
    if kind in ("read_direct", "chunks"):
        return Direct(array) if kind == "read_direct" else Dataset(array, chunks=(16, 6))
    wide = array.astype(np.float64) if kind == "map of float64" else array
    return mapped(folder, wide, "F" if kind == "map by columns" else "C")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("small_windows")
def test_rows_are_the_same_however_they_are_read(kind: str, tmp_path: Path) -> None:
    """In place, straight into a window, or by a copy: step by step or several in one call."""
    source = source_of(kind, tmp_path, X)
    stream = Batches(bp.MLP([1, 1]).backend, [bp.MLP([6, 1]).column(source, "fit"), y], 32)._stream
    assert stream is not None
    assert np.may_share_memory(stream.sources[0], map_file(source)) == (kind == "map")
    assert stream._copies == (kind not in ("map", "hdf5"))
    for callbacks in ([], [Watches()]):
        one, other = (
            epoch_of(bp.MLP([6, 5, 1]), (data, y), batch_size=16, callbacks=callbacks)
            for data in (source, Dataset(X, getattr(source, "chunks", None)))
        )
        assert one == other


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("small_windows")
def test_bad_rows_are_found_however_they_are_read(kind: str, tmp_path: Path) -> None:
    holed = X.copy()
    holed[900, 2] = np.nan
    source = source_of(kind, tmp_path, holed)
    with pytest.raises(bp.DataError, match=r"NaN at row \d, .*rows are counted from row \d+"):
        bp.fit(bp.MLP([6, 1]), source, y, progress=False)
    with pytest.raises(bp.DataError, match=r"NaN at row 100, .*rows are counted from row 800"):
        bp.MLP([6, 1]).predict(source, 200)


@pytest.mark.parametrize("batch_size", [1, 7, 32, 50, 1003])
@pytest.mark.usefixtures("small_windows")
def test_every_epoch_is_every_row_once_in_an_order_of_its_own(batch_size: int) -> None:
    backend = bp.MLP([6, 1], device="reference").backend
    orders = []
    for data in (Dataset(X), Dataset(X, chunks=(16, 6))):
        source = Batches(backend, [Rows(data, whole), np.arange(1003)], batch_size, seed=1)
        for epoch in range(2):
            sizes, order = [], []
            for part, rows in source.epoch(epoch):
                assert np.array_equal(part, X[rows])
                sizes.append(len(rows))
                order += rows.tolist()
            assert sizes == [batch_size] * (1003 // batch_size) + [1003 % batch_size] * (
                1003 % batch_size > 0
            )
            assert sorted(order) == list(range(1003))
            orders.append(order)
            # Rows come from all over the file, not from near where they lie.
            if batch_size < 1003:
                assert np.corrcoef(order, np.arange(1003))[0, 1] ** 2 < 0.05
        again = [int(row) for _, rows in source.epoch(1) for row in rows]
        assert again == orders[-1]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.usefixtures("small_windows")
def test_chunks_are_read_whole() -> None:
    data = Dataset(X, chunks=(16, 6))
    backend = bp.MLP([6, 1], device="reference").backend
    for _ in Batches(backend, [Rows(data, whole)], 32).epoch(0):
        pass
    assert all(
        start % 16 == 0 and (stop % 16 == 0 or stop == 1003) for start, stop in data.reads[1:]
    )


def test_what_fits_in_a_window_is_shuffled_like_an_array(device: str, tmp_path: Path) -> None:
    expected = epoch_of(bp.MLP([6, 5, 1], device=device), (X, y), batch_size=32)
    streamed = (mapped(tmp_path, X), y)
    assert epoch_of(bp.MLP([6, 5, 1], device=device), streamed, batch_size=32) == expected


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["float32", "float64", "int16"])
def test_predict_and_validation_loss_have_the_bits_of_memory(
    device: str, tmp_path: Path, kind: str, order: str
) -> None:
    data = (X * 100).astype(kind)
    model = bp.MLP([6, 5, 4], norm="batch", device=device)
    file = mapped(tmp_path, data, order)
    for source in (file, file[:], Dataset(data)):
        for rows in (None, 100, 1):
            few = slice(0, 1003 if rows != 1 else 20)
            assert np.array_equal(model.predict(source[few], rows), model.predict(data[few], rows))
        assert np.array_equal(model.predict_proba(source), model.predict_proba(data))

    def val_loss(*eval_set: Any) -> list[float]:
        model = bp.MLP([6, 5, 4], device=device)
        options: dict[str, Any] = {"loss": "cross_entropy", "progress": False}
        return bp.fit(model, X[:50], ids[:50], eval_set=eval_set, **options)["val_loss"]

    assert val_loss(file, ids) == val_loss(data, ids)


@pytest.mark.usefixtures("small_windows")
def test_targets_of_several_columns_are_streamed_as_well(device: str) -> None:
    common: dict[str, Any] = {"batch_size": 32, "shuffle": False}
    expected = epoch_of(bp.MLP([6, 5, 6], device=device), (X, X), eval_set=(X, X), **common)
    for data in (Dataset(X), Dataset(X)), (X, Dataset(X)):
        model = bp.MLP([6, 5, 6], device=device)
        assert epoch_of(model, data, eval_set=data, **common) == expected
        assert max(stop - start for start, stop in data[1].reads) <= 8192


def test_small_data() -> None:
    model = bp.MLP([6, 1])
    assert model.predict(Dataset(X[:0])).shape == (0, 1)
    with pytest.raises(bp.DataError, match="expected at least one row"):
        bp.fit(model, Dataset(X[:0]), y[:0])
    assert bp.fit(model, Dataset(X[:1]), y[:1], progress=False).epochs == 1


def test_bad_data_is_named_and_changes_nothing_of_the_step() -> None:
    model = bp.MLP([6, 1])
    before = model.parameters.copy()
    with pytest.raises(bp.ShapeError) as wrong:
        bp.fit(model, Dataset(X[:, :5]), y)
    assert str(wrong.value) == "fit: X: expected shape (batch, in_features=6), got (1003, 5)"
    with pytest.raises(bp.ShapeError, match="one row per row of X"):
        bp.fit(model, Dataset(X), y[:-1])
    with pytest.raises(bp.ShapeError, match="one row per row of X"):
        bp.fit(bp.MLP([6, 6]), Dataset(X), Dataset(X[:-1]))
    with pytest.raises(bp.KindError, match="encode text columns first"):
        bp.fit(model, Dataset(X.astype(str)), y)
    holed = X.copy()
    holed[900, 2] = np.nan
    with pytest.raises(bp.DataError, match=r"NaN at row 900, column 2 \(1 of 6,018\)"):
        bp.fit(model, Dataset(holed), y, progress=False)
    with pytest.raises(bp.DataError, match=r"NaN at row 100, .* \(rows are counted from row 800\)"):
        model.predict(Dataset(holed), 200)
    assert np.array_equal(model.parameters, before)


def test_a_source_that_fails_or_gives_too_few_rows() -> None:
    class Broken(Dataset):
        def __getitem__(self, rows: slice) -> Array:
            if rows.start and rows.start > 500:
                raise OSError("the disk is gone")
            return super().__getitem__(rows)

    class Short(Dataset):
        def __getitem__(self, rows: slice) -> Array:
            return super().__getitem__(rows)[:7]

    with pytest.raises(OSError, match="the disk is gone"):
        bp.MLP([6, 1]).predict(Broken(X), 100)
    with pytest.raises(bp.ShapeError, match=r"source\[0:100\]: expected 100 rows, got 7"):
        bp.MLP([6, 1]).predict(Short(X), 100)


LARGE = """
import sys
import numpy as np
import backprop as bp

class Made:  # rows that nobody stores: what memory holds of them is ours
    shape = (int(sys.argv[1]), 256)
    rows = np.random.default_rng(0).standard_normal((4096, 256)).astype(np.float32)
    def __getitem__(self, rows):
        count = min(rows.stop, self.shape[0]) - (rows.start or 0)
        return np.resize(self.rows[:count], (count, 256))

def peak():  # of this program: a child's ru_maxrss starts from its parent's
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

X, y = Made(), np.zeros(Made.shape[0], np.float32)
model = bp.MLP([256, 8, 1])
bp.fit(model, X, y, eval_set=(X, y), batch_size=1024, progress=False)
model.predict(X)
print(peak() * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded() -> None:
    """400 MB of rows cost no more than 100 MB of them but for y and the outputs."""
    few, many = (int(outside(LARGE, str(rows))) for rows in (100_000, 400_000))
    assert many - few < 20e6, (few, many)


def test_the_next_part_is_begun_when_the_last_is_given_up() -> None:
    """Python's lock stays with a thread as long as it does not wait, so that the reader, where it
    could, would read on before the caller has let go."""
    read: list[weakref.ref[Array]] = []
    held: list[int] = []

    class Made:
        shape = (40, 3)

        def __getitem__(self, rows: slice) -> Array:
            held.append(sum(part() is not None for part in read))
            made = np.ones((rows.stop - (rows.start or 0), 3), np.float32)
            read.append(weakref.ref(made))
            return made

    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)
    try:
        for _ in parts([Rows(Made(), lambda rows, known: rows)], 4):
            pass  # faster than the reader
    finally:
        sys.setswitchinterval(interval)
    assert len(held) == 11 and max(held) == 1


def test_an_abandoned_stream_does_not_wait_for_its_reader() -> None:
    """The garbage collector may be the one to end it, in the middle of anything."""
    reading, go_on = threading.Event(), threading.Event()

    def read(part: int) -> int:
        if part == 1:
            reading.set()
            go_on.wait(30)
        return part

    stream = _ahead(read, range(9))
    assert next(stream) == 0 and reading.wait(30)
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 20
    go_on.set()


def test_data_is_known_by_rows_of_all_its_parts() -> None:
    """In memory or streamed alike; other rows, another order or another type is other data."""
    few = np.zeros((4, 6))
    assert len({digest([each], HOST) for each in (few, few.T, few.view(np.int64))}) == 3
    rows = 5 * SAMPLE_ROWS
    data = np.arange(3.0 * rows).reshape(rows, 3)
    known = digest([data], HOST)
    streamed = Rows(data, lambda part, known: np.ascontiguousarray(part))
    assert digest([streamed], HOST) == known == digest([np.asfortranarray(data)], HOST)
    swapped = np.concatenate([data[: rows // 3], data[rows // 3 :][::-1]])
    others = [data[:-1], data.astype(np.float32), data.reshape(-1, 1), swapped, data + 1e-9]
    assert len({known, *(digest([other], HOST) for other in others)}) == 1 + len(others)
    for row in (0, rows // 2, rows - 1):
        changed = data.copy()
        changed[max(row - 5, 0) : row + 5] = 0
        assert digest([changed], HOST) != known, row
    assert digest([data, data[:, 0]], HOST) != digest([data[:, 0], data], HOST)
    assert digest([data[:1]], HOST) != digest([data[:0]], HOST)


def test_zeros_are_skipped_where_most_of_X_is_zero() -> None:
    one_hot = np.eye(20, dtype=np.float32)[rng.integers(0, 20, 1003)]
    ones = np.ones_like(one_hot)
    for batch, data, expected in ((256, one_hot, True), (64, one_hot, False), (256, ones, False)):
        assert batches.mostly_zeros(data, batch) is expected
        assert batches.mostly_zeros(Rows(Dataset(data), whole), batch) is expected
