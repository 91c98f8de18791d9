"""Launching: the only file that touches CuPy.

A launch happens now, or joins the list of a capture. `capture` replays its list as one CUDA graph,
with the inputs in buffers of its own: what a replay is given is copied there first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from backprop_kernels.arrays import Array
from backprop_kernels.cuda import compile as nvrtc
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.tensor_map import TensorMap
from backprop_kernels.errors import DeviceMemoryError, KindError, ShapeError

LARGEST_GRID = (2**31 - 1, 65535, 65535)
SHARED_BY_DEFAULT = 48 << 10  # bytes; more is asked for
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

_thread = threading.local()


class Launch(NamedTuple):
    """One kernel with its arguments; `arrays` keeps their memory alive."""

    function: Any
    grid: tuple[int, ...]
    block: tuple[int, ...]
    arguments: tuple[Any, ...]
    shared: int
    arrays: tuple[Array, ...]


def launch(
    unit: Unit, entry: str, grid: Sequence[int], block: Sequence[int], *arguments: Any,
    shared: int = 0,
) -> None:  # fmt: skip
    """Run a kernel, or add it to the capture that this thread is making.

    arguments: device arrays and None go as pointers, Python integers as `long long`, NumPy scalars
    and NumPy arrays of one element by value, tensor maps too.
    """
    grid = (*grid, 1, 1)[:3]
    if any(n > most for n, most in zip(grid, LARGEST_GRID, strict=True)):
        raise ShapeError(f"{entry}: expected a grid of at most {LARGEST_GRID}, got {grid}")
    given = [m for a in arguments for m in (a.matrices if isinstance(a, TensorMap) else (a,))]
    arrays = tuple(a for a in given if is_array(a))
    device = arrays[0].device.id if arrays else cupy().cuda.Device().id
    with cupy().cuda.Device(device):
        function = _function(unit, entry, device, cupy())
        if shared > SHARED_BY_DEFAULT:
            cupy().cuda.driver.funcSetAttribute(function.ptr, MAX_DYNAMIC_SHARED, shared)
        call = Launch(
            function, grid, tuple(block),
            tuple(_word(entry, a) for a in arguments), shared, arrays,
        )  # fmt: skip
        recorded: list[Launch] | None = getattr(_thread, "launches", None)
        if recorded is None:
            _run(call)
        else:
            recorded.append(call)


def submit(work: Callable[[], None], *arrays: Array) -> None:
    """Call `work`, which queues work of a library on the current stream: now, or in the capture.

    `arrays` are what it reads and writes.
    """
    recorded: list[Launch] | None = getattr(_thread, "launches", None)
    if recorded is None:
        work()
    else:
        recorded.append(Launch(lambda *_: work(), (), (), (), 0, arrays))


def recording() -> bool:
    """Whether this thread is capturing, so that nothing is computed yet."""
    return getattr(_thread, "launches", None) is not None


def capture(operators: Callable[..., None], *inputs: Array) -> Program:
    """Turn a function of arrays that calls operators into one CUDA graph; nothing is computed yet.

    Outputs must be preallocated. `inputs` show shape and dtype of arrays that change from replay to
    replay: `program(*arrays)` takes others like them, from this device or from NumPy.
    """
    buffers = [empty(a.shape, a.dtype) for a in inputs]
    outer = getattr(_thread, "launches", None)
    launches: list[Launch] = []
    _thread.launches = launches
    try:
        operators(*buffers)
    finally:
        _thread.launches = outer
    return Program(buffers, launches)


class Program:
    """Captured launches: `program(*inputs)` replays them in one graph launch."""

    def __init__(self, inputs: list[Array], launches: list[Launch]) -> None:
        self.inputs = inputs
        self._launches = launches
        self._device = cupy().cuda.Device()
        stream = cupy().cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            try:
                for call in launches:
                    _run(call)
            finally:
                self._graph = stream.end_capture()

    def __call__(self, *inputs: Array) -> None:
        with self._device:
            for buffer, given in zip(self.inputs, inputs, strict=True):
                if given is not buffer and given.size:
                    copy(buffer, given)
            if self._launches:
                self._graph.launch()


def empty(shape: Any, dtype: Any) -> Array:
    """Uninitialised device memory. A capture keeps what its launches were given."""
    try:
        return cupy().empty(shape, dtype)
    except cupy().cuda.memory.OutOfMemoryError as problem:
        needed = prod(np.atleast_1d(shape).tolist()) * np.dtype(dtype).itemsize
        raise no_room(f"expected room for {needed:,} bytes") from problem


def no_room(what: str) -> DeviceMemoryError:
    """The error that says so, with what is free."""
    free = cupy().cuda.runtime.memGetInfo()[0]
    return DeviceMemoryError(
        f"device memory: {what}, {free:,} are free; lower batch_size or the layers' widths"
    )


def copy(to: Array, source: Array) -> None:
    """Fill the device array `to` from a device or NumPy array of its shape and dtype."""
    if source.shape != to.shape or source.dtype != to.dtype:
        raise ShapeError(
            f"copy: expected {to.dtype} of shape {to.shape}, got {source.dtype} {source.shape}"
        )
    if is_array(source):
        to.data.copy_from_device_async(source.data, to.nbytes)
    else:
        to.set(np.ascontiguousarray(source))


def constant(values: Any, dtype: Any) -> Array:
    """Host numbers on the device, copied now even while this thread is capturing."""
    numbers = np.ascontiguousarray(values, dtype)
    array = empty(numbers.shape, dtype)
    copy(array, numbers)
    return array


def on_device(where: str, **arrays: Array | None) -> None:
    """Refuse what a kernel cannot take: host arrays, another device's, misaligned memory."""
    devices = {}
    for name, value in arrays.items():
        if value is None:
            continue
        if not is_array(value):
            raise KindError(
                f"{where}: {name}: expected a CuPy array, got {type(value).__module__}."
                f"{type(value).__name__}; copy with cupy.asarray(x)"
            )
        devices[name] = value.device.id
        if not value.flags.c_contiguous:
            raise ShapeError(
                f"{where}: {name}: expected a C-contiguous array, got strides {value.strides} for "
                f"shape {value.shape}; pass cupy.ascontiguousarray({name})"
            )
        expect_aligned(where, name, value)
    if len(set(devices.values())) > 1:
        raise KindError(f"{where}: expected arrays of one device, got {devices}")


