"""What the benchmarks share: fair timing, and a line of CSV that says where it was measured.

A benchmark of one operator is a list of cases; `measure_operator` does the rest.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from backprop_kernels import cpu, reference
from backprop_kernels.arrays import Array
from backprop_kernels.cpu import peaks
from backprop_kernels.cpu.threads import available_cpus, set_num_threads
from threadpoolctl import threadpool_limits

RESULTS = Path(__file__).parent / "results"
# batch, in_features, out_features: the layers of bench_step.py's networks.
LAYERS = [
    (64, 64, 64), (256, 256, 256), (256, 784, 1024), (1024, 784, 1024), (1024, 1024, 1024),
    (1024, 2048, 2048), (4096, 64, 128), (4096, 128, 1), (1024, 155, 256),
]  # fmt: skip
# Seconds: OpenBLAS's threads spin for 2²⁶ cycles after their last product, on cores that the next
# contender needs.
SETTLE = 0.1
NORMS = [(256, 256), (1024, 1024), (4096, 128), (4096, 2048)]  # batch, features


@dataclass(frozen=True)
class Case:
    """An operator at one shape: ours and NumPy's way, and what the work is at the least."""

    shape: str
    ours: Callable[[], object]
    numpy: Callable[[], object]
    flops: int  # of matrix products; 0 where there are none
    arrays: tuple[Array | None, ...]  # read and written, once each


def draw(*shape: int, dtype: str, seed: int = 0) -> Array:
    """Random numbers; an array of a shape is another one for each seed."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def captured(operator: Callable[[], object]) -> Callable[[], object]:
    """The operator as a step runs it: compiled, bound to its arrays, without its checks."""
    return cpu.capture(operator)


def norm_cases(
    dtype: str, forward: Callable[..., Any], backward: Callable[..., Any], per_row: bool
) -> list[Case]:
    """A norm at every shape: forward(backend, X, gamma, beta, out=…), and backward likewise.

    `per_row`: whether a mean is one row's, or one feature's.
    """
    cases = []
    for batch, features in NORMS:
        X, dY, saved = (draw(batch, features, dtype=dtype, seed=seed) for seed in range(3))
        gamma, beta = draw(features, dtype=dtype), draw(features, dtype=dtype, seed=1)
        mean = np.empty(batch if per_row else features, dtype)
        rstd = np.ones_like(mean)
        out = np.empty_like(X), None, mean, rstd
        gradients = np.empty_like(X), np.empty_like(gamma), np.empty_like(gamma)
        given = dY, X, gamma, mean, rstd, saved
        ways = {
            "forward": (partial(forward, X=X, gamma=gamma, beta=beta), out, (X, gamma, beta)),
            "backward": (partial(backward, given=given), gradients, given),
        }
        for name, (way, written, read) in ways.items():
            cases.append(
                Case(
                    f"{name} {batch} x {features}",
                    captured(partial(way, cpu, out=written)),
                    partial(way, reference, out=None),
                    0,
                    (*read, *written),
                )
            )
    return cases


def measure_operator(
    name: str, description: str | None, cases: Callable[[str], list[Case]]
) -> None:
    """The command line of `bench_<name>.py`: measure every case, print, append."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--seconds", type=float, default=1.0, help="per case")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    options = parser.parse_args()
    set_num_threads(options.threads)
    flops, bandwidth = peaks.flops(options.dtype), peaks.bandwidth()
    print(
        f"{name}, {options.dtype}, {options.threads} thread(s); peaks here: "
        f"{flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s"
    )
    print(
        f"{'shape':<28}{'us':>10}{'GFLOP/s':>10}{'of peak':>9}{'GB/s':>8}{'of peak':>9}"
        f"{'NumPy ÷ ours':>14}"
    )
    for case in cases(options.dtype):
        with threadpool_limits(options.threads):
            both = interleaved({"ours": case.ours, "numpy": case.numpy}, options.seconds, rounds=5)
        seconds, bytes = both["ours"][0], sum(a.nbytes for a in case.arrays if a is not None)
        rate = case.flops / seconds
        product = f"{rate / 1e9:10.1f}{rate / flops:9.0%}" if case.flops else " " * 19
        print(
            f"{case.shape:<28}{seconds * 1e6:10.1f}{product}{bytes / seconds / 1e9:8.1f}"
            f"{bytes / seconds / bandwidth:9.0%}{both['numpy'][0] / seconds:14.1f}",
            flush=True,
        )
        row = {"shape": case.shape, "dtype": options.dtype, "threads": str(options.threads)}
        row["flops"], row["bytes"] = str(case.flops), str(bytes)
        row["peak_gflops"], row["peak_gbs"] = f"{flops / 1e9:.1f}", f"{bandwidth / 1e9:.1f}"
        for contender, (middle, best) in both.items():
            row[f"{contender}_median_us"] = f"{middle * 1e6:.2f}"
            row[f"{contender}_best_us"] = f"{best * 1e6:.2f}"
        append(RESULTS / f"{name}.csv", {**row, **machine()})


def interleaved(
    contenders: dict[str, Callable[[], object]], seconds: float = 3.0, rounds: int = 10
) -> dict[str, tuple[float, float]]:
    """(median, best) seconds of each contender; they take turns, so a busy machine slows all.

    A turn is several calls in a row, after a pause and the first, or a quarter as many, not
    counted: each library's threads then wait for their own work and not for the other's.
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
            time.sleep(SETTLE)
            calls = max(3, int(seconds / rounds / len(contenders) / once[name]))
            before = max(1, calls // 4)
            for i in range(before + calls):
                started = time.perf_counter()
                call()
                if i >= before:
                    times[name].append(time.perf_counter() - started)
    return {name: (median(t), min(t)) for name, t in times.items()}


def in_turns(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of contenders that take long: one call each, again and again."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(rounds):
        for name, call in contenders.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: median(t) for name, t in times.items()}


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
    """Add one line to the results; columns that are new are empty in the lines before."""
    results.parent.mkdir(exist_ok=True)
    rows: list[dict[str, str]] = []
    if results.exists():
        with results.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    columns = list(dict.fromkeys(name for line in (*rows, row) for name in line))
    with results.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])
