"""Memory for arrays that live long: zeroed, aligned, never shared, given back."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path

import numpy as np
import pytest
from backprop_kernels import host_memory
from backprop_kernels.host_memory import CHUNK, HUGE, LINE, zeros

from tests.outside import outside

SIZES = [0, 1, 15, 16, 17, 1000, CHUNK // 16, CHUNK // 16 + 1, CHUNK // 4, 3 * CHUNK // 4 + 1]


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_zeroed_aligned_and_apart(dtype: str) -> None:
    arrays = []
    for value, size in enumerate(2 * SIZES):
        array = zeros(size, dtype)
        assert array.shape == (size,) and array.dtype == dtype and not array.any()
        assert array.__array_interface__["data"][0] % LINE == 0
        arrays.append(array)
        array[...] = value
    for value, array in enumerate(arrays):
        assert (array == value).all()


@pytest.mark.parametrize("shape", [(), (3,), (0, 5), (7, 5), (2, 3, 4)])
def test_shapes(shape: tuple[int, ...]) -> None:
    array = zeros(shape, np.float32)
    assert array.shape == shape and array.flags.c_contiguous and array.flags.writeable


def test_large_arrays_begin_with_a_huge_page() -> None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("this system has no huge pages to ask for")
    assert zeros(CHUNK, np.uint8).__array_interface__["data"][0] % HUGE == 0


GIVEN_BACK = """
import os
from pathlib import Path
import numpy as np
from backprop_kernels.host_memory import CHUNK, zeros

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

before = resident()
large, small = zeros(2**26, np.uint8), [zeros(CHUNK // 8, np.uint8) for _ in range(64)]
large[...] = 1
for array in small:
    array[...] = 1
print(resident() - before)
del large, small, array
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads a process's size in /proc")
def test_memory_is_given_back() -> None:
    """In a process of its own: in another one, other things come and go meanwhile."""
    held, kept = map(int, outside(GIVEN_BACK).split())
    assert held > 1.9 * 2**26 and kept < 2**24


def test_threads_get_their_own() -> None:
    mine: list[list[np.ndarray]] = [[] for _ in range(4)]

    def take(thread: int) -> None:
        for _ in range(2000):
            array = zeros(48, np.int64)
            array += thread + 1
            mine[thread].append(array)

    threads = [threading.Thread(target=take, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, arrays in enumerate(mine):
        assert all((array == i + 1).all() for array in arrays)


def test_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    monkeypatch.setattr(host_memory, "_free", np.empty(0, np.uint8))
    for size in SIZES:
        array = zeros(size, np.float32)
        assert len(array) == size and not array.any()
        assert array.__array_interface__["data"][0] % LINE == 0


def test_too_much_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match=r"memory: expected \d+ bytes to be free, got "):
        zeros(2**62, np.uint8)
