"""The part of CuPy that the library uses, on a CPU: kernels run in the emulator.

It is as strict as CuPy where that finds mistakes: an array never turns into a NumPy array unasked
nor mixes with one, nothing but launches may happen while a stream captures, and streams work as
late as anyone may see: those of their own where `late_kernels` is false, the one that graphs and
copies between them run on where it is true. The other kind then works at once.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import re
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.cuda_host import build, memory

COMPUTE_CAPABILITY = "90"
SCHEDULES = 4  # launches take turns; see runtime.cpp


class OutOfMemoryError(MemoryError):
    """cupy.cuda.memory.OutOfMemoryError."""


class Pointer:
    """cupy.cuda.MemoryPointer: an address and what keeps it valid."""

    def __init__(self, mem: memory.Memory, ptr: int) -> None:
        self.mem, self.ptr = mem, ptr

    def copy_from_device_async(self, source: Pointer, size: int, stream: Any = None) -> None:
        _null.submit(lambda: ctypes.memmove(self.ptr, source.ptr, size))

    def copy_from_host_async(self, host: int, size: int, stream: Stream) -> None:
        stream.submit(lambda: ctypes.memmove(self.ptr, host, size))

    def copy_to_host_async(self, host: int, size: int, stream: Stream) -> None:
        stream.submit(lambda: ctypes.memmove(host, self.ptr, size))


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array in device memory; `_host` is the emulator's view of it."""

    def __init__(self, host: np.ndarray, mem: memory.Memory) -> None:
        self._host, self._memory = host, mem

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    strides = property(lambda self: self._host.strides)
    flags = property(lambda self: self._host.flags)
    device = property(lambda self: Device(0))
    T = property(lambda self: self._like(self._host.T))
    real = property(lambda self: self)

    @property
    def data(self) -> Pointer:
        return Pointer(self._memory, self._host.__array_interface__["data"][0])

    def _like(self, host: np.ndarray) -> ndarray:
        return ndarray(host, self._memory)

    def __len__(self) -> int:
        return len(self._host)

    def __getitem__(self, place: Any) -> ndarray:
        view = self._host[place]
        if not isinstance(view, np.ndarray):
            view = self._host[(place,) if not isinstance(place, tuple) else place][...]
        if view.size and not np.shares_memory(view, self._host):
            raise NotImplementedError("only views")
        return self._like(view)

    def __setitem__(self, place: Any, value: Any) -> None:
        _eager("assignment")
        if isinstance(value, np.ndarray) and value.ndim:
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        self._host[place] = value._host if isinstance(value, ndarray) else value

    def reshape(self, *shape: Any) -> ndarray:
        view = self._host.reshape(*shape)
        if view.size and not np.shares_memory(view, self._host):
            raise NotImplementedError("only views")
        return self._like(view)

    def view(self, dtype: Any = None) -> ndarray:
        return self._like(self._host.view() if dtype is None else self._host.view(dtype))

    def fill(self, value: Any) -> None:
        _eager("fill")
        self._host.fill(value)

    def copy(self, order: str = "C") -> ndarray:
        _eager("copy")
        return asarray(self._host)

    def get(self, stream: Any = None, order: str = "C", out: Any = None) -> Any:
        _eager("get")
        if out is None:
            return self._host.copy()
        out[...] = self._host
        return out

    def set(self, values: np.ndarray, stream: Any = None) -> None:
        _eager("set")
        if values.dtype != self.dtype or values.shape != self.shape:
            raise ValueError(f"set: {values.dtype} {values.shape} to {self.dtype} {self.shape}")
        self._host[...] = values

    def item(self) -> Any:
        _eager("item")
        return self._host.item()

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        _eager(ufunc.__name__)
        out = options.pop("out", None)
        if any(isinstance(a, np.ndarray) and a.ndim for a in (*inputs, *(out or ()))):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        values = [a._host if isinstance(a, ndarray) else a for a in inputs]
        result = getattr(ufunc, method)(*values, **options)
        if out is None:
            return asarray(result)
        out[0]._host[...] = result
        return out[0]

    def sum(self, *arguments: Any, **options: Any) -> ndarray:
        return asarray(self._host.sum(*arguments, **options))

    def mean(self, *arguments: Any, **options: Any) -> ndarray:
        return asarray(self._host.mean(*arguments, **options))

    def max(self, *arguments: Any, **options: Any) -> ndarray:
        return asarray(self._host.max(*arguments, **options))

    def dot(self, other: ndarray) -> ndarray:
        return asarray(self._host.dot(other._host))

    def any(self) -> ndarray:
        return asarray(self._host.any())

    def all(self) -> ndarray:
        return asarray(self._host.all())

    def tobytes(self) -> bytes:
        return bytes(self.get().tobytes())

    def astype(self, dtype: Any, order: str = "K", copy: bool = True) -> ndarray:
        _eager("astype")
        if not copy and self.dtype == dtype and (order != "C" or self.flags.c_contiguous):
            return self
        return asarray(self._host.astype(dtype))

    def __bool__(self) -> bool:
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"data": (self.data.ptr, False), "shape": self.shape, "version": 3}

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Use `.get()`")


