"""The CUDA backend as the tests of operators see it: NumPy arrays in, NumPy arrays out.

Every array of a call is copied to the device, the real launcher is called, and every array is
copied back. So one test body serves all backends, here in the emulator and on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import pytest
from backprop_kernels import cuda
from backprop_kernels.arrays import Dropout
from backprop_kernels.cuda import compile as nvrtc
from backprop_kernels.cuda import tensor_map
from backprop_kernels.operators import OPERATORS

from tests.cuda_host import build, cupy_stand_in
from tests.cuda_host.tensor_map import encode

FUNCTIONS = [name for row in OPERATORS for name in row.functions]
Place: TypeAlias = Callable[[], AbstractContextManager[None]]


@contextmanager
def installed() -> Iterator[None]:
    """The emulator in the place of CuPy and NVRTC."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", cupy_stand_in)
        patch.setattr(nvrtc, "cubin", lambda unit, arch: build.unit(unit, cupy_stand_in.THREADS))
        patch.setattr(tensor_map, "encode", encode)
        yield


class Mirror:
    """Device copies of NumPy arrays: one per piece of memory, however often it is given."""

    def __init__(self) -> None:
        self.pairs: dict[tuple[int, int], tuple[np.ndarray, Any]] = {}
        self._shown: dict[int, np.ndarray] = {}

    def to_device(self, value: Any) -> Any:
        """`value` with a device array for every NumPy array in it."""
        import cupy

        if isinstance(value, Dropout):
            return value._replace(stream=self.to_device(value.stream))
        if isinstance(value, tuple | list):
            return type(value)(self.to_device(v) for v in value)
        if not isinstance(value, np.ndarray):
            return value
        key = (value.__array_interface__["data"][0], value.nbytes)
        if key not in self.pairs:
            self.pairs[key] = value, _copied(cupy, value)
        device = self.pairs[key][1]
        if device.dtype != value.dtype or device.shape != value.shape:
            device = device.reshape(value.shape)
        self._shown[device.data.ptr] = value
        return device

    def upload(self) -> None:
        for host, device in self.pairs.values():
            if host.size:
                device.set(host)

    def download(self) -> None:
        for host, device in self.pairs.values():
            if host.size and host.flags.writeable:
                device.get(out=host)

    def to_host(self, value: Any) -> Any:
        """What an operator returned, as the arrays it was given where it was given them."""
        if isinstance(value, tuple):
            return tuple(self.to_host(v) for v in value)
        if not hasattr(value, "get"):
            return value
        shown = self._shown.get(value.data.ptr)
        return shown if shown is not None and shown.shape == value.shape else value.get()


_mirror: Mirror | None = None  # of the capture that is going on


def _operator(name: str, place: Place, module: Any) -> Callable[..., Any]:
    @wraps(getattr(module, name))
    def call(*arguments: Any, **options: Any) -> Any:
        with place():
            mirror = _mirror or Mirror()
            placed = {k: mirror.to_device(v) if k != "options" else v for k, v in options.items()}
            result = getattr(module, name)(*(mirror.to_device(a) for a in arguments), **placed)
            if _mirror is None:
                mirror.download()
            return mirror.to_host(result)

    return call


def _capture(place: Place) -> Callable[..., Any]:
    @wraps(cuda.capture)
    def capture(operators: Callable[..., None], *inputs: np.ndarray) -> Callable[..., None]:
        global _mirror
        stands = [np.empty_like(a) for a in inputs]  # for the program's own buffers
        places = [(a.__array_interface__["data"][0], a.nbytes) for a in stands]
        mirror, outer = Mirror(), _mirror

        def on_device(*buffers: Any) -> None:
            mirror.pairs.update(zip(places, zip(stands, buffers, strict=True), strict=True))
            operators(*stands)

        with place():
            _mirror = mirror
            try:
                program = cuda.capture(on_device, *inputs)
            finally:
                _mirror = outer
            for key in places:
                del mirror.pairs[key]

        def replay(*arrays: np.ndarray) -> None:
            with place():
                mirror.upload()
                program(*arrays)
                mirror.download()

        return replay

    return capture


def _copied(cupy: Any, value: np.ndarray) -> Any:
    """A device array of the same layout, as far as kernels can tell layouts apart."""
    if value.flags.c_contiguous:
        return cupy.asarray(value)
    if value.flags.f_contiguous:
        return cupy.asarray(value.T).T
    return cupy.asarray(np.repeat(value, 2, axis=-1))[..., ::2]


def adapter(place: Place, module: Any = cuda, *more: str) -> SimpleNamespace:
    """The CUDA backend, or one like it, for NumPy arrays; every call happens inside `place()`."""
    return SimpleNamespace(
        __name__="backprop_kernels.cuda",
        __all__=cuda.__all__,
        SAVES_BITS=cuda.SAVES_BITS,
        capture=_capture(place),
        place=place,
        module=module,
        **{name: _operator(name, place, module) for name in (*FUNCTIONS, *more)},
    )


backend = adapter(installed)  # in the emulator
on_gpu = adapter(nullcontext)
