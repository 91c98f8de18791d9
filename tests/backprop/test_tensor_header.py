from __future__ import annotations

import contextlib
import hashlib
import json
import time
import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from backprop_kernels.errors import CheckpointCorruptError, CheckpointFormatError

from backprop.checkpoint import read_tensors
from backprop.tensor_header import MAX_HEADER
from tests.backprop import header_fuzzer

MIB = 2**20
REFUSALS = ("CheckpointFormatError", "CheckpointCorruptError")
ADVICE = "; keep to the safetensors format and its limits"


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_of(header: Any, data: bytes = b"\1\2\3\4") -> bytes:
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def signed(rest: bytes) -> bytes:
    """A file whose header, ending in `rest`, matches its own digest."""
    start = b'{"__metadata__":{"sha256.header":"'
    digest = hashlib.sha256(start + b'"' + rest).hexdigest()[:32].encode()
    return file_of(start + digest + b'"' + rest, b"")


def fill(start: bytes, unit: bytes, end: bytes = b"", size: int = MAX_HEADER) -> bytes:
    """A header of `size` bytes: as many units as fit."""
    return start + unit * ((size - len(start) - len(end)) // len(unit)) + end


def test_order_of_entries_is_free(tmp_path: Path) -> None:
    """A JSON object has no order: other writers list tensors otherwise than they lie."""
    header = {
        "b": entry("U8", [1], [3, 4]),
        "a": entry("U8", [3], [0, 3]),
        "e": entry("F32", [0], [3, 3]),
    }
    (tmp_path / "m").write_bytes(file_of(header))
    tensors, metadata = read_tensors(tmp_path / "m")
    assert {name: (str(a.dtype), a.tolist()) for name, a in tensors.items()} == {
        "b": ("uint8", [4]),
        "a": ("uint8", [1, 2, 3]),
        "e": ("float32", []),
    }
    assert list(tensors) == ["b", "a", "e"] and metadata == {}


HOSTILE = {
    "no bytes": (b"", "byte 0: expected 8 bytes of header length, got a file of 0 bytes"),
    "7 bytes": (b"\2" * 7, "byte 0: expected 8 bytes of header length, got a file of 7 bytes"),
    "length 0": (bytes(8), f"byte 0: expected a header length of 2 to {MAX_HEADER}, got 0"),
    "length 2**63": (
        (2**63).to_bytes(8, "little") + b"{}",
        f"byte 0: expected a header length of 2 to {MAX_HEADER}, got {2**63}",
    ),
    "wrong endianness": (
        (2).to_bytes(8, "big") + b"{}",
        f"byte 0: expected a header length of 2 to {MAX_HEADER}, got {2**57}",
    ),
    "length above the limit": (
        file_of(b"{}" + b" " * (MAX_HEADER - 1)),
        f"byte 0: expected a header length of 2 to {MAX_HEADER}, got {MAX_HEADER + 1}",
    ),
    "length above the file": (
        (3).to_bytes(8, "little") + b"{}",
        "header: expected bytes 8 to 11, got a file of 10 bytes",
    ),
    "no object": (file_of(b"[]"), "byte 8: expected '{', got b'['"),
    "space first": (file_of(b" {}"), "byte 8: expected '{', got b' '"),
    "byte order mark": (file_of(b"\xef\xbb\xbf{}"), "byte 8: expected '{', got b'\\xef'"),
    "truncated JSON": (
        file_of(b'{"w"'),
        "byte 12: expected JSON, got an error: Expecting ':' delimiter",
    ),
    "JSON error after wide text": (
        file_of('{"é€😀": ?}'.encode()),
        "byte 22: expected JSON, got an error: Expecting value",
    ),
    "a second value": (file_of(b"{}{}"), "byte 10: expected JSON, got an error: Extra data"),
    "padding of NUL": (file_of(b"{}\0"), "byte 10: expected JSON, got an error: Extra data"),
    "not UTF-8": (file_of(b'{"\xff":1}'), "byte 10: expected UTF-8, got invalid start byte"),
    "overlong UTF-8": (
        file_of(b'{"\xc0\xaf":1}'),
        "byte 10: expected UTF-8, got invalid start byte",
    ),
    "raw newline": (
        file_of(b'{"\n":1}'),
        "byte 10: expected JSON, got an error: Invalid control character at",
    ),
    "NaN": (file_of(b'{"w":NaN}'), "HEADER: expected strict JSON, got the number 'NaN'"),
    "Infinity": (
        file_of(b'{"w":-Infinity}'),
        "HEADER: expected strict JSON, got the number '-Infinity'",
    ),
    "1e999": (file_of(b'{"w":1e999}'), "HEADER: expected strict JSON, got the number '1e999'"),
    "minus zero": (
        file_of({"w": entry(offsets=[0, 4])}).replace(b"[0, 4]", b"[-0,4]"),
        "HEADER: expected strict JSON, got the number '-0'",
    ),
    "float offset": (
        file_of({"w": entry(offsets=[0, 4.0])}),
        "HEADER: expected strict JSON, got the number '4.0'",
    ),
    "5,000 digits": (
        file_of(b'{"w":' + b"9" * 5000 + b"}"),
        "HEADER: expected strict JSON, got an integer of 5000 digits",
    ),
    "20 digits": (
        file_of({"w": entry("U8", [10**19])}),
        "HEADER: expected strict JSON, got an integer of 20 digits",
    ),
    "names twice": (
        file_of(b'{"w":1,"w":1}'),
        "HEADER: expected strict JSON, got the name 'w' twice",
    ),
    "metadata twice": (
        file_of(b'{"__metadata__":{},"__metadata__":{}}'),
        "HEADER: expected strict JSON, got the name '__metadata__' twice",
    ),
    "deep": (
        file_of(b'{"w":' + b"[" * 8 + b"]" * 8 + b"}"),
        "HEADER: expected at most 8 nested brackets, got more",
    ),
    "deep after an escaped backslash": (
        file_of(rb'{"\\":' + b"[" * 5000),
        "HEADER: expected at most 8 nested brackets, got more",
    ),
    "metadata null": (
        file_of({"__metadata__": None}),
        "__metadata__: expected an object, got None",
    ),
    "metadata list": (file_of({"__metadata__": []}), "__metadata__: expected an object, got []"),
    "metadata number": (
        file_of({"__metadata__": {"k": 1}}),
        "__metadata__: key 'k': expected a string, got 1",
    ),
    "metadata nested": (
        file_of({"__metadata__": {"k": {"a": "b"}}}),
        "__metadata__: key 'k': expected a string, got {'a': 'b'}",
    ),
    "surrogate value": (
        file_of({"__metadata__": {"k": "\ud800"}}),
        "__metadata__: key 'k': expected Unicode text, got a lone surrogate",
    ),
    "surrogate key": (
        file_of({"__metadata__": {"\udfff": "v"}}),
        "__metadata__: key '\\udfff': expected Unicode text, got a lone surrogate",
    ),
    **{
        f"name {name[:9]!r}": (
            file_of({name: entry()}),
            f"tensor name: expected [A-Za-z0-9_.]{{1,200}}, got {shown}",
        )
        for name, shown in [
            ("", "''"),
            ("a/b", "'a/b'"),
            ("..\\x", "'..\\\\x'"),
            ("a\0", "'a\\x00'"),
            ("a\n", "'a\\n'"),
            ("é", "'é'"),
            ("a-b", "'a-b'"),
            ("x" * 65536, f"'{'x' * 37}...{'x' * 38}'"),
        ]
    },
    "class name": (
        file_of({"w": {"__class__": "os.system", **entry()}}),
        "tensor 'w': entry: expected an object of dtype, shape, data_offsets, got "
        "{'__class__': 'os.system', 'data_offsets': [0, 4], 'dtype': 'U8', 'shape': [4]}",
    ),
    "missing field": (
        file_of({"w": {"dtype": "U8", "shape": [4]}}),
        "tensor 'w': entry: expected an object of dtype, shape, data_offsets, got "
        "{'dtype': 'U8', 'shape': [4]}",
    ),
    "entry null": (
        file_of({"w": None}),
        "tensor 'w': entry: expected an object of dtype, shape, data_offsets, got None",
    ),
    **{
        f"dtype {dtype!r}": (
            file_of({"w": entry(dtype)}),
            "tensor 'w': dtype: expected F64, F32, F16, I64, I32, U64, U32, U8, BOOL, got "
            + repr(dtype),
        )
        for dtype in ("O", "object", "BF16", "u8", "|O", 8, None, ["U8"])
    },
    **{
        f"shape {shape!r}": (
            file_of({"w": entry("U8", shape)}),
            f"tensor 'w': shape: expected at most 32 integers >= 0, got {shape!r}",
        )
        for shape in ([-4], [-2, -2], [True, 4], [None], ["4"], [[4]], "\x1b[2J", 4, {"a": 4}, None)
    },
    "33 dimensions": (
        file_of({"w": entry("U8", [1] * 32 + [4])}),
        "tensor 'w': shape: expected at most 32 integers >= 0, got [1, 1, 1, 1, 1, 1, ...]",
    ),
    **{
        f"offsets {offsets!r}": (
            file_of({"w": entry("U8", [4], offsets)}),
            f"tensor 'w': data_offsets: expected two integers 0 <= begin <= end, got {offsets!r}",
        )
        for offsets in ([-4, 0], [4, 0], [0], [0, 4, 4], [False, 4], ["0", 4], None, 4)
    },
    "count above the shape": (
        file_of({"w": entry("U8", [3])}),
        "tensor 'w': data_offsets: expected 3 bytes by its shape, got [0, 4]",
    ),
    "itemsize": (
        file_of({"w": entry("F32", [4])}),
        "tensor 'w': data_offsets: expected 16 bytes by its shape, got [0, 4]",
    ),
    "product 2**64 + 4": (
        file_of({"w": entry("U8", [2**32 + 2, 2**32 - 2])}),
        f"tensor 'w': data_offsets: expected {2**64 - 4} bytes by its shape, got [0, 4]",
    ),
    "product 2**64": (
        file_of({"w": entry("U8", [2**32, 2**32], [0, 0])}, b""),
        f"tensor 'w': data_offsets: expected {2**64} bytes by its shape, got [0, 0]",
    ),
    "2**62 times 0": (
        file_of({"w": entry("F64", [2**62, 0], [0, 0])}, b""),
        f"tensor 'w': shape: expected at most {2**47} bytes without its zeros, got [{2**62}, 0]",
    ),
    "10**12 parameters": (
        file_of({"w": entry("F32", [10**6, 10**6], [0, 4 * 10**12])}),
        f"data: expected {4 * 10**12} bytes, got 4",
    ),
    "gap at the start": (
        file_of({"w": entry("U8", [3], [1, 4])}),
        "tensor 'w': data_offsets: expected to begin at 0, got 1",
    ),
    "gap between": (
        file_of({"v": entry("U8", [1], [0, 1]), "w": entry("U8", [2], [2, 4])}),
        "tensor 'w': data_offsets: expected to begin at 1, got 2",
    ),
    "overlap": (
        file_of({"v": entry("U8", [3], [0, 3]), "w": entry("U8", [2], [2, 4])}),
        "tensor 'w': data_offsets: expected to begin at 3, got 2",
    ),
    "the same bytes twice": (
        file_of({"v": entry(), "w": entry()}),
        "tensor 'w': data_offsets: expected to begin at 4, got 0",
    ),
    "empty tensor inside another": (
        file_of({"v": entry(), "w": entry("U8", [0], [2, 2])}),
        "tensor 'w': data_offsets: expected to begin at 4, got 2",
    ),
    "trailing bytes": (
        file_of({"w": entry()}, b"\1\2\3\4PK\3\4"),
        "data: expected 4 bytes, got 8, some of no tensor",
    ),
    "bytes of no tensor": (file_of({}), "data: expected 0 bytes, got 4, some of no tensor"),
    "4,001 tensors": (
        file_of(b"{" + b",".join(b'"%d":0' % i for i in range(4_001)) + b"}"),
        "HEADER: expected at most 4000 tensors, got 4001",
    ),
    "a million tensors": (
        file_of(fill(b"{", b'"":{"shape":[0]},', b'"":0}')),
        "HEADER: expected at most 44000 quotes, got 986894",
    ),
    "nested [": (
        file_of(fill(b'{"w":', b"[")),
        "HEADER: expected at most 25000 brackets, got 4194300",
    ),
    "empty lists": (
        file_of(fill(b'{"w":[', b"[],", b"0]}")),
        "HEADER: expected at most 29000 commas, got 1398098",
    ),
    "quotes": (
        file_of(fill(b'{"w":', b'"')),
        "HEADER: expected at most 44000 quotes, got 4194301",
    ),
    "wide text": (
        file_of(fill(b'{"__metadata__":{"k":"', "😀".encode(), b'"}}', MIB + 4)),
        "HEADER: expected plain ASCII in a header above 1048576 bytes, got other characters",
    ),
    "escaped wide text": (
        file_of(fill(rb'{"__metadata__":{"k":"\u20ac', b"x", b'"}}', MIB + 4)),
        "HEADER: expected plain ASCII in a header above 1048576 bytes, got other characters",
    ),
    "no digests of tensors": (
        signed(b"}}"),
        "__metadata__: expected sha256.header at byte 8, and sha256.tensors, "
        "got a header changed since",
    ),
    "too many digests": (
        signed(b',"sha256.tensors":"0 0"}}'),
        "sha256.tensors: expected 0 digests, got 2",
    ),
    "half of our checksums": (
        file_of({"__metadata__": {"sha256.tensors": ""}}, b""),
        "__metadata__: expected sha256.header at byte 8, and sha256.tensors, "
        "got a header changed since",
    ),
    "the other half": (
        file_of({"__metadata__": {"a": "", "sha256.header": ""}}, b""),
        "__metadata__: expected sha256.header at byte 8, and sha256.tensors, "
        "got a header changed since",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "m"
    path.write_bytes(content)
    with pytest.raises(CheckpointFormatError) as caught:
        read_tensors(path)
    if isinstance(caught.value, CheckpointCorruptError):
        advice = "; the file is damaged: use an earlier checkpoint or another copy"
    else:
        advice = ADVICE
    header_end = 8 + int.from_bytes(content[:8], "little")
    message = message.replace("HEADER", f"header (bytes 8 to {header_end})")
    assert str(caught.value) == f"read_tensors: {path}: {message}{advice}"


COSTLY = {
    "many pairs": b'{"__metadata__":{'
    + b",".join(b'"k%05d":"%s"' % (i, b"v" * 365) for i in range(10_990))
    + b"}}",
    "many wide pairs": b'{"__metadata__":{'
    + ",".join(f'"ké{i}":"{"v€" * 12}{i}"' for i in range(10_990)).encode()
    + b"}}",
    "many integers": b'{"w":[' + b",".join([b"9" * 19] * 28_000) + b"]}",
    "many objects": b'{"w":[' + b",".join([b'{"a":[]}'] * 6_000) + b"]}",
    "many tensors": b"{"
    + b",".join(
        b'"%0200d":{"dtype":"F64","shape":[0,7,0,7],"data_offsets":[0,0]}' % i for i in range(4_000)
    )
    + b"}",
    "long text": fill(b'{"__metadata__":{"k":"', b"x", b'"}}'),
    "escaped text": fill(b'{"__metadata__":{"k":"', rb"\"", b'"}}'),
    "wide text": fill('{"__metadata__":{"k":"😀'.encode(), b"x", b'"}}', MIB),
    "escaped wide text": fill(rb'{"__metadata__":{"k":"\ud83d\ude00', b"x", b'"}}', MIB),
    "nested [": fill(b'{"w":', b"["),
    "empty lists": fill(b'{"w":[', b"[],", b"0]}"),
    "a long integer": fill(b'{"w":', b"9", b"}"),
}


@pytest.mark.parametrize("case", COSTLY)
def test_memory_stays_below_the_file_and_16_mib(tmp_path: Path, case: str) -> None:
    content = file_of(COSTLY[case], b"")
    path = tmp_path / "m"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        read_tensors(path)
    except CheckpointFormatError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < len(content) + 16 * MIB


def test_tensors_cost_their_own_size(tmp_path: Path) -> None:
    """Reading, checking and hashing booleans, the most checked kind, makes no second copy."""
    path = tmp_path / "m"
    header = {"w": entry("BOOL", [32 * MIB], [0, 32 * MIB])}
    path.write_bytes(file_of(header, bytes(32 * MIB)))
    tracemalloc.start()
    tensors, _ = read_tensors(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tensors["w"].nbytes == 32 * MIB
    assert peak < 33 * MIB


@pytest.mark.alone
def test_costly_headers_are_answered_in_a_tenth_of_a_second(tmp_path: Path) -> None:
    """In CPU time, the least of five; other headers of this length cost less."""
    for case, header in COSTLY.items():
        (tmp_path / "m").write_bytes(file_of(header, b""))
        seconds = []
        for _ in range(5):
            started = time.thread_time()
            with contextlib.suppress(CheckpointFormatError):
                read_tensors(tmp_path / "m")
            seconds.append(time.thread_time() - started)
        assert min(seconds) <= 0.1, case


def test_fuzzed_headers(tmp_path: Path) -> None:
    outcomes, _ = header_fuzzer.fuzz(tmp_path, 5_000)
    assert all(outcomes[name] > 100 for name in ("read", *REFUSALS)), "it reaches every depth"


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 11))
def test_fuzzed_headers_at_length(tmp_path: Path, seed: int) -> None:
    """A million in all; `python -m tests.backprop.header_fuzzer` makes more."""
    outcomes, slowest = header_fuzzer.fuzz(tmp_path, 100_000, seed)
    assert outcomes.total() == 100_000 and slowest <= 0.1


def test_memory_of_fuzzed_headers(tmp_path: Path) -> None:
    """Near the longest header too: the pieces of a fuzzed one, again and again."""
    files = header_fuzzer.mutants(header_fuzzer.seeds(tmp_path), 1)
    path = tmp_path / "m"
    for content in islice(files, 40):
        header = content[8:]
        path.write_bytes(file_of(header * (MAX_HEADER // max(len(header), 1)), b""))
        tracemalloc.start()
        with contextlib.suppress(CheckpointFormatError):
            read_tensors(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < path.stat().st_size + 16 * MIB
