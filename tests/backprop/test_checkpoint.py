from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from backprop_kernels.errors import (
    CheckpointCorruptError,
    CheckpointFormatError,
    KindError,
    OptionError,
)
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from backprop.checkpoint import read_tensors, write_tensors
from backprop.tensor_header import NUMPY_DTYPES

SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (3, 0, 2), (1,), (7,), (3, 5))


def some_tensors() -> dict[str, NDArray]:
    """Every dtype in every shape, of random bytes: NaNs, infinities and signed zeros included."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, code in NUMPY_DTYPES.items():
        dtype = np.dtype(code)
        for number, shape in enumerate(SHAPES):
            raw = rng.bytes(int(np.prod(shape)) * dtype.itemsize)
            if name == "BOOL":
                raw = bytes(byte & 1 for byte in raw)
            tensors[f"{name}.{number}"] = np.frombuffer(raw, dtype).reshape(shape)
    return tensors


def assert_same(found: dict[str, NDArray], expected: dict[str, NDArray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def small_file(path: Path) -> bytes:
    """A file of every kind of byte: length, two digests, metadata, two tensors and padding."""
    tensors = {"b": np.array([True, False]), "w.0": np.array([[1.5, -2.0]], np.float32)}
    write_tensors(path, tensors, {"format": "pt", "config": '{"n": [1, 2], "s": "a\\"b\\\\é"}'})
    return path.read_bytes()


def test_round_trip_keeps_bits_order_and_metadata(tmp_path: Path) -> None:
    tensors, metadata = some_tensors(), {"format": "pt", "text": 'é€😀"\\\n\0', "": ""}
    write_tensors(tmp_path / "m", tensors, metadata)
    found, found_metadata = read_tensors(tmp_path / "m", require_checksums=True)
    assert list(found) == list(tensors)
    assert_same(found, tensors)
    assert list(found_metadata.items()) == list(metadata.items())
    for array in found.values():
        assert array.flags.writeable and array.flags.owndata and array.flags.c_contiguous


def test_layouts_and_byte_orders_are_stored_as_little_endian_c(tmp_path: Path) -> None:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    variants = {
        "transposed": base.T,
        "strided": base[::2, ::-3],
        "big_endian": base.astype(">f4"),
        "broadcast": np.broadcast_to(np.float64(2.5), (3, 2)),
    }
    write_tensors(tmp_path / "m", variants, {})
    found, _ = read_tensors(tmp_path / "m")
    little = {name: np.array(a, a.dtype.newbyteorder("<")) for name, a in variants.items()}
    assert_same(found, {name: np.ascontiguousarray(array) for name, array in little.items()})


def test_bytes_on_disk(tmp_path: Path) -> None:
    """The format is a promise: header padded to 8 bytes, wide items first, digests of SHA-256."""

    def digest(content: bytes) -> bytes:
        return hashlib.sha256(content).hexdigest()[:32].encode()

    w, b = b"\x00\x00\xc0\x3f\x00\x00\x00\xc0", b"\x01\x00"
    before = b'{"__metadata__":{"sha256.header":"'
    after = (
        b'","sha256.tensors":"' + digest(b) + b" " + digest(w) + b'","format":"pt",'
        rb'"config":"{\"n\": [1, 2], \"s\": \"a\\\"b\\\\' + "é".encode() + rb'\"}"},'
        b'"b":{"dtype":"BOOL","shape":[2],"data_offsets":[8,10]},'
        b'"w.0":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}    '
    )
    header = before + digest(before + after) + after
    assert small_file(tmp_path / "m") == len(header).to_bytes(8, "little") + header + w + b


def test_safetensors_reads_our_files(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_tensors(tmp_path / "m", tensors, {"format": "pt", "text": "é€😀"})
    assert_same(load_file(tmp_path / "m"), tensors)
    with safe_open(tmp_path / "m", "numpy") as file:
        metadata = file.metadata()
    assert {key: metadata[key] for key in ("format", "text")} == {"format": "pt", "text": "é€😀"}
    assert metadata.keys() == {"format", "text", "sha256.header", "sha256.tensors"}


def test_files_of_safetensors_are_read_unless_checksums_are_required(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "m", metadata={"format": "pt", "text": "é€😀"})
    found, metadata = read_tensors(tmp_path / "m")
    assert_same(found, tensors)
    assert metadata == {"format": "pt", "text": "é€😀"}
    save_file({}, tmp_path / "empty")
    assert read_tensors(tmp_path / "empty") == ({}, {})
    with pytest.raises(CheckpointFormatError) as caught:
        read_tensors(tmp_path / "m", require_checksums=True)
    assert str(caught.value) == (
        f"read_tensors: {tmp_path / 'm'}: __metadata__: expected sha256.header and "
        "sha256.tensors, got neither; trust it with require_checksums=False or use another copy"
    )


def test_a_foreign_copy_with_our_stale_checksums_is_refused(tmp_path: Path) -> None:
    small_file(tmp_path / "m")
    with safe_open(tmp_path / "m", "numpy") as file:
        metadata = file.metadata()
    save_file({"w.0": np.zeros((1, 2), np.float32)}, tmp_path / "copy", metadata=metadata)
    with pytest.raises(CheckpointCorruptError):
        read_tensors(tmp_path / "copy")


@pytest.mark.parametrize("empty", [False, True])
def test_every_flipped_bit_is_detected(tmp_path: Path, empty: bool) -> None:
    path = tmp_path / "m"
    if empty:
        write_tensors(path, {}, {})
    content = path.read_bytes() if empty else small_file(path)
    data = 8 + int.from_bytes(content[:8], "little")
    for position in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(CheckpointFormatError) as caught:
                read_tensors(path)
            if position >= data:
                name, begin, end = ("w.0", 0, 8) if position < data + 8 else ("b", 8, 10)
                place = f"tensor '{name}' (bytes {data + begin} to {data + end})"
                assert f"m: {place}: expected sha256 '" in str(caught.value)
                assert isinstance(caught.value, CheckpointCorruptError)
    path.write_bytes(content)
    read_tensors(path, require_checksums=True)


def test_every_truncation_and_trailing_byte_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "m"
    content = small_file(path)
    for size in range(len(content)):
        path.write_bytes(content[:size])
        expected = CheckpointCorruptError if size >= 8 else CheckpointFormatError
        with pytest.raises(expected):
            read_tensors(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(CheckpointFormatError, match="data: expected 10 bytes, got 11, some of no"):
        read_tensors(path)


def test_truncated_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size was read before: the file must not be waited for, nor half an array returned."""
    path = tmp_path / "m"
    content = small_file(path)
    path.write_bytes(content[:-3])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", lambda fd: os.stat_result((0o100644, *[0] * 5, 354, 0, 0, 0)))
        with pytest.raises(CheckpointCorruptError, match="byte 352: expected 2 more bytes, got"):
            read_tensors(path)