ndarray.__module__ = "cupy"


def empty(shape: Any, dtype: Any = float) -> ndarray:
    _eager("empty")
    dtype = np.dtype(dtype)
    sizes = tuple(np.atleast_1d(np.asarray(shape, np.int64)).tolist()) if shape != () else ()
    count = int(np.prod(sizes, dtype=object)) if sizes else 1
    if count * dtype.itemsize > Device.free():
        raise OutOfMemoryError(f"out of memory allocating {count * dtype.itemsize:,} bytes")
    mem = memory.Memory(count * dtype.itemsize)
    return ndarray(mem.bytes.view(dtype).reshape(sizes), mem)


def empty_zeros(shape: Any, dtype: Any = float) -> ndarray:
    """Zeros that take no memory until they are written, and have no guards: for huge arrays."""
    size = math.prod(np.atleast_1d(shape).tolist())
    unreserved = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    pages = mmap.mmap(-1, max(size * np.dtype(dtype).itemsize, 1), flags=unreserved)
    host = np.frombuffer(pages, dtype, size)
    return ndarray(host.reshape(shape), host)  # type: ignore[arg-type]


@contextmanager
def far() -> Iterator[None]:
    """New arrays are `empty_zeros`, and of each kernel the first and the last block run."""
    ends = ctypes.c_uint64.in_dll(_runtime(), "host_ends")
    own, globals()["empty"] = empty, empty_zeros
    ends.value = 1
    try:
        yield
    finally:
        globals()["empty"] = own
        ends.value = 0


def zeros(shape: Any, dtype: Any = float) -> ndarray:
    array = empty(shape, dtype)
    array._host[...] = 0
    return array


def asarray(values: Any, dtype: Any = None) -> ndarray:
    if isinstance(values, ndarray):
        return values
    values = np.asarray(values, dtype)
    array = empty(values.shape, values.dtype)
    array._host[...] = values
    return array


def asnumpy(array: ndarray) -> np.ndarray:
    return array.get()


class Device:
    """cupy.cuda.Device."""

    memory = 1 << 32  # bytes
    compute_capability = COMPUTE_CAPABILITY
    attributes = {"MultiProcessorCount": 4}  # noqa: RUF012 (CuPy's is a dict, too)

    @classmethod
    def free(cls) -> int:
        return max(cls.memory - memory.used(), 0)

    def __init__(self, number: int = 0) -> None:
        self.id = number

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        for stream in list(_streams):
            stream.synchronize()


_capturing: list[Callable[[], None]] | None = None


def _eager(what: str) -> None:
    """What is no launch comes after all launches, and never while a stream captures."""
    if _capturing is not None:
        raise RuntimeError(f"{what}: operation not permitted when stream is capturing")
    if what != "empty":
        _null.finish(len(_null._queue))


def _nothing() -> None:
    pass


late_kernels = False
_streams: weakref.WeakSet[Stream] = weakref.WeakSet()


class Stream:
    """cupy.cuda.Stream."""

    def __init__(self, non_blocking: bool = False) -> None:
        self._queue: list[Callable[[], object]] = []
        self._done = 0
        _streams.add(self)

    def submit(self, work: Callable[[], object]) -> None:
        self._queue.append(work)
        if late_kernels != (self is _null):
            self.finish(len(self._queue))

    def finish(self, count: int) -> None:
        """Do the first `count` pieces of work of all there ever were."""
        while self._done < count:
            work, self._queue[self._done] = self._queue[self._done], _nothing
            self._done += 1
            work()

    def wait_event(self, event: Event) -> None:
        event.synchronize()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin_capture(self) -> None:
        global _capturing
        _eager("begin_capture")
        _capturing = []

    def end_capture(self) -> Graph:
        global _capturing
        calls, _capturing = _capturing or [], None
        return Graph(calls)

    def synchronize(self) -> None:
        _eager("synchronize")
        self.finish(len(self._queue))


_null = Stream()


