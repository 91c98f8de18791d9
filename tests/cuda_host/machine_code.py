"""Kernels as NVRTC makes them, held to how they are launched: by its log, its PTX, its SASS."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.util import find_spec
from multiprocessing import get_context
from typing import NamedTuple

import pytest
from backprop_kernels.cuda import compile as nvrtc
from backprop_kernels.cuda.compile import STRICT, Unit
from backprop_kernels.cuda.mlp_fit import LEAST_SHARED
from backprop_kernels.cuda.mlp_fit import SHARED as SHARED_OF_GPU
from backprop_kernels.errors import KernelCompileError

from tests.cuda_host.recorder import Asked

NEEDS_NVRTC = pytest.mark.skipif(
    find_spec("cuda") is None or find_spec("cuda.pathfinder") is None,
    reason="needs NVRTC: pip install cuda-pathfinder 'cuda-toolkit[nvrtc,nvdisasm]==13.4.*'",
)

REGISTERS = 65536  # of a multiprocessor: a block that needs more cannot start
# Given out by eights; up to 256 in a block of 64 threads, as many blocks are resident.
REGISTERS_PER_THREAD = 224
SHARED = 48 << 10  # bytes of static shared memory that any GPU gives a block
# Products on tensor cores: a warp's tile fills its registers; 99 KiB is what a block may ask for
# on sm_89 and sm_120.
TENSOR_CORES, ALL_REGISTERS, MOST_SHARED = "tensor_product.cuh", 255, 99 << 10
# Those of Hopper, on sm_90 alone: warpgroups share out the registers that a block gets.
HOPPER, HOPPERS_SHARED = "hopper_product.cuh", 227 << 10
WGMMA = {"HGMMA", "UTMALDG", "UTMASTG", "STSM", "SYNCS", "USETMAXREG"}
OF_TF32 = "using operand = tf32"
WHOLE_NETWORKS = "mlp_step.cu"  # takes all the registers, and of shared memory what the GPU has
# Kernels that add or scale in float64 on purpose, whatever the dtype of their arrays.
FLOAT64 = {
    "gradient_squares", "linear_wgrad_update", "loss", "loss_cross_entropy", "loss_gaussian_nll",
    "loss_shares", "loss_value", "loss_weights", "mlp_step", "optimizer_update", "row_limit",
    "tensor_limit", "tensor_squares", "to_mean", "verdict",
}  # fmt: skip
PRODUCTS = ("linear_", "mlp_step")  # how entries begin that multiply matrices
# What the inner loop of a product must be made of.
MULTIPLIES = {"float": "FFMA", "double": "DFMA"}
PARAMETER = {
    "u64": 8,
    "s64": 8,
    "b64": 8,
    "f64": 8,
    "u32": 4,
    "s32": 4,
    "b32": 4,
    "f32": 4,
    "b8": 1,
}


class Job(NamedTuple):
    """One unit for one architecture. Its SASS takes a second to read, whatever its size."""

    unit: Unit
    entries: dict[str, Asked]
    arch: str
    disassemble: bool


def real(unit: Unit) -> str:
    """The C++ type of the unit's numbers."""
    return "double" if "using real = double" in unit.variant else "float"


def on_tensor_cores(unit: Unit) -> bool:
    return TENSOR_CORES in unit.variant


def budget(unit: Unit, arch: str) -> tuple[int, int]:
    """(registers a thread, bytes of shared memory) that a kernel may take."""
    if unit.file == WHOLE_NETWORKS:
        capability = int(arch.removeprefix("sm_").rstrip("a"))
        return ALL_REGISTERS, SHARED_OF_GPU.get(capability, LEAST_SHARED) << 10
    if HOPPER in unit.variant:
        return REGISTERS_PER_THREAD, HOPPERS_SHARED
    return (ALL_REGISTERS, MOST_SHARED) if on_tensor_cores(unit) else (REGISTERS_PER_THREAD, SHARED)


def expected(unit: Unit) -> set[str]:
    """Instructions that a product must have."""
    if unit.file == WHOLE_NETWORKS:
        return {"HMMA", "LDSM"}
    votes = "using kept = u32" in unit.variant and unit.file == "linear_forward.cu"
    bits = {"VOTE"} if votes else set()
    if HOPPER in unit.variant:
        return WGMMA | bits
    if not on_tensor_cores(unit):
        return {MULTIPLIES[real(unit)]} | bits
    by_element = "using stored = real" in unit.variant and unit.file.startswith("linear_wgrad")
    return {"HMMA", "LDGSTS"} | bits | (set() if by_element else {"LDSM"})


