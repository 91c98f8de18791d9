"""What the parts of run_all.py share: a GPU or its emulator, timing, rows of CSV."""

from __future__ import annotations

import argparse
import csv
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
TURN = 0.02  # seconds of calls between two waits for the device


def options(description: str | None) -> argparse.Namespace:
    """--out and --dry-run, as run_all.py passes them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for CSV")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, in the emulator")
    parser.add_argument("--small", action="store_true", help="small shapes, for the sanitizer")
    return parser.parse_args()


@contextmanager
def device(dry: bool) -> Iterator[Any]:
    """CuPy; in a dry run what the tests put in its place."""
    if dry:
        from tests.cuda_host.backend import installed
    with installed() if dry else nullcontext():
        yield import_module("cupy")


def torch_device(dry: bool) -> tuple[Any, str]:
    """(PyTorch or None, the name of its device)."""
    try:
        torch: Any = import_module("torch")
    except ModuleNotFoundError:
        return None, ""
    if not dry and not torch.cuda.is_available():
        return None, ""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    return torch, "cpu" if dry else "cuda"


class Clock:
    """Times calls that only queue work: many in a row, then one wait for the device."""

    def __init__(self, cupy: Any, torch: Any, dry: bool) -> None:
        self._wait: list[Callable[[], None]] = [cupy.cuda.get_current_stream().synchronize]
        if torch is not None and not dry:
            self._wait.append(torch.cuda.synchronize)

    def wait(self) -> None:
        """Until everything queued is done."""
        for wait in self._wait:
            wait()

    def turn(self, call: Callable[[], object], calls: int) -> float:
        """Seconds per call."""
        self.wait()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        self.wait()
        return (time.perf_counter() - started) / calls

    def interleaved(
        self, contenders: dict[str, Callable[[], object]], seconds: float
    ) -> dict[str, float]:
        """Median seconds of each; they take turns, so that a change of clocks meets all."""
        calls = {}
        for name, call in contenders.items():
            self.turn(call, 3)  # compiles, fills caches
            calls[name] = max(1, int(TURN / max(self.turn(call, 3), 1e-9)))
        times: dict[str, list[float]] = {name: [] for name in contenders}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[name]) < 3:
            for name, call in contenders.items():
                times[name].append(self.turn(call, calls[name]))
        return {name: median(t) for name, t in times.items()}


class Table:
    """A CSV file that holds every row as soon as it is known."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file
        file.unlink(missing_ok=True)

    def add(self, **row: Any) -> None:
        """One row; the first gives the columns. Floats by four digits."""
        texts = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()}
        new = not self.file.exists()
        with self.file.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(texts), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(texts)
        print("  ".join(f"{k} {v}" for k, v in texts.items()), flush=True)


def machine(dry: bool) -> dict[str, str]:
    """Device, driver, versions, commit: what every figure belongs to."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    found = {"commit": commit.stdout.strip() or "unknown", "python": platform.python_version()}
    for package in ("numpy", "cupy-cuda12x", "cupy-cuda13x", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if dry:
        return {"device": "none: a dry run in the emulator", **found}
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(0)
    found = {
        "device": properties["name"].decode(),
        "compute capability": cupy.cuda.Device(0).compute_capability,
        "multiprocessors": str(properties["multiProcessorCount"]),
        "CUDA driver API": str(cupy.cuda.runtime.driverGetVersion()),
        "CUDA runtime": str(cupy.cuda.runtime.runtimeGetVersion()),
        **found,
    }
    if shutil.which("nvidia-smi"):
        query = ["driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem"]
        shown = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader", "-i", "0"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        found |= dict(zip(query, shown.stdout.strip().split(", "), strict=False))
    return found
