"""Host memory for arrays that are read again and again: parameters, activations, packed panels.

On Linux it comes in huge pages. In pages of 4 KB a wide layer has more pages than a CPU keeps
translations of, and those pages lie anywhere in physical memory, so that some sets of the
second-level cache overflow while others stay empty.
"""

from __future__ import annotations

import math
import mmap
import threading
from contextlib import suppress
from typing import Any

import numpy as np

from backprop_kernels.arrays import Array

LINE = 64
HUGE = 2**21
CHUNK = 2**23  # what small arrays share; it lives as long as the last of them

_lock = threading.Lock()
_free: Array = np.empty(0, np.uint8)


def zeros(shape: int | tuple[int, ...], dtype: Any) -> Array:
    """Zeros that start on a cache line."""
    global _free
    dtype = np.dtype(dtype)
    shape = shape if isinstance(shape, tuple) else (shape,)
    size = math.prod(shape) * dtype.itemsize
    if size > CHUNK // 4:
        raw = _pages(size)
    else:
        room = max(-(-size // LINE), 1) * LINE
        with _lock:
            if len(_free) < room:
                _free = _pages(CHUNK)
            raw, _free = _free, _free[room:]
    return raw[:size].view(dtype).reshape(shape)


def _pages(size: int) -> Array:
    """At least `size` zero bytes, from the start of a huge page where the system has them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        raw = np.zeros(size + LINE, np.uint8)
        return raw[-raw.ctypes.data % LINE :]
    try:
        pages = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as problem:
        raise MemoryError(f"memory: expected {size} bytes to be free, got {problem}") from problem
    with suppress(OSError):  # a system built without them: ordinary pages then
        pages.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(pages, np.uint8)
    return raw[-raw.ctypes.data % HUGE :]
