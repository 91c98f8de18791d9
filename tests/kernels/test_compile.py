"""Machine code that is missing is compiled by two processes, or by one where there is no other."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backprop_kernels import machine_code_cache
from backprop_kernels.cpu import epilogue, threads
from backprop_kernels.cpu.compile import Code, cache_folder, compile_together

ACTIVATIONS = ["identity", "relu", "sigmoid", "tanh", "softplus"]


def new_codes() -> list[Code]:
    """Small ones, which this process has not loaded."""
    return [Code(epilogue._forward, 5, ("float64", a, "", False, False)) for a in ACTIVATIONS]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine_code_cache.folder.cache_clear()
    yield tmp_path
    machine_code_cache.folder.cache_clear()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what this process compiles."""
    names: list[str] = []
    compiled = Code._compile

    def noted(self: Code) -> bytes:
        names.append(self.name)
        return compiled(self)

    monkeypatch.setattr(Code, "_compile", noted)
    return names


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true() and time.monotonic() < end:
        time.sleep(0.01)


def pretend_python(folder: Path, does: str) -> str:
    """An interpreter that does something else."""
    script = folder / "python3"
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o755)
    return str(script)


def test_another_process_begins_at_the_end(
    cache: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, compiled = new_codes(), Code._compile
    place = cache_folder()
    assert place is not None

    def late(self: Code) -> bytes:
        wait_until(lambda: all((place / f"{code.name}.o").exists() for code in codes[1:]))
        return compiled(self)

    monkeypatch.setattr(Code, "_compile", late)
    compile_together(codes, lambda: True)
    assert made == [codes[0].name]
    assert not any(code.is_missing() for code in new_codes())
    files = sorted(
        (file for file in cache.rglob("*") if file.is_file()), key=lambda f: f.stat().st_mtime_ns
    )
    assert [f.name for f in files] == ["program_runner.o", *(f"{c.name}.o" for c in codes[::-1])]


def test_what_it_has_begun_is_waited_for(
    cache: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it ends without having made it, so that this process does."""
    codes, said, end = new_codes(), cache / "said", cache / "end"
    does = f"echo {codes[2].name}; touch {said}; while [ ! -e {end} ]; do sleep 0.05; done; exit 1"
    monkeypatch.setattr(sys, "executable", pretend_python(cache, does))
    compiled = Code._compile

    def watched(self: Code) -> bytes:
        if self is codes[1]:
            wait_until(said.exists)
            threading.Timer(0.5, end.touch).start()
        assert self is not codes[2] or end.exists()
        return compiled(self)

    monkeypatch.setattr(Code, "_compile", watched)
    compile_together(codes, lambda: True)
    assert made == [code.name for code in codes]


@pytest.mark.parametrize(
    "other",
    ["fails", "is not there", "is another program", "is a frozen program", "has no core",
     "not worth it"],
)  # fmt: skip
def test_without_another_process(
    cache: Path, made: list[str], monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    codes = new_codes()[: 3 if other == "not worth it" else None]
    spare = other != "has no core"
    started = cache / "started"
    python = pretend_python(cache, f"touch {started}; exit 1")
    if other == "is not there":
        python = str(cache / "python4")
    if other == "is another program":
        python = str(Path(python).rename(cache / "editor"))
    if other == "is a frozen program":
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", python)
    compile_together(codes, lambda: spare)
    assert started.exists() == (other == "fails")
    assert all(code.address() for code in codes)
    assert made == [code.name for code in codes]


def test_a_cache_that_cannot_be_written_starts_no_other(
    made: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine_code_cache, "folder", lambda name: None)
    started = tmp_path / "started"
    monkeypatch.setattr(sys, "executable", pretend_python(tmp_path, f"touch {started}"))
    codes = new_codes()
    compile_together(codes, lambda: True)
    assert all(code.address() for code in codes) and made == [code.name for code in codes]
    assert not started.exists()


@pytest.mark.parametrize(
    ("count", "running", "cores", "spare"),
    [(2, "1/80", 2, True), (2, "2/80", 2, False), (1, "1/80", 8, False), (2, "?", 2, True)],
)
def test_a_core_to_spare(
    monkeypatch: pytest.MonkeyPatch, count: int, running: str, cores: int, spare: bool
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: f"0.1 0.2 0.3 {running} 4711\n")
    monkeypatch.setattr(threads.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(threads, "get_num_threads", lambda: count)
    assert threads.core_to_spare() == spare