class Event:
    """cupy.cuda.Event."""

    def __init__(self) -> None:
        self._stream, self._count = _null, 0

    def record(self, stream: Stream) -> None:
        self._stream, self._count = stream, len(stream._queue)

    def synchronize(self) -> None:
        self._stream.finish(self._count)


class Graph:
    """cupy.cuda.graph.Graph."""

    def __init__(self, calls: list[Callable[[], None]]) -> None:
        self.calls = calls

    def launch(self, stream: Any = None) -> None:
        if _capturing is not None:
            raise RuntimeError("launch: operation not permitted when stream is capturing")
        _null.submit(self._run)

    def _run(self) -> None:
        for call in self.calls:
            call()


class Module:
    """cupy.cuda.function.Module of a shared object that build.py made."""

    def load(self, code: bytes) -> None:
        self._library = _loaded(code)

    def get_function(self, name: str) -> Function:
        return Function(self._library, name)


class Function:
    """cupy.cuda.function.Function: checks what CuPy leaves to the hardware, then runs."""

    _turn = itertools.count()

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.name = self.ptr = name
        self._run, self._size = getattr(library, f"run_{name}"), getattr(library, f"size_{name}")
        self._run.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_size_t, ctypes.c_uint64]

    def __call__(self, grid: Any, block: Any, args: Any, shared_mem: int = 0) -> None:
        values = [np.atleast_1d(np.asarray(a)) for a in args]
        for i, value in enumerate(values):
            if value.nbytes != self._size(i):
                raise TypeError(
                    f"{self.name}: argument {i} has {value.nbytes} bytes, the kernel takes "
                    f"{self._size(i)}"
                )
        if self._size(len(values)) != -1:
            raise TypeError(f"{self.name}: {len(values)} arguments are too few")
        if shared_mem > _dynamic_shared.get(self.name, 48 << 10):
            raise RuntimeError(f"{self.name}: {shared_mem} bytes of shared memory: too many")
        if _capturing is not None:
            _capturing.append(lambda: self._launch(grid, block, values, shared_mem))
        else:
            _eager("launch")
            self._launch(grid, block, values, shared_mem)

    def _launch(self, grid: Any, block: Any, values: list[np.ndarray], shared: int) -> None:
        schedule = next(self._turn) % SCHEDULES
        sizes = [np.array((*s, 1, 1)[:3], np.uint32) for s in (grid, block)]
        places = np.array([v.ctypes.data for v in values], np.uint64)
        failed = self._run(
            places.ctypes.data, *(s.ctypes.data for s in sizes), shared, schedule
        )  # fmt: skip
        if failed:
            raise RuntimeError(f"{self.name}: {_message()} (schedule {schedule})")
        memory.check_canaries()


def _message() -> str:
    text: str = _runtime().host_error().decode()
    address = re.search(r"address (0x[0-9a-f]+)", text)
    return f"{text}: {memory.nearest(int(address[1], 16))}" if address else text


_libraries: dict[bytes, ctypes.CDLL] = {}
THREADS = bool(os.environ.get("CUDA_HOST_THREADS"))  # a child process under ThreadSanitizer


def _runtime() -> ctypes.CDLL:
    library = _loaded(build.runtime(THREADS), ctypes.RTLD_GLOBAL)
    library.host_error.restype = ctypes.c_char_p
    return library


def _loaded(code: bytes, mode: int = ctypes.RTLD_LOCAL) -> ctypes.CDLL:
    if code not in _libraries:
        if mode == ctypes.RTLD_LOCAL:
            _runtime()  # which kernels link to
        with tempfile.NamedTemporaryFile(suffix=".so") as file:
            file.write(code)
            file.flush()
            _libraries[code] = ctypes.CDLL(file.name, mode)
    return _libraries[code]


_dynamic_shared: dict[str, int] = {}  # by kernel


def _set_attribute(function: str, attribute: int, value: int) -> None:
    assert attribute == 8 and value <= 227 << 10, "shared memory of a block of an H100"
    _dynamic_shared[function] = value


cuda = SimpleNamespace(
    Device=Device,
    driver=SimpleNamespace(funcSetAttribute=_set_attribute),
    Event=Event,
    Stream=Stream,
    alloc_pinned_memory=bytearray,
    get_current_stream=lambda: _null,
    function=SimpleNamespace(Module=Module),
    memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
    runtime=SimpleNamespace(
        memGetInfo=lambda: (Device.free(), Device.memory),
        driverGetVersion=lambda: 13000,
        getDeviceCount=lambda: 1,
    ),
)
