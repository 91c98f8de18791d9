"""Callbacks that write every epoch to a file while a fit runs: CSV, JSON lines, TensorBoard.

Each is flushed at the end of every epoch, so that others can follow it. The first call of a fit
writes all epochs so far: a run that was resumed leaves the same log as one that was not.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from backprop.history import History


class Log:
    """What the logs share: which epochs are new, and when a file begins."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._history: History | None = None  # of the fit that is being written
        self._written = 0  # epochs

    def __call__(self, epoch: int, history: History) -> None:
        """Write the epochs since the last call; called by `fit`."""
        if history is not self._history:
            self._history, self._written = history, 0
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.begin(list(history))
        for row in range(self._written, history.epochs):
            self.write(row + 1, {name: values[row] for name, values in history.items()})
        self._written = history.epochs

    def begin(self, names: list[str]) -> None:
        """Start the file."""
        self.path.write_bytes(b"")

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        """Add one epoch (from 1)."""
        raise NotImplementedError


class CSVLog(Log):
    """`callbacks=[bp.CSVLog("run.csv")]`: a header, then a line an epoch."""

    def begin(self, names: list[str]) -> None:
        """Start the file with its header."""
        super().begin(names)
        self._names = ["epoch", *names]
        self._append(self._names)

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        """Add a line."""
        row = {"epoch": epoch, **values}
        self._append([row.get(name, "") for name in self._names])

    def _append(self, cells: Sequence[object]) -> None:
        import csv

        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(cells)


class JSONLog(Log):
    """`callbacks=[bp.JSONLog("run.jsonl")]`: a JSON object a line."""

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        """Add a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"epoch": epoch, **values}) + "\n")


class TensorBoard(Log):
    """`callbacks=[bp.TensorBoard("runs/first")]`: a folder for `tensorboard --logdir runs`.

    Every fit adds an event file, whose curves are named after the history's keys.
    """

    def begin(self, names: list[str]) -> None:
        """Start an event file of its own, as TensorBoard's writers do."""
        self.path.mkdir(exist_ok=True)
        now = time.time()
        name = f"events.out.tfevents.{now:.6f}.{os.uname().nodename}.{os.getpid()}"
        self._file = self.path / name
        self._add(_double(1, now) + _bytes(3, b"brain.Event:2"))

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        """Add one event with a scalar for each key."""
        summary = b"".join(
            _bytes(1, _bytes(1, name.encode()) + _float(2, value)) for name, value in values.items()
        )
        self._add(_double(1, time.time()) + _integer(2, epoch) + _bytes(5, summary))

    def _add(self, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        with self._file.open("ab") as file:
            file.write(length + _checksum(length) + event + _checksum(event))


# An event file is a list of records: length, checksum, event, checksum. An event is a protobuf
# message (tensorflow/core/util/event.proto). These are its four kinds of fields, so that writing a
# few numbers an epoch needs neither protobuf nor TensorFlow.


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _checksum(data: bytes) -> bytes:
    """CRC-32C, rotated and shifted as the record format wants it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


CRC_TABLE = _crc_table()
