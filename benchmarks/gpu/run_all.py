"""Everything there is to learn on a machine with a GPU: `python benchmarks/gpu/run_all.py`.

Needs this repository, NumPy and CuPy; PyTorch for the yardsticks, pytest and SciPy for the test
suite, compute-sanitizer for its own part. A part that lacks what it needs says so. Each part is a
process of its own with a time limit, the most valuable first; what a part has written when its
time is up stays. Results are CSV files and one summary.md in the folder that --out names.

With --dry-run everything runs on tiny shapes in the emulator, where no figure means anything.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from measure import ROOT, machine

HERE = Path(__file__).parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


class Part(NamedTuple):
    """`command` runs for at most `minutes`, unless `lacking()` says what it needs."""

    name: str
    minutes: float
    command: list[str]
    table: str = ""  # the CSV it writes
    lacking: Callable[[], str] = lambda: ""
    dry: bool = True  # whether a dry run has it


def script(name: str, *options: str) -> list[str]:
    return [sys.executable, str(HERE / name), *options]


def suite(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def without(*modules: str) -> Callable[[], str]:
    """What is missing of these modules, in words."""
    return lambda: ", ".join(f"needs {m}" for m in modules if find_spec(m) is None)


def without_sanitizer() -> str:
    return "" if shutil.which("compute-sanitizer") else "needs compute-sanitizer on the PATH"


def parts() -> list[Part]:
    """The most valuable first."""
    return [
        Part("operators agree with the reference", 4, script("check.py"), "check.csv"),
        Part("steps beside bare products and PyTorch", 14, script("bench_step.py"), "step.csv"),
        Part(
            "whole small networks in one kernel", 4, script("bench_mlp_step.py"), "mlp_step.csv"
        ),
        Part(
            "PTX wrappers", 2, suite("-m", "gpu", "tests/kernels/test_ptx.py"), "",
            without("pytest", "scipy"), False,
        ),
        Part("operators by the clock", 8, script("bench_operators.py"), "operators.csv"),
        Part("what was aimed at", 1, script("targets.py"), "targets.csv"),
        Part("every kernel for a product", 4, script("bench_choices.py"), "choices.csv"),
        Part(
            "the test suite", 8, suite("-m", "gpu", "tests"), "",
            without("pytest", "scipy", "mpmath"), False,
        ),
        *(
            Part(
                f"compute-sanitizer {tool}", 2,
                ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1",
                 *script("check.py", "--small")],
                "", without_sanitizer, False,
            )
            for tool in TOOLS
        ),
    ]  # fmt: skip


def main() -> None:
    """Run the parts, keep what they write, sum it up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--minutes", type=float, default=40.0, help="for all parts together")
    parser.add_argument("--only", default="", help="parts whose names hold this text")
    given = parser.parse_args()
    default = Path(tempfile.mkdtemp()) if given.dry_run else HERE.parent / "results" / "gpu"
    out = (given.out or default).resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * given.minutes
    found = machine(given.dry_run)
    outcomes: list[tuple[Part, str]] = []
    for part in parts():
        if given.only not in part.name or (given.dry_run and not part.dry):
            continue
        left = end - time.monotonic()
        if lacking := part.lacking():
            outcome = f"not run: {lacking}"
        elif left < 10:
            outcome = f"not run: the {given.minutes:g} minutes were over"
        else:
            print(f"{part.name} …", flush=True)
            outcome = run(part, out, min(60 * part.minutes, left), given.dry_run)
        print(f"{part.name}: {outcome}", flush=True)
        outcomes.append((part, outcome))
        write_summary(out, found, outcomes)
    raise SystemExit(any(outcome.startswith("failed") for _, outcome in outcomes))


def run(part: Part, out: Path, seconds: float, dry: bool) -> str:
    """Run one part → its outcome in words. Its output goes to a log beside its CSV."""
    own = [a for a in part.command if a.endswith(".py") and str(HERE) in a]
    options = ["--out", str(log_folder(part, out)), *(["--dry-run"] if dry else [])] if own else []
    log = out / f"{part.name.replace(' ', '_')}.log"
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [*part.command, *options], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"cut off after {seconds / 60:.1f} minutes; what it had written is kept"
    took = f"in {time.monotonic() - started:.0f} s"
    return f"done {took}" if status == 0 else f"failed {took} with status {status}, see {log.name}"


def log_folder(part: Part, out: Path) -> Path:
    """Where a part writes its CSV; a second run of the same script must not overwrite the first."""
    return out if part.table else out / "sanitizer"


def write_summary(out: Path, found: dict[str, str], outcomes: list[tuple[Part, str]]) -> None:
    """summary.md: the machine, each part's outcome, its table."""
    lines = ["# GPU results", "", *(f"- {name}: {value}" for name, value in found.items())]
    for part, outcome in outcomes:
        lines += ["", f"## {part.name}", "", outcome]
        file = out / part.table
        if part.table and file.exists():
            with file.open(newline="", encoding="utf-8") as stream:
                rows = list(csv.reader(stream))
            lines += ["", *(f"| {' | '.join(row)} |" for row in rows[:1])]
            lines += [f"|{' --- |' * len(rows[0])}", *(f"| {' | '.join(r)} |" for r in rows[1:])]
    (out / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