def test_partial_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_five(fd: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(fd, [buffers[0][:5]], offset)

    preadv = os.preadv
    write_tensors(tmp_path / "m", some_tensors(), {})
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", read_five)
        assert_same(read_tensors(tmp_path / "m")[0], some_tensors())


def test_damage_names_the_place_and_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "m"
    content = small_file(path)
    path.write_bytes(content.replace(b'"pt"', b'"np"'))
    with pytest.raises(CheckpointCorruptError) as caught:
        read_tensors(path)
    stored = content[42:74].decode()
    found = hashlib.sha256(path.read_bytes()[8:42] + path.read_bytes()[74:344]).hexdigest()[:32]
    assert str(caught.value) == (
        f"read_tensors: {path}: header (bytes 8 to 344): expected sha256 '{stored}', "
        f"got '{found}'; the file is damaged: use an earlier checkpoint or another copy"
    )


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, kind in [(tmp_path / "fifo", "p"), (tmp_path, "d"), ("/dev/zero", "crw")]:
        with pytest.raises(
            CheckpointFormatError, match=f"path: expected a regular file, got {kind}"
        ):
            read_tensors(path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError):
            read_tensors(tmp_path / "socket")
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "absent")
    content = small_file(tmp_path / "m")
    (tmp_path / "link").symlink_to("m")
    assert read_tensors(tmp_path / "link")[1] == read_tensors(tmp_path / "m")[1]
    assert (tmp_path / "m").read_bytes() == content


