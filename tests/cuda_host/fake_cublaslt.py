"""cuBLASLt as its headers describe it, for the emulator: every call goes by the C convention.

Descriptors are what was set in them, byte by byte; unknown attributes, sizes that are not the
header's, layouts that do not fit and algorithms from elsewhere are refused as the library would.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_double, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from backprop_kernels.cuda import cublaslt
from backprop_kernels.precisions import widen

from tests.cuda_host import cupy_stand_in

SUCCESS, INVALID_VALUE, NOT_SUPPORTED = 0, 7, 15
# By kind of descriptor: attribute → (name, bytes).
ATTRIBUTES = {
    "MatmulDesc": {2: ("pointer mode", 4), 3: ("transposed A", 4), 4: ("transposed B", 4)},
    "MatmulPreference": {
        1: ("workspace", 8), 3: ("reduction", 4), 5: ("align A", 4), 6: ("align B", 4),
        7: ("align C", 4), 8: ("align D", 4),
    },
}  # fmt: skip
TYPES = {0: np.float32, 1: np.float64, 2: np.float16, 14: np.uint16}  # bfloat16 as its bits
COMPUTE = {68: np.float32, 77: np.float32, 70: np.float64}
ALGORITHM = 0x600D  # in every word of what the heuristic gives
NEEDED = 1024  # bytes of workspace


class FakeLibrary(SimpleNamespace):
    """Functions as ctypes finds them in a library; `calls` are the products that were made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []
        self.found = 1  # algorithms
        self._things: dict[int, dict[str, Any]] = {}
        self._keep: list[Any] = []
        for name in dir(type(self)):
            if name.startswith("lt_"):
                types = [ctypes.c_void_p if hasattr(t, "contents") else t
                         for t in SIGNATURES[name[3:]]]  # fmt: skip
                function = ctypes.CFUNCTYPE(c_int, *types)(self._guarded(getattr(self, name)))
                setattr(self, f"cublasLt{name[3:]}", function)
        self.cublasLtGetVersion = ctypes.CFUNCTYPE(c_size_t)(lambda: 130400)

    @staticmethod
    def _guarded(function: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            try:
                return function(*arguments)
            except (KeyError, ValueError, AssertionError):
                return INVALID_VALUE

        return call

    def _new(self, at: int, **fields: Any) -> int:
        number = 0x1000 * (len(self._things) + 1)
        self._things[number] = fields
        c_void_p.from_address(at).value = number
        return SUCCESS

    def lt_Create(self, at: int) -> int:
        return self._new(at, kind="handle")

    def lt_MatmulDescCreate(self, at: int, compute: int, scale: int) -> int:
        return self._new(at, kind="MatmulDesc", compute=COMPUTE[compute], tf32=compute == 77,
                         scale=TYPES[scale], **{"pointer mode": 0})  # fmt: skip

    def lt_MatrixLayoutCreate(self, at: int, kind: int, rows: int, columns: int, ld: int) -> int:
        assert ld >= rows
        return self._new(at, kind="layout", type=TYPES[kind], shape=(rows, columns), ld=ld)

    def lt_MatmulPreferenceCreate(self, at: int) -> int:
        return self._new(at, kind="MatmulPreference")

    def lt_MatmulPreferenceDestroy(self, number: int) -> int:
        assert self._things[number].pop("kind") == "MatmulPreference"
        return SUCCESS

    def _set(self, kind: str, number: int, attribute: int, value: int, size: int) -> int:
        name, expected = ATTRIBUTES[kind][attribute]
        assert self._things[number]["kind"] == kind and size == expected
        self._things[number][name] = int.from_bytes(ctypes.string_at(value, size), "little")
        return SUCCESS

    def lt_MatmulDescSetAttribute(self, *given: int) -> int:
        return self._set("MatmulDesc", *given)

    def lt_MatmulPreferenceSetAttribute(self, *given: int) -> int:
        return self._set("MatmulPreference", *given)

    def lt_MatmulAlgoGetHeuristic(
        self, handle: int, descriptor: int, A: int, B: int, C: int, D: int, preference: int,
        wanted: int, results: int, count: int,
    ) -> int:  # fmt: skip
        wish = self._things[preference]
        assert self._things[handle]["kind"] == "handle" and wanted == 1
        assert {name: wish[name] for name, _ in ATTRIBUTES["MatmulPreference"].values()} == {
            "workspace": 32 << 20, "reduction": 2,
            **{f"align {m}": 16 for m in "ABCD"},
        }  # fmt: skip
        self._sizes(descriptor, A, B, D)
        c_int.from_address(count).value = self.found
        if self.found:
            for word in range(8):
                c_uint64.from_address(results + 8 * word).value = ALGORITHM
            c_size_t.from_address(results + 64).value = NEEDED
            c_int.from_address(results + 72).value = SUCCESS
        return SUCCESS if self.found else NOT_SUPPORTED

    def _sizes(self, descriptor: int, A: int, B: int, D: int) -> dict[str, Any]:
        given = self._things[descriptor]
        shapes = []
        for matrix, side in ((A, "A"), (B, "B")):
            shape = self._things[matrix]["shape"]
            shapes.append(shape[::-1] if given[f"transposed {side}"] else shape)
        assert shapes[0][1] == shapes[1][0]
        assert self._things[D]["shape"] == (shapes[0][0], shapes[1][1])
        return given

    def lt_Matmul(
        self, handle: int, descriptor: int, alpha: int, a: int, A: int, b: int, B: int, beta: int,
        c: int, C: int, d: int, D: int, algorithm: int, workspace: int, size: int, stream: int,
    ) -> int:  # fmt: skip
        given = self._sizes(descriptor, A, B, D)
        words = [c_uint64.from_address(algorithm + 8 * i).value for i in range(8)]
        assert self._things[handle]["kind"] == "handle" and words == [ALGORITHM] * 8
        assert c == d and C == D and not any(pointer % 16 for pointer in (a, b, d))
        assert workspace and size == NEEDED and stream == STREAM
        scalar = c_double if given["scale"] is np.float64 else c_float
        on_host = given["pointer mode"] == 0
        factors = [scalar.from_address(p).value for p in (alpha, beta)] if on_host else None
        self.calls.append({"captured": cupy_stand_in._capturing is not None, **given})

        def work() -> None:
            by, kept = factors or [scalar.from_address(p).value for p in (alpha, beta)]
            left, right, out = (self._matrix(p, m) for p, m in ((a, A), (b, B), (d, D)))
            left = left.T if given["transposed A"] else left
            right = right.T if given["transposed B"] else right
            ctypes.memset(workspace, 0xFF, size)
            values = [self._operand(m, given["tf32"]).astype(float) for m in (left, right)]
            out[...] = by * (values[0] @ values[1])
            assert kept == 0.0

        if cupy_stand_in._capturing is not None:
            cupy_stand_in._capturing.append(work)
        else:
            work()
        return SUCCESS

    def _matrix(self, address: int, layout: int) -> np.ndarray:
        """Columns first, as they lie."""
        thing = self._things[layout]
        (rows, columns), ld, kind = thing["shape"], thing["ld"], np.dtype(thing["type"])
        place = (ctypes.c_char * (ld * columns * kind.itemsize)).from_address(address)
        return np.frombuffer(place, kind).reshape(columns, ld)[:, :rows].T

    @staticmethod
    def _operand(matrix: np.ndarray, tf32: bool) -> np.ndarray:
        if not tf32:
            return matrix if matrix.dtype == np.float64 else widen(np.ascontiguousarray(matrix))
        bits = np.ascontiguousarray(matrix).view(np.uint32)
        return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


# The headers' own: what a C compiler would pass, whatever cublaslt.py says.
P, N = c_void_p, c_int
SIGNATURES: dict[str, list[Any]] = {
    "Create": [P],
    "MatmulDescCreate": [P, N, N],
    "MatmulDescSetAttribute": [P, N, P, c_size_t],
    "MatrixLayoutCreate": [P, N, c_uint64, c_uint64, c_int64],
    "MatmulPreferenceCreate": [P],
    "MatmulPreferenceSetAttribute": [P, N, P, c_size_t],
    "MatmulPreferenceDestroy": [P],
    "MatmulAlgoGetHeuristic": [P, P, P, P, P, P, P, N, P, P],
    "Matmul": [P, P, P, P, P, P, P, P, P, P, P, P, P, P, c_size_t, P],
}
STREAM = 0x57


@contextmanager
def fake_cublaslt() -> Iterator[FakeLibrary]:
    """It in the place of the library; inside `backend.installed`."""
    fake = FakeLibrary()
    caches = cublaslt._setting, cublaslt._handle
    for cached in caches:
        cached.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cublaslt, "library", lambda: cublaslt.typed(fake))
        patch.setattr(cupy_stand_in._null, "ptr", STREAM, raising=False)
        yield fake
    for cached in caches:
        cached.cache_clear()
