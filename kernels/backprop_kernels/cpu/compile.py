"""From a Python function to machine code with a C entry point, compiled once per machine.

Numba types and optimises the function; its LLVM text is assembled here into an object file, kept
in a private folder (`machine_code_cache.py`) and loaded by LLVM directly. A later process therefore
never runs Numba.

The folder's name is a hash of the package's sources, the versions of Numba and LLVM and the CPU's
name and features, so an edit, an upgrade or another machine can never meet stale code.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from backprop_kernels import machine_code_cache

Make = Callable[..., Callable[..., Any]]
# Numba's own C convention: where to put the result, where to put an exception, the arguments.
_ENTRY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 5)

_lock = threading.RLock()  # LLVM and Numba compile one thing at a time
_addresses: dict[str, int] = {}
_engines: list[Any] = []  # keep the code alive


def address(make: Make, parameters: int, *key: Any) -> int:
    """The address of `make(*key)`, compiled for int64 parameters: a pointer, then integers.

    `make` returns the Python function; it and `key` name the machine code.
    """
    name = "_".join([make.__module__.rpartition(".")[2], make.__name__.strip("_"), *map(str, key)])
    if name not in _addresses:
        with _lock:
            if name not in _addresses:
                code = machine_code_cache.kept(
                    fingerprint(), f"{name}.o", lambda: _compile(name, make(*key), parameters)
                )
                _addresses[name] = _load(name, code)
    return _addresses[name]


@cache
def call(entry: int) -> Callable[..., int]:
    """`entry` as a Python callable on integers. It runs without the GIL."""
    return _ENTRY(entry)


def _compile(name: str, function: Callable[..., Any], parameters: int) -> bytes:
    module = llvm.parse_assembly(llvm_text(name, function, parameters))
    return bytes(_target_machine().emit_object(module))


def llvm_text(name: str, function: Callable[..., Any], parameters: int) -> str:
    """The LLVM module that Numba makes of `function`, under `name`."""
    from numba import types
    from numba.core import compiler
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.registry import cpu_target

    # No exceptions and no reference counts: the code must stand without Numba's runtime.
    flags = compiler.Flags()
    flags.error_model = "numpy"
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    arguments = [types.CPointer(types.int64), *[types.int64] * (parameters - 1)]
    with global_compiler_lock:
        library = _text_generator().create_library(name)
        compiled = compiler.compile_extra(
            cpu_target.typing_context, cpu_target.target_context, function, arguments, types.void,
            flags, {}, library,
        )  # fmt: skip
        library.finalize()
    return str(library.get_llvm_str().replace(compiled.fndesc.llvm_func_name, name))


@cache
def _text_generator() -> Any:
    """What `numba.jit` uses, without the machine code at its end: nobody would run that."""
    from numba.core import codegen

    class TextGenerator(codegen.JITCPUCodegen):  # type: ignore[misc]
        _library_class = codegen.AOTCodeLibrary

        def _add_module(self, module: Any) -> None:
            pass

    return TextGenerator("fused-backprop")


def _load(name: str, code: bytes) -> int:
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address(name))


def _target_machine() -> Any:
    """A new one each time: an engine takes ownership of its own."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=cpu_name(), features=cpu_features(), opt=3, jit=True
    )


@cache
def cpu_name() -> str:
    """LLVM's name of the CPU to compile for: this one, or NUMBA_CPU_NAME."""
    return os.environ.get("NUMBA_CPU_NAME") or str(llvm.get_host_cpu_name())


@cache
def cpu_features() -> str:
    """Its features as LLVM writes them, "+avx2,+fma,-avx512f,…", or NUMBA_CPU_FEATURES."""
    return os.environ.get("NUMBA_CPU_FEATURES") or str(llvm.get_host_cpu_features().flatten())


@cache
def fingerprint() -> str:
    """A hash of everything that machine code depends on."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        numba_version = version("numba")
    except PackageNotFoundError:
        numba_version = "unknown"
    digest = machine_code_cache.DIGEST()
    facts = (numba_version, llvmlite.__version__, cpu_name(), cpu_features())
    import numpy

    for fact in (*facts, llvm.get_process_triple(), numpy.__version__):
        digest.update(fact.encode() + b"\0")
    package = Path(__file__).parent.parent
    for source in sorted([*package.glob("*.py"), *package.glob("cpu/*.py")]):
        digest.update(source.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def cache_folder() -> Path | None:
    """The folder for this fingerprint, private to this user; None where there can be none."""
    return machine_code_cache.folder(fingerprint())


def _after_fork() -> None:
    """A child must not wait for a lock that a thread of its parent held."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