def test_booleans_of_other_writers_must_be_0_or_1(tmp_path: Path) -> None:
    save_file({"flag": np.array([True, False])}, tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    (tmp_path / "m").write_bytes(content[:-1] + b"\2")
    with pytest.raises(CheckpointFormatError, match="'flag': BOOL: expected bytes 0 and 1"):
        read_tensors(tmp_path / "m")


ZERO = np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "message"),
    [
        ({1: ZERO}, {}, KindError, "tensors[1]: expected a name of type str, got int"),
        (
            {"w": [1.0]},
            {},
            KindError,
            "tensors['w']: expected numpy.ndarray, got list; use numpy.asarray",
        ),
        (
            {"w": ZERO.astype(complex)},
            {},
            KindError,
            "tensors['w']: expected dtype float64, float32, float16, int64, int32, uint64, "
            "uint32, uint8, bool, got complex128; use astype",
        ),
        ({"w": np.array([None])}, {}, KindError, None),
        ({"w": np.array(["a"])}, {}, KindError, None),
        (
            {},
            {"k": 1},
            KindError,
            "metadata['k']: expected str: str, got str: int; encode it as text",
        ),
        ({}, {1: "v"}, KindError, None),
        (
            {},
            {"sha256.tensors": ""},
            OptionError,
            "metadata['sha256.tensors']: expected another key, got a checksum's; rename it",
        ),
        ({}, {"sha256.header": ""}, OptionError, None),
        ({}, {"k": "\ud800"}, OptionError, None),
        ({}, {"\udfff": "v"}, OptionError, None),
        (
            {"a/b": ZERO},
            {},
            OptionError,
            "tensors['a/b']: expected a name of [A-Za-z0-9_.]{1,200} other than __metadata__; "
            "rename the tensor",
        ),
        ({"__metadata__": ZERO}, {}, OptionError, None),
        ({"w" * 201: ZERO}, {}, OptionError, None),
        ({"": ZERO}, {}, OptionError, None),
        (
            {f"w{i}": ZERO for i in range(4_001)},
            {},
            CheckpointFormatError,
            "PATH: header (bytes 8 to 388312): expected at most 4000 tensors, got 4001; "
            "keep to the safetensors format and its limits",
        ),
        ({}, {"k": "x" * 2**22}, CheckpointFormatError, None),
        ({}, {"k": "é" * 2**19}, CheckpointFormatError, None),
    ],
)
def test_what_cannot_be_read_back_is_not_written(
    tmp_path: Path, tensors: dict, metadata: dict, error: type[Exception], message: str | None
) -> None:
    path = tmp_path / "m"
    with pytest.raises(error) as caught:
        write_tensors(path, tensors, metadata)
    assert str(caught.value).startswith("write_tensors: ")
    if message is not None:
        assert str(caught.value) == "write_tensors: " + message.replace("PATH", str(path))
    assert os.listdir(tmp_path) == []


def test_limits_can_be_reached(tmp_path: Path) -> None:
    tensors = {f"t{i:0199d}": np.full((1, 1, 1, 1), i, np.int64) for i in range(4_000)}
    write_tensors(tmp_path / "m", tensors, {"k": "x" * 500_000, "quotes": '"' * 100_000})
    found, metadata = read_tensors(tmp_path / "m")
    assert_same(found, tensors)
    assert metadata == {"k": "x" * 500_000, "quotes": '"' * 100_000}
