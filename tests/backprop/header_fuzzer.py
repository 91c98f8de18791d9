"""Headers that are nearly right: valid ones, changed in a few places by what breaks parsers.

`python -m tests.backprop.header_fuzzer 1000000 [SEED]` tries so many and prints what they came to.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import safetensors.numpy
from backprop_kernels.errors import CheckpointFormatError

from backprop.checkpoint import DIGEST_PREFIX, DIGEST_SLOT, read_tensors, write_tensors

MESSAGE = re.compile(r"read_tensors: [^:]+: .+: expected .+, got ", re.DOTALL)
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[-+.\w]+|.', re.DOTALL)
# In place of any token of a header.
STRANGE = [
    b"0", b"1", b"2", b"3", b"4", b"-1", b"-0", b"4.0", b"1e2", b"1e999", b"NaN", b"-Infinity",
    b"true", b"null", b"2147483648", b"9223372036854775808", b"18446744073709551616", b"9" * 20,
    b"9" * 5000, b"01", b"+1", b"0x1", b'"U8"', b'"F32"', b'"BOOL"', b'"O"', b'"F8"', b'""',
    b'"w"', b'"a/b"', b'"__metadata__"', b'"dtype"', b'"sha256.header"', b'"sha256.tensors"',
    b'"\\ud800"', b'"\xff"', b'"\\u0000"', "\"é\"".encode(), b"[", b"]", b"{", b"}", b",", b":",
    b"[]", b"{}", b"[0,1]", b"[[[[[[[[[[", b"\\", b'"', b" ", b"\n", b"\0", b"\xef\xbb\xbf", b"",
]  # fmt: skip


def seeds(folder: Path) -> list[tuple[bytes, bytes]]:
    """(header, data) of valid files: ours and the safetensors library's, small and empty."""
    arrays = {
        "a.0": np.arange(3, dtype=np.uint8), "w": np.ones((1, 2), np.float32),
        "none": np.zeros((0, 3)), "b": np.array([True]), "one": np.array(2, np.int64),
    }  # fmt: skip
    contents = [safetensors.numpy.save(arrays, {"k": "text"}), safetensors.numpy.save({})]
    for tensors, metadata in [(arrays, {"k": "é"}), ({}, {}), ({"w": np.zeros(2)}, {})]:
        write_tensors(folder / "seed", tensors, metadata)
        contents.append((folder / "seed").read_bytes())
    split = (8 + int.from_bytes(content[:8], "little") for content in contents)
    return [(content[8:at], content[at:]) for content, at in zip(contents, split, strict=True)]


def mutants(originals: list[tuple[bytes, bytes]], seed: int) -> Iterator[bytes]:
    """Files without end."""
    rng = random.Random(seed)
    tokens = [TOKEN.findall(header) for header, _ in originals]
    while True:
        chosen = rng.randrange(len(originals))
        parts, data = list(tokens[chosen]), originals[chosen][1]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            place = rng.randrange(len(parts) + 1)
            kind = rng.random()
            if kind < 0.5:  # another token
                parts[place : place + 1] = [rng.choice(STRANGE)]
            elif kind < 0.6:
                parts.insert(place, rng.choice(STRANGE))
            elif kind < 0.7:  # a stretch twice, elsewhere
                stretch = parts[place : place + rng.randrange(1, 20)]
                at = rng.randrange(len(parts) + 1)
                parts[at:at] = stretch
            elif kind < 0.8:
                del parts[place : place + rng.randrange(1, 20)]
            elif kind < 0.9 and place < len(parts):  # a number near by
                if parts[place].isdigit() and len(parts[place]) < 20:
                    parts[place] = b"%d" % (int(parts[place]) + rng.choice((-1, 1, 8)))
            else:  # any byte
                text = bytearray(b"".join(parts))
                if text:
                    text[rng.randrange(len(text))] = rng.randrange(256)
                parts = [bytes(text)]
        header = b"".join(parts)
        if header.startswith(DIGEST_PREFIX) and rng.random() < 0.9:  # past the checksum
            rest = header[: DIGEST_SLOT.start] + header[DIGEST_SLOT.stop :]
            digest = hashlib.sha256(rest).hexdigest()[: DIGEST_SLOT.stop - DIGEST_SLOT.start]
            header = header[: DIGEST_SLOT.start] + digest.encode() + header[DIGEST_SLOT.stop :]
        length = len(header)
        outside = rng.random()
        if outside < 0.02:
            length = rng.choice((0, 1, length - 1, length + 1, 2**63, 2**64 - 1)) % 2**64
        elif outside < 0.04:
            data = data[: rng.randrange(len(data) + 1)] or b"PK\3\4"
        yield length.to_bytes(8, "little") + header + data


def check(path: str, content: bytes) -> str:
    """Refused in our words, or read as the safetensors library reads it, bit by bit."""
    try:
        found, _ = read_tensors(path)
    except CheckpointFormatError as problem:
        assert MESSAGE.match(str(problem)), str(problem)
        return type(problem).__name__
    expected = safetensors.numpy.load(content)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape)
        np.testing.assert_array_equal(array, expected[name])
    return "read"


def fuzz(folder: Path, count: int, seed: int = 0) -> tuple[Counter[str], float]:
    """(how many of each outcome, the most seconds of CPU that one of them took)."""
    path = str(folder / "m")
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    found: Counter[str] = Counter()
    slowest, files = 0.0, mutants(seeds(folder), seed)
    try:
        for number in range(count):
            content = next(files)
            os.ftruncate(fd, len(content))
            os.pwrite(fd, content, 0)
            started = time.thread_time()
            try:
                found[check(path, content)] += 1
            except Exception as problem:
                raise AssertionError(f"file {number} of seed {seed}: {content!r}") from problem
            slowest = max(slowest, time.thread_time() - started)
    finally:
        os.close(fd)
    return found, slowest


if __name__ == "__main__":
    with TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as where:
        outcomes, most = fuzz(Path(where), *map(int, sys.argv[1:3]))
        print(f"{outcomes.total():,} files: {dict(outcomes)}; slowest {1000 * most:.1f} ms of CPU")
