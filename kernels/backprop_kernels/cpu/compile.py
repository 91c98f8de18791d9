"""From a Python function to machine code with a C entry point, compiled once per machine.

Numba types and optimises the function; its LLVM text is assembled here into an object file, kept
in a private folder (`machine_code_cache.py`) and loaded by LLVM directly. A later process therefore
never runs Numba. Where much is missing, a second process compiles as well.

The folder's name is a hash of the package's sources, the versions of Numba and LLVM and the CPU's
name and features, so an edit, an upgrade or another machine can never meet stale code.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import llvmlite
import llvmlite.binding as llvm

from backprop_kernels import machine_code_cache

if TYPE_CHECKING:
    from subprocess import Popen

Make = Callable[..., Callable[..., Any]]
# Numba's own C convention: where to put the result, where to put an exception, the arguments.
_ENTRY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 5)

WORTH_TWO = 4  # codes: to start another process and import Numba takes as long as a few small ones
COMPILE_LISTED = """
import json, sys
sys.path, listed = json.loads(sys.argv[1])
from backprop_kernels.cpu.compile import compile_listed
compile_listed(listed)
"""

_lock = threading.RLock()  # LLVM and Numba compile one thing at a time
_engines: list[Any] = []  # keep the code alive


class Code:
    """The machine code of `make(*key)`, for int64 parameters: a pointer, then integers.

    `make`, a function of a module, returns the Python function; it and `key` name the code. It is
    found or compiled when its address is first asked for.
    """

    def __init__(self, make: Make, parameters: int, key: tuple[str | int, ...]) -> None:
        self.make, self.parameters, self.key = make, parameters, key
        module, maker = make.__module__.rpartition(".")[2], make.__name__.strip("_")
        self.name = "_".join([module, maker, *map(str, key)])
        self._address = 0

    def address(self) -> int:
        if not self._address:
            with _lock:
                if not self._address:
                    self._address = _load(self.name, self.compiled())
        return self._address

    def is_missing(self) -> bool:
        """Whether it has yet to be compiled on this machine."""
        return not self._address and machine_code_cache.found(*self._file()) is None

    def compiled(self) -> bytes:
        """The object file: from the cache, or made now and kept there."""
        return machine_code_cache.kept(*self._file(), self._compile)

    def _file(self) -> tuple[str, str]:
        return fingerprint(), f"{self.name}.o"

    def _compile(self) -> bytes:
        text = llvm_text(self.name, self.make(*self.key), self.parameters)
        return bytes(_target_machine().emit_object(llvm.parse_assembly(text)))


@lru_cache(maxsize=None, typed=True)
def code(make: Make, parameters: int, *key: str | int) -> Code:
    """The one `Code` of that name in this process."""
    return Code(make, parameters, key)


def compile_together(codes: Iterable[Code], core_to_spare: Callable[[], bool]) -> None:
    """Compile what is missing, where that is much: here from the first on, in another process from
    the last on. What that one has begun is waited for; should it fail, only time is lost.
    """
    missing = [each for each in dict.fromkeys(codes) if each.is_missing()]
    # In a frozen program, or one that embeds Python, `sys.executable` is that program.
    python = Path(sys.executable or "").name.startswith("python") and not hasattr(sys, "frozen")
    place = cache_folder()
    if len(missing) < WORTH_TWO or not python or place is None or not core_to_spare():
        return
    # What the other has begun. Appended, whatever place this process reads at.
    with suppress(OSError), tempfile.TemporaryFile("a+", dir=place, encoding="utf-8") as begun:
        other = _compile_elsewhere(missing[:0:-1], begun)
        try:
            for each in missing:
                begun.seek(0)
                if each.name in begun.read().split():
                    other.wait()
                each.address()
        finally:
            other.kill()
            other.wait()


def _compile_elsewhere(codes: Sequence[Code], begun: IO[str]) -> Popen[bytes]:
    """A process that compiles them in this order."""
    import json
    from subprocess import DEVNULL, Popen

    listed = [(c.make.__module__, c.make.__name__, c.parameters, c.key) for c in codes]
    command = [sys.executable, "-c", COMPILE_LISTED, json.dumps([sys.path, listed])]
    return Popen(command, stdin=DEVNULL, stdout=begun, stderr=DEVNULL)


def compile_listed(listed: Iterable[tuple[str, str, int, list[str | int]]]) -> None:
    """What another process has listed; says what it begins."""
    for module, maker, parameters, key in listed:
        each = code(getattr(import_module(module), maker), parameters, *key)
        print(each.name, flush=True)
        each.compiled()


@cache
def call(entry: int) -> Callable[..., int]:
    """`entry` as a Python callable on integers. It runs without the GIL."""
    return _ENTRY(entry)


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
