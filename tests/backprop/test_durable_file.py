from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from backprop_kernels.errors import CheckpointWriteError

from backprop import durable_file
from backprop.checkpoint import read_tensors, write_tensors
from backprop.durable_file import replace_file

OLD = b"the previous generation"
NEW = [b"one", memoryview(b"two" * 1000), b"", b"three"]
NEW_CONTENT = b"".join(bytes(chunk) for chunk in NEW)
CALLS = ("open", "stat", "listdir", "write", "fsync", "replace", "unlink", "close")


class Crash(BaseException):
    """The process is gone: nothing after it runs."""


class FaultyOs:
    """The os module, logging its input and output and failing the call of one number.

    `fault` is an errno, for that call alone, or Crash, for that call and all later ones. A crash
    also takes with it whatever a file held beyond its last fsync.
    """

    def __init__(self, fault: int | type[Crash] = 0, at: int = -1, longest_write: int = 2**30):
        self.fault, self.at, self.longest_write = fault, at, longest_write
        self.log: list[str] = []
        self.synced: dict[int, tuple[int, int]] = {}
        self.crashed = False

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        return self.wrap(name, function) if name in CALLS else function

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.crashed:
                raise Crash
            self.log.append(name)
            if len(self.log) - 1 == self.at:
                if self.fault is Crash:
                    self.crash()
                raise OSError(self.fault, os.strerror(self.fault))
            if name == "write":
                return os.write(args[0], args[1][: self.longest_write])
            result = function(*args, **kwargs)
            if name == "open":
                self.synced[result] = (os.dup(result), 0)
            elif name == "fsync" and args[0] in self.synced:
                copy, _ = self.synced[args[0]]
                self.synced[args[0]] = (copy, os.fstat(copy).st_size)
            return result

        return call

    def crash(self) -> None:
        self.crashed = True
        for fd, (copy, size) in self.synced.items():
            with contextlib.suppress(OSError):
                os.ftruncate(copy, size)
            with contextlib.suppress(OSError):
                os.close(fd)
        raise Crash

    def release(self) -> None:
        for copy, _ in self.synced.values():
            os.close(copy)


@contextlib.contextmanager
def faulty_os(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[FaultyOs]:
    fake = FaultyOs(**options)
    with monkeypatch.context() as patch:
        patch.setattr(durable_file, "os", fake)
        yield fake
    fake.release()


def test_replaces_and_creates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    for _ in range(2):
        replace_file(str(path), NEW)
        assert path.read_bytes() == NEW_CONTENT
    monkeypatch.chdir(tmp_path)
    replace_file("relative", [b"x"])
    assert (tmp_path / "relative").read_bytes() == b"x"
    assert sorted(os.listdir(tmp_path)) == ["m", "relative"]


def test_sync_comes_before_rename_and_the_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty_os(monkeypatch) as fake:
        replace_file(str(tmp_path / "m"), [b"one", b"two"])
    before = ["open", "stat", "listdir", "open"]
    assert fake.log == [*before, "write", "write", "fsync", "replace", "close", "fsync", "close"]


def test_partial_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_os(monkeypatch, longest_write=7) as fake:
        replace_file(str(tmp_path / "m"), NEW)
    assert (tmp_path / "m").read_bytes() == NEW_CONTENT
    assert fake.log.count("write") == 431


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_fault_at_any_call_keeps_one_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "m"
    outcomes = []
    for at in range(100):
        path.write_bytes(OLD)
        error = None
        with faulty_os(monkeypatch, fault=code, at=at) as fake:
            try:
                replace_file(str(path), NEW)
            except CheckpointWriteError as caught:
                error = caught
        if len(fake.log) <= at:
            break
        assert os.listdir(tmp_path) == ["m"]
        replaced = path.read_bytes() == NEW_CONTENT
        assert replaced or path.read_bytes() == OLD
        outcomes.append((fake.log[at], "raised" if error else "done", "new" if replaced else "old"))
        if error:
            assert (error.errno, error.filename) == (code, str(path))
            assert ("untouched" in str(error)) != replaced
    assert outcomes == [
        ("open", "raised", "old"),
        ("stat", "raised", "old"),
        ("listdir", "raised", "old"),
        ("open", "raised", "old"),
        ("write", "raised", "old"),
        ("write", "raised", "old"),
        ("write", "raised", "old"),
        ("fsync", "raised", "old"),
        ("replace", "raised", "old"),
        ("close", "done", "new"),
        ("fsync", "raised", "new"),
        ("close", "done", "new"),
    ]


def test_a_crash_at_any_call_keeps_one_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m"
    contents = []
    for at in range(100):
        path.write_bytes(OLD)
        with faulty_os(monkeypatch, fault=Crash, at=at) as fake, contextlib.suppress(Crash):
            replace_file(str(path), NEW)
        if len(fake.log) <= at:
            break
        contents.append(path.read_bytes())
        replace_file(str(path), [OLD])
        assert os.listdir(tmp_path) == ["m"], "the next save removes the orphan"
    assert contents == [OLD] * 9 + [NEW_CONTENT] * 3


def test_interrupted_by_the_keyboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "m").write_bytes(OLD)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", interrupt)
        replace_file(str(tmp_path / "m"), NEW)
    assert (tmp_path / "m").read_bytes() == OLD
    assert os.listdir(tmp_path) == ["m"]


