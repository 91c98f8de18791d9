"""g++ in NVRTC's place: from a unit of the CUDA backend to a shared object that runs on a CPU."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from backprop_kernels import machine_code_cache
from backprop_kernels.cuda import compile as nvrtc
from backprop_kernels.cuda.compile import Unit

HERE = Path(__file__).parent
OPTIONS = (
    "-std=c++17", "-O2", "-ftree-vectorize", "-funroll-loops", "-march=native", "-fPIC", "-shared",
    "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function",
    "-Wno-unused-parameter", "-Wno-strict-aliasing",
)  # fmt: skip
RUNTIME = ("runtime.cpp", "async.cpp")
# With threads, every CUDA thread is a std::thread and ThreadSanitizer watches.
THREADS = ("-DHOST_THREADS", "-fsanitize=thread", "-g")


class DoesNotCompile(RuntimeError):
    """The compiler's command and what it said."""


def problem() -> str:
    """Why kernels cannot run on this CPU; empty where they can."""
    if shutil.which("g++") is None:
        return "needs g++, which is not installed"
    if platform.machine() != "x86_64" or os.name != "posix":
        return f"switches fibers on x86-64 POSIX only, not on {platform.machine()}"
    return ""


def unit(of: Unit, threads: bool = False) -> bytes:
    """The shared object of one unit; entries are `run_NAME` and `size_NAME`."""
    text = nvrtc.text(of.file)
    program = text + "\n"
    for entry in re.finditer(r"__global__[^;{]*?(\w+)\s*\([^()]*\)\s*\{", text):
        found = re.search(r"__cluster_dims__\(([^,()]+)", entry[0])
        cluster, resident = (found[1] if found else "1"), "false"
        if "BY_TILES" in entry[0]:  # of a product: its header says how
            cluster, resident = "CLUSTER", "RESIDENT"
        program += f"HOST_KERNEL({entry[1]}, {cluster}, {resident})\n"
    file = Path(of.file).name
    headers = {**nvrtc.headers(), "variant.cuh": of.variant}
    return _compiled({file: program, **headers}, (file,), threads)


@cache
def runtime(threads: bool = False) -> bytes:
    """The execution model, once for all units."""
    sources = {name: (HERE / name).read_text() for name in RUNTIME}
    return _compiled(sources, RUNTIME, threads)


def _compiled(sources: dict[str, str], units: tuple[str, ...], threads: bool) -> bytes:
    """The shared object of `units`; `sources` holds them and what they include."""
    sources = {**sources, **{p.name: p.read_text() for p in HERE.glob("*.hpp")}}
    options = (*OPTIONS, *(THREADS if threads else ()))
    digest = hashlib.sha256()
    for part in (_compiler(), *options, *units, *(f"{k}\0{v}" for k, v in sorted(sources.items()))):
        digest.update(part.encode() + b"\0")
    name = f"{digest.hexdigest()[:32]}.so"
    return machine_code_cache.kept("cuda-host", name, lambda: _gxx(sources, units, options))


def _gxx(sources: dict[str, str], units: tuple[str, ...], options: tuple[str, ...]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in sources.items():
            Path(folder, name).write_text(text)
        command = ["g++", *options, "-include", "host.hpp", "-x", "c++", *units, "-o", "out.so"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DoesNotCompile(f"{' '.join(command)}\n{done.stderr[:4000]}")
        return Path(folder, "out.so").read_bytes()


@cache
def _compiler() -> str:
    """Version and CPU: -march=native code of one machine may not run on another."""
    shown = subprocess.run(
        ["g++", "-march=native", "-Q", "--help=target"], capture_output=True, text=True, check=True
    )
    return subprocess.check_output(["g++", "--version"], text=True) + shown.stdout
