"""What the benchmarks share: fair timing, and a line of CSV that says where it was measured."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

from backprop_kernels.cpu.threads import available_cpus


def interleaved(
    contenders: dict[str, Callable[[], object]], seconds: float = 3.0, rounds: int = 10
) -> dict[str, tuple[float, float]]:
    """(median, best) seconds of each contender; they take turns, so a busy machine slows all.

    A turn is many calls in a row, the first quarter of them not counted: each library's threads
    then wait for their own work and not for the other's.
    """
    once: dict[str, float] = {}
    for name, call in contenders.items():
        call()
        started = time.perf_counter()
        call()
        once[name] = time.perf_counter() - started
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            calls = max(3, int(seconds / rounds / len(contenders) / once[name]))
            for i in range(calls + calls // 4):
                started = time.perf_counter()
                call()
                if i >= calls // 4:
                    times[name].append(time.perf_counter() - started)
    return {name: (median(t), min(t)) for name, t in times.items()}


def machine(*yardsticks: str) -> dict[str, str]:
    """Where and with what this was measured; `yardsticks` are the packages compared with."""
    packages = ("numpy", "numba", *yardsticks)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": _cpu_model(),
        "cpus": str(available_cpus()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "commit": commit.stdout.strip(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def append(results: Path, row: dict[str, str]) -> None:
    """Add one line to the results, and the header where there is none."""
    results.parent.mkdir(exist_ok=True)
    new = not results.exists()
    with results.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