def test_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "m")
    with (
        faulty_os(monkeypatch, fault=errno.ENOSPC, at=4),
        pytest.raises(CheckpointWriteError) as caught,
    ):
        write_tensors(path, {}, {})
    assert str(caught.value) == (
        "[Errno 28] replace_file: path: expected to write 104 bytes, got 'No space left on "
        f"device'; the previous file, if any, is untouched: {path!r}"
    )
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with (
        faulty_os(monkeypatch, fault=errno.EIO, at=8),
        pytest.raises(CheckpointWriteError) as caught,
    ):
        replace_file(path, [b"x"])
    assert str(caught.value) == (
        "[Errno 5] replace_file: path: expected to sync its directory, got 'Input/output error'; "
        f"the new file is in place but may not survive a power cut: save again: {path!r}"
    )
    with pytest.raises(CheckpointWriteError) as caught:
        replace_file(str(tmp_path / "absent" / "m"), [b"x"])
    assert caught.value.errno == errno.ENOENT


def test_directories_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_os(monkeypatch, fault=errno.EINVAL, at=8) as fake:
        replace_file(str(tmp_path / "m"), [b"x"])
    assert fake.log[8] == "fsync"
    assert (tmp_path / "m").read_bytes() == b"x"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_mode_follows_umask(tmp_path: Path, mask: int) -> None:
    previous = os.umask(mask)
    try:
        replace_file(str(tmp_path / "m"), NEW)
    finally:
        os.umask(previous)
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o666 & ~mask


def test_links_and_special_files_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(OLD)
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "dangling").symlink_to("absent")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    before = sorted(os.listdir(tmp_path))
    for name, code, message in [
        ("link", errno.ELOOP, "a symbolic link at path: name its target or remove the link"),
        ("dangling", errno.ELOOP, "a symbolic link at path"),
        ("directory", errno.EINVAL, "no regular file at path but d"),
        ("fifo", errno.EINVAL, "no regular file at path but p"),
    ]:
        with pytest.raises(CheckpointWriteError) as caught:
            replace_file(str(tmp_path / name), NEW)
        assert caught.value.errno == code
        assert message in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before
    assert target.read_bytes() == OLD


