"""Replaces a file so that a crash at any instant leaves the old content or the whole new one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Sequence

from backprop_kernels.errors import CheckpointWriteError


def replace_file(path: str, chunks: Sequence[bytes | memoryview]) -> None:
    """Write chunks to a temporary file beside `path`, sync it, rename it, sync the directory.

    The mode follows the umask. Links and special files at `path` are refused: a rename would
    replace them. Raises CheckpointWriteError, an OSError with `errno` and `filename`; no temporary
    file is left, and the next call removes what a killed process left.
    """
    try:
        _replace(path, chunks)
    except OSError as error:
        if isinstance(error, CheckpointWriteError):
            raise
        size = sum(len(chunk) for chunk in chunks)
        raise CheckpointWriteError(
            error.errno,
            f"replace_file: path: expected to write {size} bytes, got {error.strerror!r}; "
            "the previous file, if any, is untouched",
            path,
        ) from error


def _replace(path: str, chunks: Sequence[bytes | memoryview]) -> None:
    parent, name = os.path.split(path)
    directory = os.open(parent or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _refuse_special_file(name, directory)
        _remove_orphans(f".{name}.", directory)
        temporary = f".{name}.{os.urandom(8).hex()}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o666, dir_fd=directory)
        try:
            # Tells other processes that this is no orphan. Not every file system can lock.
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for chunk in chunks:
                _write_all(fd, chunk)
            os.fsync(fd)
            os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=directory)
            raise
        finally:
            _close(fd)
        _sync_directory(directory, path)
    finally:
        _close(directory)


def _refuse_special_file(name: str, directory: int) -> None:
    try:
        mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, "a symbolic link at path: name its target or remove the link")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"no regular file at path but {stat.filemode(mode)}")


def _remove_orphans(prefix: str, directory: int) -> None:
    for name in os.listdir(directory):
        if name.startswith(prefix) and name.endswith(".tmp"):
            with contextlib.suppress(OSError):
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(name, flags, dir_fd=directory)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name, dir_fd=directory)
                finally:
                    os.close(fd)


def _write_all(fd: int, chunk: bytes | memoryview) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _close(fd: int) -> None:
    # After fsync a close has nothing left to lose, and before it a worse error is on its way.
    with contextlib.suppress(OSError):
        os.close(fd)


def _sync_directory(directory: int, path: str) -> None:
    try:
        os.fsync(directory)
    except OSError as error:
        # Some file systems cannot sync a directory and say so in these words.
        if error.errno in (errno.EINVAL, errno.EBADF):
            return
        raise CheckpointWriteError(
            error.errno,
            f"replace_file: path: expected to sync its directory, got {error.strerror!r}; "
            "the new file is in place but may not survive a power cut: save again",
            path,
        ) from error