def expect_aligned(where: str, name: str, value: Array) -> None:
    if value.data.ptr % value.dtype.itemsize:
        raise ShapeError(
            f"{where}: {name}: expected memory aligned to {value.dtype.itemsize} bytes, got "
            f"address {value.data.ptr:#x}; pass {name}.copy()"
        )


def capability(array: Array) -> int:
    """Of the GPU that holds `array`: 80 for 8.0."""
    return int(cupy().cuda.Device(array.device.id).compute_capability)


def multiprocessors(array: Array) -> int:
    """Of the GPU that holds `array`."""
    return int(cupy().cuda.Device(array.device.id).attributes["MultiProcessorCount"])


@cache
def _function(unit: Unit, entry: str, device: int, cupy: Any) -> Any:
    return _module(unit, device, cupy).get_function(entry)


@cache
def _module(unit: Unit, device: int, cupy: Any) -> Any:
    capability = int(cupy.cuda.Device(device).compute_capability)
    # "a": all instructions of this very architecture, such as wgmma.
    arch = f"sm_{capability}" + ("a" if capability >= 90 else "")
    module = cupy.cuda.function.Module()
    module.load(nvrtc.cubin(unit, arch))
    return module


def _run(call: Launch) -> None:
    call.function(call.grid, call.block, call.arguments, call.shared)


def _word(entry: str, value: Any) -> Any:
    """A kernel argument whose size is beyond doubt."""
    if value is None:
        return np.uint64(0)
    if is_array(value):
        return np.uint64(value.data.ptr)
    if isinstance(value, TensorMap):
        return value.encoded
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.size == 1):
        return value  # an array of one goes by value: a structure
    if isinstance(value, int) and not isinstance(value, bool):
        return np.int64(value)
    raise KindError(f"{entry}: argument: expected an array or integer, got {value!r}")


def is_array(value: Any) -> bool:
    """Whether `value` lies on a device."""
    return isinstance(value, cupy().ndarray)


def cupy() -> Any:
    """CuPy, imported on first use."""
    import cupy

    return cupy
