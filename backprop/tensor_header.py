"""Parses the JSON header of a safetensors file that may come from anywhere.

Every limit is checked before the memory or the recursion it bounds is spent, so a hostile header
costs less than 16 MiB and a tenth of a second.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from backprop_kernels.errors import CheckpointCorruptError, CheckpointFormatError

METADATA = "__metadata__"
NUMPY_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "U64": "<u8",
    "U32": "<u4",
    "U8": "|u1",
    "BOOL": "|b1",
}

MAX_HEADER = 4 * 2**20
MAX_TENSORS = 4_000
MAX_DIMENSIONS = 32
# Without its zeros, even the shape of an empty tensor must fit an address space: NumPy overflows.
MAX_BYTES = 2**47
# Parsed JSON takes up to 50 times its text. A tensor has 5 strings, 3 pairs of brackets and, up to
# 4 dimensions, 7 commas; the rest is for metadata.
MAX_STRINGS = 5 * MAX_TENSORS + 2_000
MAX_BRACKETS = 6 * MAX_TENSORS + 1_000
MAX_COMMAS = 7 * MAX_TENSORS + 1_000
MAX_DEPTH = 8
# JSON within the metadata (an architecture, a run's state) is parsed on its own: 12 MiB at most.
MAX_TEXT_STRINGS = 100_000
MAX_TEXT_BRACKETS = 20_000
MAX_TEXT_COMMAS = 140_000
# A single wide character makes Python store a whole string at 4 bytes a character.
MAX_WIDE_HEADER = 2**20

NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")
SURROGATE = re.compile("[\ud800-\udfff]")
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))

shown = reprlib.Repr()
shown.maxstring = 80


class Entry(NamedTuple):
    """What the header says of one tensor; offsets count from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def malformed(
    where: str, place: str, expected: str, value: object = None, *, words: str | None = None
) -> CheckpointFormatError:
    """The error for a file that is not what it should be, however intact.

    It tells what was found in our `words` or, shortened and escaped, as the file's own `value`.
    """
    got = shown.repr(value) if words is None else words
    return CheckpointFormatError(
        f"{where}: {place}: expected {expected}, got {got}; "
        "keep to the safetensors format and its limits"
    )


def corrupt(where: str, place: str, expected: str, got: str) -> CheckpointCorruptError:
    """The error for a file that was once in order."""
    return CheckpointCorruptError(
        f"{where}: {place}: expected {expected}, got {got}; "
        "the file is damaged: use an earlier checkpoint or another copy"
    )


def parse_header(header: bytes, where: str) -> tuple[list[Entry], dict[str, str]]:
    """The entries in the header's order, and the metadata.

    Raises CheckpointFormatError, its message starting with `where`, unless the header is strict
    JSON of the right form and each entry is consistent in itself.
    """
    place = f"header (bytes 8 to {8 + len(header)})"
    if len(header) > MAX_HEADER:
        raise malformed(where, place, f"at most {MAX_HEADER} bytes", len(header))
    if not header.startswith(b"{"):
        raise malformed(where, "byte 8", "'{'", header[:1])
    _bound_json(header, where, place)
    try:
        fields = _JSON.decode(header.decode())
    except UnicodeDecodeError as error:
        raise malformed(where, f"byte {8 + error.start}", "UTF-8", words=error.reason) from None
    except json.JSONDecodeError as error:
        offset = 8 + len(error.doc[: error.pos].encode())
        raise malformed(where, f"byte {offset}", "JSON", words=f"an error: {error.msg}") from None
    except ValueError as error:
        raise malformed(where, place, "strict JSON", words=str(error)) from None

    metadata = fields.pop(METADATA, {})
    if not isinstance(metadata, dict):
        raise malformed(where, METADATA, "an object", metadata)
    for key, value in metadata.items():
        key_place = f"{METADATA}: key {shown.repr(key)}"
        if not isinstance(value, str):
            raise malformed(where, key_place, "a string", value)
        if SURROGATE.search(key) or SURROGATE.search(value):
            raise malformed(where, key_place, "Unicode text", words="a lone surrogate")
    if len(fields) > MAX_TENSORS:
        raise malformed(where, place, f"at most {MAX_TENSORS} tensors", len(fields))
    return [_parse_entry(name, field, where) for name, field in fields.items()], metadata


