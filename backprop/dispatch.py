"""Which backend serves: by array type for `bp.ops`, by device name for models."""

from __future__ import annotations

import re
import sys
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from backprop_kernels.errors import DeviceUnavailableError, KindError, OptionError

from backprop.device import cuda_devices, cuda_problem
from backprop.memory import HOST, Memory


def for_arrays(where: str, *arrays: Any) -> ModuleType:
    """The backend for these arrays (None is skipped). One kind of array per call, or an error."""
    kinds = {_kind(where, a) for a in arrays if a is not None}
    if len(kinds) > 1:
        raise KindError(
            f"{where}: expected arrays of one kind, got a mix of {' and '.join(sorted(kinds))}; "
            "copy with cupy.asarray(x) or cupy.asnumpy(x)"
        )
    if kinds == {"complex numpy"}:
        return for_device("reference")
    return for_device("cuda" if kinds == {"cupy"} else "cpu")


def _kind(where: str, array: Any) -> str:
    if isinstance(array, np.ndarray):
        return "complex numpy" if array.dtype.kind == "c" else "numpy"
    cupy = sys.modules.get("cupy")  # an array of it can exist only if it was imported
    if cupy is not None and isinstance(array, cupy.ndarray):
        return "cupy"
    raise KindError(f"{where}: expected NumPy or CuPy arrays, got {type(array).__name__}")


def for_device(device: str) -> ModuleType:
    """The backend of "auto", "cpu", "cuda", "cuda:N" or "reference" (plain NumPy)."""
    if device in ("auto", "cpu"):
        return _cpu()
    if device == "reference":
        from backprop_kernels import reference

        return reference
    if isinstance(device, str) and re.fullmatch(r"cuda(:[0-9]+)?", device):
        return _cuda(device)
    raise OptionError(
        f'device: expected "auto", "cpu", "cuda", "cuda:N" or "reference", got {device!r}'
    )


def memory_of(device: str) -> Memory:
    """Where the arrays of a model on this device live."""
    if not device.startswith("cuda"):
        return HOST
    from backprop_kernels.cuda.memory import DeviceMemory

    return DeviceMemory(_number(device))


def _number(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def _cuda(device: str) -> ModuleType:
    if problem := cuda_problem():
        raise DeviceUnavailableError(f'device "{device}": {problem}')
    if _number(device) >= cuda_devices():
        raise DeviceUnavailableError(
            f'device "{device}": expected a number below {cuda_devices()}, the devices here'
        )
    from backprop_kernels import cuda

    return cuda


@cache
def _cpu() -> ModuleType:
    try:
        from backprop_kernels import cpu

        return cpu
    except Exception as problem:  # a broken Numba fails in many ways; none may break training
        warnings.warn(
            f"the CPU kernels need numba, which does not work here ({problem!r}); "
            "plain NumPy serves instead, slower. Mend it with: pip install --force-reinstall numba",
            RuntimeWarning,
            stacklevel=4,
        )
        from backprop_kernels import reference

        return reference
