"""From a .cu file to machine code for a GPU: NVRTC, called through ctypes.

A unit is one .cu and one `variant.cuh`: the text that gives it its dtype and its formulas. Headers
are handed over in memory; no compiler, no CUDA header and no GPU are needed. The cubin is kept in a
private cache folder under a hash of everything it was made from.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from backprop_kernels import machine_code_cache
from backprop_kernels.errors import DeviceUnavailableError, KernelCompileError

FOLDER = Path(__file__).parent
OPTIONS = ("-std=c++17", "-default-device")
# For the tests: a kernel that spills registers, or indexes an array it should not, is an error. A
# user's compiler may differ by a register, which must not end a training.
STRICT = (
    *OPTIONS, "--ptxas-options=-warn-spills", "--ptxas-options=-warn-lmem-usage",
    "--ptxas-options=-Werror",
)  # fmt: skip
INSTALL = 'pip install "fused-backprop[cuda13]" (or [cuda12] for a CUDA 12 driver)'

_lock = threading.Lock()


class Unit(NamedTuple):
    """One .cu file of this folder (or a path), and the `variant.cuh` that it includes first."""

    file: str
    variant: str


class Compiled(NamedTuple):
    """What NVRTC makes of a unit. The PTX tells the sizes of the parameters."""

    cubin: bytes
    ptx: str
    log: str


def text(file: str) -> str:
    """The text of one .cu."""
    return (FOLDER / file).read_text(encoding="utf-8")


@cache
def headers() -> dict[str, str]:
    """Every header a .cu may include, by name."""
    return {p.name: p.read_text(encoding="utf-8") for p in sorted(FOLDER.glob("include/*.cuh"))}


def cubin(unit: Unit, arch: str) -> bytes:
    """Machine code of `unit` for "sm_90" and the like; from the cache where it is there.

    A GPU newer than NVRTC gets PTX for the newest architecture that NVRTC knows, which the driver
    translates.
    """
    arch = _known(arch)
    digest = machine_code_cache.DIGEST()
    sources = {unit.file: text(unit.file), **headers(), "variant.cuh": unit.variant}
    parts = (arch, nvrtc_version(), *OPTIONS, *(f"{k}\0{v}" for k, v in sources.items()))
    for part in parts:
        digest.update(part.encode() + b"\0")
    name = f"{Path(unit.file).stem}_{arch}_{digest.hexdigest()[:32]}"

    def make() -> bytes:
        compiled = compile_unit(unit, arch)
        return compiled.cubin if arch.startswith("sm_") else compiled.ptx.encode() + b"\0"

    return machine_code_cache.kept("cuda", name, make)


def compile_unit(unit: Unit, arch: str, options: Sequence[str] = OPTIONS) -> Compiled:
    """Compile now, without the cache. Raises KernelCompileError with NVRTC's log."""
    nvrtc = _nvrtc()
    included = {**headers(), "variant.cuh": unit.variant}
    with _lock:  # NVRTC is thread-safe by its documentation; first use of each program need not be
        program = ctypes.c_void_p()
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), text(unit.file).encode(), unit.file.encode(),
            len(included), _strings(included.values()), _strings(included),
        )  # fmt: skip
        try:
            flags = (f"-arch={arch}", *options)
            failed = nvrtc.nvrtcCompileProgram(program, len(flags), _strings(flags))
            log = _result(nvrtc, "ProgramLog", program).rstrip(b"\0").decode(errors="replace")
            if failed:
                raise KernelCompileError(
                    f"{unit.file} for {arch}: {nvrtc.nvrtcGetErrorString(failed).decode()}\n"
                    f"options: {' '.join(flags)}\n{log}\nvariant.cuh:\n{unit.variant}"
                )
            code = _result(nvrtc, "CUBIN", program) if arch.startswith("sm_") else b""
            ptx = _result(nvrtc, "PTX", program).rstrip(b"\0").decode()
            return Compiled(code, ptx, log)
        finally:
            nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@cache
def nvrtc_version() -> str:
    """ "13.4" and the like."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def _known(arch: str) -> str:
    """`arch`, or the newest one below it that NVRTC compiles to, as PTX."""
    supported = _architectures()
    number = int(arch.removeprefix("sm_").rstrip("a"))
    if number in supported:
        return arch
    older = [a for a in supported if a < number]
    if not older:
        raise DeviceUnavailableError(
            f"device: expected a GPU of architecture sm_{min(supported)} or newer for NVRTC "
            f"{nvrtc_version()}, got {arch}; install an older CUDA toolkit (extra cuda12)"
        )
    return f"compute_{max(older)}"


@cache
def _architectures() -> tuple[int, ...]:
    count = ctypes.c_int()
    _nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    _nvrtc().nvrtcGetSupportedArchs(numbers)
    return tuple(numbers)


@cache
def _nvrtc() -> Any:
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        path = load_nvidia_dynamic_lib("nvrtc").abs_path
    except Exception as problem:  # pathfinder has an error class of its own
        raise DeviceUnavailableError(
            f"device: NVRTC, which compiles the CUDA kernels, was not found ({problem}); {INSTALL}"
        ) from problem
    library = ctypes.CDLL(path)
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _result(nvrtc: Any, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    if getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)):
        return b""
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw  # whole: CuPy's own binding drops the last byte of a cubin


def _strings(texts: Any) -> Any:
    encoded = [t.encode() for t in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)