def test_a_hard_link_keeps_the_old_content(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(OLD)
    os.link(tmp_path / "m", tmp_path / "backup")
    replace_file(str(tmp_path / "m"), NEW)
    assert (tmp_path / "backup").read_bytes() == OLD


def test_only_own_unlocked_orphans_are_removed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(OLD)
    (tmp_path / ".m.link.tmp").symlink_to("victim")
    for name in (".m.orphan.tmp", ".m.locked.tmp", ".other.1.tmp", "m.1.tmp", ".m.note"):
        (tmp_path / name).write_bytes(b"")
    with (tmp_path / ".m.locked.tmp").open("wb") as saving:
        fcntl.flock(saving, fcntl.LOCK_EX)
        replace_file(str(tmp_path / "m"), NEW)
    kept = [".m.link.tmp", ".m.locked.tmp", ".m.note", ".other.1.tmp", "m", "m.1.tmp", "victim"]
    assert sorted(os.listdir(tmp_path)) == kept


def test_two_savers_of_one_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One save within another: neither takes the other's temporary file for an orphan."""

    def save_between(fd: int) -> None:
        monkeypatch.undo()
        replace_file(str(tmp_path / "m"), [b"inner"])
        assert (tmp_path / "m").read_bytes() == b"inner"
        os.fsync(fd)

    monkeypatch.setattr(os, "fsync", save_between)
    replace_file(str(tmp_path / "m"), [b"outer"])
    assert (tmp_path / "m").read_bytes() == b"outer"
    assert os.listdir(tmp_path) == ["m"]


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    (tmp_path / ".m.maybe_in_use.tmp").write_bytes(b"")
    flags = {name: getattr(fcntl, name) for name in ("LOCK_EX", "LOCK_NB")}
    monkeypatch.setattr(durable_file, "fcntl", SimpleNamespace(flock=flock, **flags))
    replace_file(str(tmp_path / "m"), NEW)
    assert (tmp_path / "m").read_bytes() == NEW_CONTENT
    assert sorted(os.listdir(tmp_path)) == [".m.maybe_in_use.tmp", "m"]


SAVE_FOR_EVER = """
import itertools, sys
import numpy as np
from backprop.checkpoint import write_tensors
for step in itertools.count():
    write_tensors(sys.argv[1], {f"w{i}": np.full(2**18, step) for i in range(8)}, {})
    print(step, flush=True)
"""


@pytest.mark.long
def test_killed_while_saving(tmp_path: Path) -> None:
    path = tmp_path / "m"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    orphans = 0
    for trial in range(20):
        command = [sys.executable, "-c", SAVE_FOR_EVER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(random.Random(trial).uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        tensors, _ = read_tensors(path, require_checksums=True)
        assert len({int(value) for array in tensors.values() for value in np.unique(array)}) == 1
        orphans += len(os.listdir(tmp_path)) - 1
    assert orphans > 0, "no kill came within a save: the trial proves nothing"
    write_tensors(path, {}, {})
    assert os.listdir(tmp_path) == ["m"]


def test_file_size_limit(tmp_path: Path) -> None:
    """A real refusal by the system, in the middle of the data."""
    program = f"""
import resource, sys
import numpy as np
from backprop.checkpoint import write_tensors
write_tensors({str(tmp_path / "m")!r}, {{"w": np.zeros(10)}}, {{}})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_tensors({str(tmp_path / "m")!r}, {{"w": np.zeros(1000)}}, {{}})
except OSError as error:
    print(type(error).__name__, error.errno)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert result.stdout == f"CheckpointWriteError {errno.EFBIG}\n", result.stderr
    assert read_tensors(tmp_path / "m")[0]["w"].tolist() == [0.0] * 10
    assert os.listdir(tmp_path) == ["m"]


def test_a_file_in_the_place_of_the_temporary_one_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if another process, which holds its lock, had drawn the same name."""
    monkeypatch.setattr(os, "urandom", bytes)
    other = tmp_path / f".m.{bytes(8).hex()}.tmp"
    with other.open("wb") as file:
        file.write(b"theirs")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointWriteError) as caught:
            replace_file(str(tmp_path / "m"), NEW)
        assert caught.value.errno == errno.EEXIST
        assert other.read_bytes() == b"theirs" and not (tmp_path / "m").exists()
