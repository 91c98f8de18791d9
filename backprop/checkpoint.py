"""Named arrays to and from safetensors files, with checksums that any flipped bit breaks.

    8 bytes    length of the header, little-endian
    header     {"__metadata__": {key: text}, name: {"dtype", "shape", "data_offsets"}, ...}
    data       every tensor in little-endian C order, no gaps

Any safetensors library reads these files. Two metadata entries are ours: `sha256.header`, over the
rest of the header, and `sha256.tensors`, one digest per tensor in the header's order. Either
demands the other, so damage that hides one of them is noticed too.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from typing import Any

import numpy as np
from backprop_kernels.errors import CheckpointFormatError, KindError, OptionError
from numpy.typing import NDArray

from backprop.durable_file import replace_file
from backprop.tensor_header import (
    MAX_HEADER,
    METADATA,
    NAME,
    NUMPY_DTYPES,
    SURROGATE,
    Entry,
    check_layout,
    corrupt,
    malformed,
    parse_header,
    shown,
)

Array = NDArray[Any]

DTYPE_NAMES = {code: name for name, code in NUMPY_DTYPES.items()}

HEADER_DIGEST = "sha256.header"
TENSOR_DIGESTS = "sha256.tensors"
DIGEST_LENGTH = 32  # hexadecimal: 128 bits
# The header's digest has a fixed place, so that it is checked before anything is parsed.
DIGEST_PREFIX = f'{{"{METADATA}":{{"{HEADER_DIGEST}":"'.encode()
DIGEST_SLOT = slice(len(DIGEST_PREFIX), len(DIGEST_PREFIX) + DIGEST_LENGTH)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Array], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file with checksums; `path` holds its old content or the whole new one.

    tensors: arrays of a dtype in `NUMPY_DTYPES`, of any shape, layout and byte order;
    metadata: text under any key but the two checksums'. Both are read back in this order.
    Raises KindError or OptionError for unusable arguments, CheckpointFormatError for what
    `read_tensors` would refuse (too many tensors, a long header), and CheckpointWriteError (an
    OSError with `errno` and `filename`) if the file cannot be written.
    """
    path = os.fspath(path)
    arrays = {name: _storable(name, array) for name, array in tensors.items()}
    header = _encode_header(arrays, metadata)
    parse_header(header, f"write_tensors: {path}")
    data = [_bytes_of(arrays[name]) for name in _data_order(arrays)]
    replace_file(path, [len(header).to_bytes(8, "little"), header, *data])


def read_tensors(
    path: str | os.PathLike[str], *, require_checksums: bool = False
) -> tuple[dict[str, Array], dict[str, str]]:
    """Read a safetensors file: fresh writable arrays, and the metadata without the checksums.

    Checksums are verified wherever the file carries them. Files of other writers carry none and
    are accepted, unless `require_checksums`.
    Raises CheckpointCorruptError for a damaged or truncated file, CheckpointFormatError for
    anything else that is not a well-formed regular file, and OSError where the system refuses.
    Takes less than 16 MiB of memory beyond the file's size, whatever the file says.
    """
    path = os.fspath(path)
    # O_NONBLOCK: opening a FIFO must not wait for its writer.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        return _read(fd, f"read_tensors: {path}", require_checksums)
    finally:
        os.close(fd)