def problems(job: Job) -> list[str]:
    """What is wrong with the unit as it is compiled, in words; nothing where all is well."""
    unit, entries, arch, disassemble = job
    try:
        compiled = nvrtc.compile_unit(unit, arch, (*STRICT, "--ptxas-options=-v"))
    except KernelCompileError as problem:  # a spill or local memory, too
        return [str(problem)]
    made_of = instructions(compiled.cubin) if disassemble else {}
    found = []
    for entry, asked in entries.items():
        sizes = parameter_sizes(compiled.ptx, entry)
        if sizes != asked.sizes:
            found.append(f"{entry}: takes {sizes} bytes, is launched with {asked.sizes}")
        registers, shared, stack = usage(compiled.log, entry)
        if stack:
            found.append(f"{entry}: {stack} bytes of stack")
        most_registers, most_shared = budget(unit, arch)
        if registers > min(most_registers, REGISTERS // max(asked.threads)):
            found.append(f"{entry}: {registers} registers in {max(asked.threads)} threads")
        if shared + asked.shared > most_shared:
            found.append(f"{entry}: {shared} + {asked.shared} bytes of shared memory")
        if real(unit) == "float" and entry not in FLOAT64 and ".f64" in body(compiled.ptx, entry):
            found.append(f"{entry}: float64 in the PTX")
        if disassemble:
            kinds = {code.partition(".")[0] for code in made_of[entry]}
            if kinds & {"LDL", "STL"}:
                found.append(f"{entry}: local memory")
            of_tf32 = {code.endswith(".TF32") for code in made_of[entry] if "GMMA" in code}
            if of_tf32 - {OF_TF32 in unit.variant}:
                found.append(f"{entry}: multiplies other numbers")
            if entry.startswith(PRODUCTS) and not expected(unit) <= kinds:
                found.append(f"{entry}: no {', '.join(sorted(expected(unit) - kinds))}")
            if real(unit) == "float" and entry not in FLOAT64:
                double = [c for c in made_of[entry] if re.match(r"D(ADD|MUL|FMA)\b", c)]
                found += [f"{entry}: {code}" for code in double]
    return [f"{unit.file} ({real(unit)}) for {arch}: {problem}" for problem in found]


def all_problems(jobs: Iterable[Job]) -> list[str]:
    """Of all jobs, in a process for each core: NVRTC compiles one program at a time in each."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        return [problem for found in pool.map(problems, jobs, chunksize=4) for problem in found]


def parameter_sizes(ptx: str, entry: str) -> list[int]:
    """In bytes, from the PTX entry."""
    found = re.search(rf"\.entry {entry}\((.*?)\)\s*[.{{]", ptx, re.S)
    assert found is not None, f"no entry {entry}"
    # .u64 x, .u64 .ptr .align 1 x, .align 64 .b8 x[128]
    pattern = r"\.param (?:\.align \d+ )?\.(\w+)(?: \.ptr(?: \.\w+)* \d+)? \w+(?:\[(\d+)\])?"
    each = re.findall(pattern, found[1])
    return [int(count or 1) * PARAMETER[kind] for kind, count in each]


def body(ptx: str, entry: str) -> str:
    """The PTX of one entry."""
    return ptx.split(f".entry {entry}(")[1].split(".entry ")[0]


def usage(log: str, entry: str) -> tuple[int, int, int]:
    """(registers, bytes of shared memory, bytes of stack) by ptxas."""
    found = re.search(
        rf"properties for {entry}\n.*?(\d+) bytes stack frame.*?\n.*?Used (\d+) registers(.*)", log
    )
    assert found is not None, f"{entry}: not in {log}"
    shared = re.search(r"(\d+) bytes smem", found[3])
    return int(found[2]), int(shared[1]) if shared else 0, int(found[1])


@cache
def _nvdisasm() -> str:
    from cuda.pathfinder import find_nvidia_binary_utility

    path = find_nvidia_binary_utility("nvdisasm")
    assert path is not None, "pip install 'cuda-toolkit[nvdisasm]==13.4.*'"
    return str(path)


def instructions(cubin: bytes) -> dict[str, set[str]]:
    """The instructions of each kernel, with their modifiers: "FFMA", "F2F.F32.F64"."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run(
            [_nvdisasm(), "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {}
    for section in sass.split("\t.section\t.text.")[1:]:
        entry, _, text = section.partition(",")
        text = text.partition("\t.section\t")[0]
        found[entry] = set(
            re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", text, re.M)
        )
    return found
