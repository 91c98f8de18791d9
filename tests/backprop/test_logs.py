"""Logs of a running fit, read back by other programs' readers and by our own."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import backprop as bp
from backprop.logs import Log

X, y = np.random.default_rng(0).normal(size=(32, 3)), np.ones(32)


def train(log: Log, epochs: int = 3) -> bp.History:
    model = bp.MLP([3, 4, 1], device="reference")
    return bp.fit(model, X, y, epochs=epochs, eval_set=(X, y), callbacks=[log], progress=False)


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.csv"
    history = train(bp.CSVLog(path))
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for name, values in history.items():
        assert [float(row[name]) for row in rows] == values
    assert bp.History.read(path) == history


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    history = train(bp.JSONLog(path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row.pop("epoch") for row in rows] == [1, 2, 3]
    assert {name: [row[name] for row in rows] for name in history} == history
    assert bp.History.read(path) == history


@pytest.mark.parametrize("kind", [bp.CSVLog, bp.JSONLog])
def test_lines_are_there_as_they_happen_and_none_is_lost_or_twice(
    kind: type[Log], tmp_path: Path
) -> None:
    path = tmp_path / ("run.csv" if kind is bp.CSVLog else "run.jsonl")
    log, history = kind(path), bp.History()
    for epoch in range(3):
        history.append(loss=float(epoch))
        if epoch:  # the first epoch was before a resume
            log(epoch, history)
            assert bp.History.read(path) == history
    again = bp.History(loss=[7.0])
    log(0, again)  # the same log in another fit
    assert bp.History.read(path) == again


def records(path: Path) -> Iterator[bytes]:
    """The records of an event file, both checksums checked bit by bit from the definition."""

    def masked(data: bytes) -> int:
        crc = 0xFFFFFFFF
        for byte in data:
            crc ^= byte
            for _ in range(8):
                crc = (crc >> 1) ^ (0x82F63B78 * (crc & 1))
        crc ^= 0xFFFFFFFF
        return (((crc >> 15) | (crc << 17) & 0xFFFFFFFF) + 0xA282EAD8) % 2**32

    data = path.read_bytes()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12]) == (masked(data[:8]),)
        record, end = data[12 : 12 + size], 16 + size
        assert struct.unpack("<I", data[12 + size : end]) == (masked(record),)
        yield record
        data = data[end:]


def test_event_files_are_whole_records(tmp_path: Path) -> None:
    train(bp.TensorBoard(tmp_path / "runs" / "a"))
    (path,) = (tmp_path / "runs" / "a").iterdir()
    first, *rest = records(path)
    assert b"brain.Event:2" in first
    assert len(rest) == 3 and all(b"val_loss" in record for record in rest)


@pytest.mark.filterwarnings("ignore")  # of TensorBoard's own imports
def test_tensorboard_reads_them(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    history = train(bp.TensorBoard(tmp_path), epochs=200)  # steps of more than one byte
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(history)
    for name, values in history.items():
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == list(range(1, 201))
        np.testing.assert_array_equal([s.value for s in scalars], np.float32(values))