def parse_text(text: str, where: str) -> Any:
    """The data of a JSON text within the metadata; CheckpointFormatError unless strict and small.

    Numbers may be floats, but neither NaN nor infinite.
    """
    limits = MAX_TEXT_STRINGS, MAX_TEXT_BRACKETS, MAX_TEXT_COMMAS
    _bound_json(text.encode("utf-8", "surrogatepass"), where, "text", limits)
    try:
        return _TEXT.decode(text)
    except ValueError as error:
        raise malformed(where, "text", "strict JSON", words=str(error)) from None


def check_layout(entries: list[Entry], size: int, where: str) -> None:
    """The tensors must cover the `size` bytes of data exactly: no hole, no overlap, no rest."""
    reached = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != reached:
            place = f"tensor {entry.name!r}: data_offsets"
            raise malformed(where, place, f"to begin at {reached}", entry.begin)
        reached = entry.end
    if reached > size:
        raise corrupt(where, "data", f"{reached} bytes", f"{size}")
    if reached < size:
        raise malformed(where, "data", f"{reached} bytes", words=f"{size}, some of no tensor")


def _bound_json(
    header: bytes, where: str, place: str,
    limits: tuple[int, int, int] = (MAX_STRINGS, MAX_BRACKETS, MAX_COMMAS),
) -> None:  # fmt: skip
    """Refuse what would make the JSON parser recurse deeply or allocate many times the header."""
    if len(header) > MAX_WIDE_HEADER and (not header.isascii() or rb"\u" in header):
        expected = f"plain ASCII in a header above {MAX_WIDE_HEADER} bytes"
        raise malformed(where, place, expected, words="other characters")
    max_strings, max_brackets, max_commas = limits
    unescaped = header.replace(rb"\\", b"").replace(rb"\"", b"")
    quotes = unescaped.count(b'"')
    if quotes > 2 * max_strings:
        raise malformed(where, place, f"at most {2 * max_strings} quotes", quotes)
    outside_strings = b"".join(unescaped.split(b'"')[::2])
    commas = outside_strings.count(b",")
    if commas > max_commas:
        raise malformed(where, place, f"at most {max_commas} commas", commas)
    brackets = outside_strings.translate(None, NOT_BRACKETS)
    if len(brackets) > max_brackets:
        raise malformed(where, place, f"at most {max_brackets} brackets", len(brackets))
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise malformed(where, place, f"at most {MAX_DEPTH} nested brackets", words="more")


def _parse_entry(name: str, field: Any, where: str) -> Entry:
    if not NAME.fullmatch(name):
        raise malformed(where, "tensor name", NAME.pattern, name)
    where = f"{where}: tensor {name!r}"
    if not isinstance(field, dict) or field.keys() != {"dtype", "shape", "data_offsets"}:
        raise malformed(where, "entry", "an object of dtype, shape, data_offsets", field)
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
        raise malformed(where, "dtype", ", ".join(NUMPY_DTYPES), dtype)
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise malformed(where, "shape", f"at most {MAX_DIMENSIONS} integers >= 0", shape)
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise malformed(where, "data_offsets", "two integers 0 <= begin <= end", offsets)
    itemsize = np.dtype(NUMPY_DTYPES[dtype]).itemsize
    size = math.prod(shape) * itemsize
    if size != offsets[1] - offsets[0]:
        raise malformed(where, "data_offsets", f"{size} bytes by its shape", offsets)
    if math.prod(count or 1 for count in shape) * itemsize > MAX_BYTES:
        raise malformed(where, "shape", f"at most {MAX_BYTES} bytes without its zeros", shape)
    return Entry(name, dtype, tuple(shape), *offsets)


def _are_counts(value: Any) -> bool:
    # type, not isinstance: True is an int too.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the name {shown.repr(name)} twice")
        fields[name] = value
    return fields


def _short_integer(digits: str, most: int = 19) -> int:
    if len(digits) > most:
        raise ValueError(f"an integer of {len(digits)} digits")
    if digits == "-0":  # JSON's, but to other readers a float
        _no_number(digits)
    return int(digits)


def _no_number(text: str) -> None:
    raise ValueError(f"the number {shown.repr(text)}")


_JSON = json.JSONDecoder(
    object_pairs_hook=_object_without_duplicates,
    parse_int=_short_integer,
    parse_float=_no_number,
    parse_constant=_no_number,
)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _no_number(text)
    return value


_TEXT = json.JSONDecoder(
    object_pairs_hook=_object_without_duplicates,
    parse_int=partial(_short_integer, most=100),  # random generators have states of 128 bits
    parse_float=_finite,
    parse_constant=_no_number,
)
