"""Device memory on a CPU: arrays between pages that no kernel may touch.

An array ends where an inaccessible page begins; what is left before it on its first page holds
canaries. So an access past its end stops the kernel, and so does one a page before it; a write
just before it is found after the launch.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from typing import Any

import numpy as np

PAGE = mmap.PAGESIZE
CANARY, POISON = 0xA5, 0xFF
PROT_NONE, PROT_READ_WRITE, PRIVATE_ANONYMOUS = 0, 3, 0x22

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

_live: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()


class Memory:
    """`size` bytes of poison."""

    def __init__(self, size: int) -> None:
        self.size = size
        inner = max(-(-size // PAGE), 1) * PAGE
        whole = inner + 2 * PAGE
        base = _libc.mmap(None, whole, PROT_READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
        if base is None or base == ctypes.c_void_p(-1).value:
            raise MemoryError(f"mmap of {whole} bytes")
        _libc.mprotect(base, PAGE, PROT_NONE)
        _libc.mprotect(base + PAGE + inner, PAGE, PROT_NONE)
        weakref.finalize(self, _libc.munmap, base, whole)
        self.ptr = base + PAGE + inner - size
        self._slack = _bytes(base + PAGE, inner - size)
        self._slack[:] = CANARY
        self.bytes = _bytes(self.ptr, size)
        self.bytes[:] = POISON
        self._first = base + PAGE
        _live[base] = self

    def check(self) -> None:
        """Raise where something wrote before the array."""
        if (self._slack != CANARY).any():
            raise MemoryError(f"wrote before an array of {self.size} bytes")

    def distance(self, address: int) -> int:
        """How far `address` lies outside this memory."""
        return max(self.ptr - address, address - (self.ptr + self.size - 1), 0)


def used() -> int:
    """Bytes of all arrays that exist."""
    return sum(m.size for m in list(_live.values()))


def check_canaries() -> None:
    """Every array that exists."""
    for memory in list(_live.values()):
        memory.check()


def nearest(address: int) -> str:
    """The array next to an address, in words."""
    memory = min(_live.values(), key=lambda m: m.distance(address), default=None)
    if memory is None:
        return "no array"
    side = "before" if address < memory.ptr else "past"
    return f"{memory.distance(address)} bytes {side} an array of {memory.size} bytes"


def _bytes(address: int, size: int) -> Any:
    return np.frombuffer((ctypes.c_ubyte * size).from_address(address), np.uint8)
