"""Files of machine code that only this user can write: found again, never stale, never half.

Names carry a hash of all that the code was made from, so an edit or an upgrade cannot meet old
code. Files are written beside and renamed, and carry a checksum: processes that start cold together
only compile the same thing twice. Where no private folder can be written, one warning says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

DIGEST = hashlib.sha256
_warned = False


@cache
def folder(name: str) -> Path | None:
    """The folder `name` of the cache, private to this user; None where there can be none."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    try:
        if not os.path.isabs(base):
            raise OSError(f"{base} is not an absolute path")
        top = Path(base) / "fused-backprop"
        place = top / name
        Path(base).mkdir(parents=True, exist_ok=True)
        for part in (top, place):
            part.mkdir(mode=0o700, exist_ok=True)
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
    code = found(folder_name, file_name)
    if code is None:
        code = make()
        keep(folder_name, file_name, code)
    return code


def found(folder_name: str, file_name: str) -> bytes | None:
    """What is in that file of the cache; None where there is nothing, or damage."""
    place = folder(folder_name)
    return None if place is None else _read(place / file_name)


def keep(folder_name: str, file_name: str, data: bytes) -> None:
    """Have it in that file of the cache, wholly or not at all."""
    place = folder(folder_name)
    if place is not None:
        _write(place / file_name, data)


def _read(file: Path) -> bytes | None:
    """The code in `file`, or None where there is none or it is damaged."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    size = DIGEST().digest_size
    code = data[size:]
    return code if data[:size] == _checksum(file, code) else None


def _write(file: Path, code: bytes) -> None:
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(_checksum(file, code) + code)
        os.replace(temporary, file)
    except OSError as problem:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        _warn(problem)


def _checksum(file: Path, code: bytes) -> bytes:
    """Of the name as well: a file under another's name is no file of that kernel."""
    return DIGEST(file.name.encode() + b"\0" + code).digest()


def _warn(problem: Exception) -> None:
    global _warned
    if _warned:
        return
    _warned = True
    warnings.warn(
        f"kernels are not cached ({problem}), so every process compiles them again; point "
        "XDG_CACHE_HOME at a folder that only you can write",
        RuntimeWarning,
        stacklevel=2,
    )
