"""Files of machine code that only this user can write: found again, never stale, never half.

Names carry a hash of all that the code was made from, so an edit or an upgrade cannot meet old
code. Files are written beside and renamed, and carry a checksum: processes that start cold together
only compile the same thing twice. Where no private folder can be written, one warning says so.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

DIGEST = hashlib.sha256


@cache
def folder(name: str) -> Path | None:
    """The folder `name` of the cache, private to this user; None where there can be none."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    try:
        if not os.path.isabs(base):
            raise OSError(f"{base} is not an absolute path")
        top = Path(base) / "fused-backprop"
        place = top / name
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        for part in (top, place):
            status = part.lstat()
            if part.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
                raise OSError(f"{part} could be written by others")
        with tempfile.TemporaryFile(dir=place):
            return place
    except OSError as problem:
        _warn(problem)
        return None


def kept(folder_name: str, file_name: str, make: Callable[[], bytes]) -> bytes:
    """The code in that file of the cache, or what `make` makes, kept there for the next process."""
    place = folder(folder_name)
    if place is None:
        return make()
    code = _read(place / file_name)
    if code is None:
        code = make()
        _write(place / file_name, code)
    return code


def _read(file: Path) -> bytes | None:
    """The code in `file`, or None where there is none or it is damaged."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    size = DIGEST().digest_size
    code = data[size:]
    return code if code and DIGEST(code).digest() == data[:size] else None


def _write(file: Path, code: bytes) -> None:
    try:
        handle, temporary = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(DIGEST(code).digest() + code)
        os.replace(temporary, file)
    except OSError as problem:
        _warn(problem)


def _warn(problem: Exception) -> None:
    warnings.warn(
        f"kernels are not cached ({problem}), so every process compiles them again; point "
        "XDG_CACHE_HOME at a folder that only you can write",
        RuntimeWarning,
        stacklevel=2,
    )