def _bytes_of(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _digest(*chunks: bytes | memoryview) -> str:
    sha = hashlib.sha256()
    for chunk in chunks:
        sha.update(chunk)
    return sha.hexdigest()[:DIGEST_LENGTH]


def _header_digest(header: bytes) -> str:
    return _digest(header[: DIGEST_SLOT.start], header[DIGEST_SLOT.stop :])


def _storable(name: str, array: Array) -> Array:
    """The array in little-endian C order: itself where it already is."""
    where = f"write_tensors: tensors[{shown.repr(name)}]"
    if not isinstance(name, str):
        raise KindError(f"{where}: expected a name of type str, got {type(name).__name__}")
    if name == METADATA or not NAME.fullmatch(name):
        expected = f"a name of {NAME.pattern} other than {METADATA}"
        raise OptionError(f"{where}: expected {expected}; rename the tensor")
    if not isinstance(array, np.ndarray):
        raise KindError(
            f"{where}: expected numpy.ndarray, got {type(array).__name__}; use numpy.asarray"
        )
    dtype = array.dtype.newbyteorder("<")
    if dtype.str not in DTYPE_NAMES:
        names = ", ".join(np.dtype(code).name for code in DTYPE_NAMES)
        raise KindError(f"{where}: expected dtype {names}, got {array.dtype}; use astype")
    return np.asarray(array, dtype=dtype, order="C")


def _data_order(arrays: Mapping[str, Array]) -> list[str]:
    """Wide items first, so that every tensor is aligned for readers that map the file."""
    return sorted(arrays, key=lambda name: -arrays[name].itemsize)


def _encode_header(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    for key, value in metadata.items():
        where = f"write_tensors: metadata[{shown.repr(key)}]"
        if not isinstance(key, str) or not isinstance(value, str):
            kinds = f"{type(key).__name__}: {type(value).__name__}"
            raise KindError(f"{where}: expected str: str, got {kinds}; encode it as text")
        if key in (HEADER_DIGEST, TENSOR_DIGESTS):
            raise OptionError(f"{where}: expected another key, got a checksum's; rename it")
        if SURROGATE.search(key) or SURROGATE.search(value):
            raise OptionError(f"{where}: expected Unicode text, got a lone surrogate; remove it")
    begins, end = {}, 0
    for name in _data_order(arrays):
        begins[name] = end
        end += arrays[name].nbytes
    digests = " ".join(_digest(_bytes_of(array)) for array in arrays.values())
    # The header's digest comes first: that is its fixed place.
    own = {HEADER_DIGEST: "0" * DIGEST_LENGTH, TENSOR_DIGESTS: digests}
    fields: dict[str, Any] = {METADATA: own | dict(metadata)}
    for name, array in arrays.items():
        fields[name] = {
            "dtype": DTYPE_NAMES[array.dtype.str],
            "shape": array.shape,
            "data_offsets": [begins[name], begins[name] + array.nbytes],
        }
    header = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    digest = _header_digest(header).encode()
    return header[: DIGEST_SLOT.start] + digest + header[DIGEST_SLOT.stop :]


def _read(fd: int, where: str, require_checksums: bool) -> tuple[dict[str, Array], dict[str, str]]:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise malformed(where, "path", "a regular file", words=stat.filemode(status.st_mode))
    size = status.st_size
    if size < 8:
        raise malformed(
            where, "byte 0", "8 bytes of header length", words=f"a file of {size} bytes"
        )
    length = int.from_bytes(_read_bytes(fd, 8, 0, where), "little")
    if not 2 <= length <= MAX_HEADER:
        raise malformed(where, "byte 0", f"a header length of 2 to {MAX_HEADER}", length)
    data_begin = 8 + length
    if data_begin > size:
        raise corrupt(where, "header", f"bytes 8 to {data_begin}", f"a file of {size} bytes")
    header = _read_bytes(fd, length, 8, where)
    if header.startswith(DIGEST_PREFIX):
        stored = header[DIGEST_SLOT].decode("ascii", "replace")
        _check_digest(_header_digest(header), stored, where, f"header (bytes 8 to {data_begin})")
    entries, metadata = parse_header(header, where)
    check_layout(entries, size - data_begin, where)
    digests = _tensor_digests(header, entries, metadata, where)
    if require_checksums and digests is None:
        raise CheckpointFormatError(
            f"{where}: {METADATA}: expected {HEADER_DIGEST} and {TENSOR_DIGESTS}, got neither; "
            "trust it with require_checksums=False or use another copy"
        )

    tensors = {}
    for index, entry in enumerate(entries):
        begin, end = data_begin + entry.begin, data_begin + entry.end
        array = np.empty(entry.shape, NUMPY_DTYPES[entry.dtype])
        content = _bytes_of(array)
        _read_into(fd, content, begin, where)
        if digests is not None:
            place = f"tensor {entry.name!r} (bytes {begin} to {end})"
            _check_digest(_digest(content), digests[index], where, place)
        if entry.dtype == "BOOL" and array.view(np.uint8).max(initial=0) > 1:
            # NumPy computes nonsense with a boolean that is neither.
            raise malformed(where, f"tensor {entry.name!r}: BOOL", "bytes 0 and 1", words="others")
        tensors[entry.name] = array
    return tensors, metadata


def _tensor_digests(
    header: bytes, entries: list[Entry], metadata: dict[str, str], where: str
) -> list[str] | None:
    """Move the checksums out of the metadata: one digest per tensor, or None without checksums."""
    stored = [metadata.pop(HEADER_DIGEST, None), metadata.pop(TENSOR_DIGESTS, None)]
    if stored == [None, None]:
        return None
    if stored[1] is None or not header.startswith(DIGEST_PREFIX):
        # Ends here too: a file that another program wrote, copying our metadata.
        got = "a header changed since"
        raise corrupt(where, METADATA, f"{HEADER_DIGEST} at byte 8, and {TENSOR_DIGESTS}", got)
    digests = stored[1].split()
    if len(digests) != len(entries):
        raise malformed(where, TENSOR_DIGESTS, f"{len(entries)} digests", len(digests))
    return digests


def _check_digest(found: str, stored: str, where: str, place: str) -> None:
    if found != stored:
        raise corrupt(where, place, f"sha256 {shown.repr(stored)}", repr(found))


def _read_bytes(fd: int, size: int, offset: int, where: str) -> bytes:
    content = bytearray(size)
    _read_into(fd, memoryview(content), offset, where)
    return bytes(content)


def _read_into(fd: int, target: memoryview, offset: int, where: str) -> None:
    while target:
        count = os.preadv(fd, [target], offset)
        if count == 0:
            raise corrupt(where, f"byte {offset}", f"{len(target)} more bytes", "the file's end")
        target = target[count:]
        offset += count
