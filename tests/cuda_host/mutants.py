"""What a planted bug is, and how it is planted: data of test_cuda_mutants.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from backprop_kernels.arrays import Array
from backprop_kernels.cuda import compile as nvrtc
from backprop_kernels.cuda import launch

from tests.cuda_host import build, cupy_stand_in

F32 = np.dtype(np.float32)
BARRIER = "__syncthreads();"


def whole(*shapes: tuple[int, ...]) -> list[Array]:
    """Whole numbers, whose products and sums are exact."""
    rng = np.random.default_rng(0)
    return [rng.integers(-4, 5, shape).astype(F32) for shape in shapes]


def normal(*shapes: tuple[int, ...]) -> list[Array]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(F32) for shape in shapes]


class Mutant(NamedTuple):
    """`old` becomes `new`, once, in a file of the CUDA backend; `check` must fail then."""

    file: str
    old: str
    new: str
    check: Callable[[], None]


def one_of_each(mutants: list[Mutant], each: int = 2) -> list[Any]:
    """All of them, those beyond the first few of a file marked as long."""
    seen: dict[str, int] = {}
    parameters = []
    for number, mutant in enumerate(mutants):
        seen[mutant.file] = seen.get(mutant.file, 0) + 1
        marks = [pytest.mark.long] if seen[mutant.file] > each else []
        parameters.append(pytest.param(mutant, id=f"{mutant.file}-{number}", marks=marks))
    return parameters


def each_check(mutants: list[Mutant]) -> list[Any]:
    """Their checks, marked as long where all their mutants are."""
    short = {p.values[0].check for p in one_of_each(mutants) if not p.marks}
    return [
        pytest.param(
            check, id=check.__name__, marks=[] if check in short else [pytest.mark.long]
        )
        for check in dict.fromkeys(m.check for m in mutants)
    ]  # fmt: skip


def planted(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    """Let the sources have this bug."""
    text, headers = nvrtc.text, nvrtc.headers()
    found = headers.get(mutant.file) or text(mutant.file)
    assert found.count(mutant.old) == 1, f"{mutant.file}: the source has changed: {mutant.old!r}"
    bad = found.replace(mutant.old, mutant.new)
    if mutant.file in headers:
        monkeypatch.setattr(nvrtc, "headers", lambda: {**headers, mutant.file: bad})
    else:
        monkeypatch.setattr(nvrtc, "text", lambda f: bad if f == mutant.file else text(f))


def forget() -> None:
    """What was compiled from other sources."""
    launch._module.cache_clear()
    launch._function.cache_clear()


def noticed(monkeypatch: pytest.MonkeyPatch, check: Callable[[], None]) -> str:
    """What `check` says under the first schedule that shows something; empty if none does."""
    for schedule in range(cupy_stand_in.SCHEDULES):
        monkeypatch.setattr(cupy_stand_in.Function, "_turn", itertools.repeat(schedule))
        try:
            check()
        except build.DoesNotCompile:
            raise
        except (Exception, pytest.fail.Exception) as problem:
            return f"{type(problem).__name__}: {problem}"
    return ""
