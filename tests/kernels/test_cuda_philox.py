"""include/philox.cuh: the reference's bits, also where no test has memory for the array."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from backprop_kernels.arrays import Array
from backprop_kernels.reference.philox import philox

from tests.host_compiler import library

SOURCE = """
#include "ptx.cuh"
#include "philox.cuh"
extern "C" void kept(const long long* stream, long long layer, long long threshold,
                     const long long* elements, bool* answers, long long count) {
    KeepMask keep(stream, nullptr, layer, threshold);
    for (long long i = 0; i < count; ++i) answers[i] = keep(elements[i]);
}
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return library(SOURCE, tmp_path_factory.mktemp("philox"))


def answers(lib: ctypes.CDLL, stream: Array | None, layer: int, bar: int, elements: Array) -> Array:
    result = np.zeros(len(elements), bool)
    lib.kept(
        ctypes.c_void_p(None if stream is None else stream.ctypes.data),
        *(ctypes.c_longlong(v) for v in (layer, bar)),
        *(ctypes.c_void_p(a.ctypes.data) for a in (elements, result)),
        ctypes.c_longlong(len(elements)),
    )
    return result


@pytest.mark.parametrize("bar", [1, 2**31, 2**32 - 1, 2**32])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (2**40 + 9, 2**31), (-1, 2**33 + 1)])
def test_bits_are_the_references(kept: ctypes.CDLL, seed: int, step: int, bar: int) -> None:
    rng = np.random.default_rng(0)
    around = np.arange(-9, 9)
    parts = [np.arange(40), rng.integers(0, 2**62, 200)]
    elements = np.concatenate([*parts, *(2**k + around for k in (31, 32, 33, 34, 35, 40))])
    block = (elements // 4).astype(np.uint64)
    low = np.uint64(0xFFFFFFFF)
    counter = np.stack(
        [block & low, block >> np.uint64(32), 0 * block + np.uint64(step & 0xFFFFFFFF),
         0 * block + np.uint64(3)]
    )  # fmt: skip
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    expected = words[elements % 4, np.arange(len(elements))] >= bar
    stream = np.array([seed, step], np.int64)
    assert np.array_equal(answers(kept, stream, 3, bar, elements), expected)
    shuffled = rng.permutation(len(elements))  # no order is assumed
    assert np.array_equal(answers(kept, stream, 3, bar, elements[shuffled]), expected[shuffled])


def test_without_a_stream_everything_is_kept(kept: ctypes.CDLL) -> None:
    assert answers(kept, None, 0, 2**32, np.arange(64)).all()
