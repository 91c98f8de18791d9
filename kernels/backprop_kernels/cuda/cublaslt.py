"""Products by NVIDIA's cuBLASLt, called through ctypes: a candidate beside the own kernels.

It makes the sums alone. What is fused into a product follows in the same `.cu` as ever, which then
reads them (given_product.cuh). A product has a workspace of its own and its algorithm is looked up
when it is asked for, so all that is left to do can be captured in a graph. Numbers of the headers
cublasLt.h, cublas_api.h and library_types.h stand here by their names there.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from backprop_kernels.arrays import Array
from backprop_kernels.cuda.launch import constant, cupy, empty, submit
from backprop_kernels.cuda.tensor_map import ROWS_ON
from backprop_kernels.errors import DeviceUnavailableError

CUDA_R_32F, CUDA_R_64F, CUDA_R_16F, CUDA_R_16BF = 0, 1, 2, 14
CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F, CUBLAS_COMPUTE_32F_FAST_TF32 = 68, 70, 77
CUBLAS_OP_N, CUBLAS_OP_T = 0, 1
CUBLASLT_MATMUL_DESC_POINTER_MODE = 2
CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB = 3, 4
CUBLASLT_POINTER_MODE_DEVICE = 1
CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1
CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3
CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5  # of B, C and D: the next three
CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2

WORKSPACE = 32 << 20  # bytes that an algorithm may ask for: what NVIDIA advises for Hopper


class Kind(NamedTuple):
    """How cuBLASLt multiplies in one precision of the table."""

    compute: int
    sums: int  # type of sums, of alpha and of beta
    operand: int
    scalar: Any


KINDS = {
    "float64": Kind(CUBLAS_COMPUTE_64F, CUDA_R_64F, CUDA_R_64F, ctypes.c_double),
    "float32": Kind(CUBLAS_COMPUTE_32F, CUDA_R_32F, CUDA_R_32F, c_float),
    "tf32": Kind(CUBLAS_COMPUTE_32F_FAST_TF32, CUDA_R_32F, CUDA_R_32F, c_float),
    "bf16": Kind(CUBLAS_COMPUTE_32F, CUDA_R_32F, CUDA_R_16BF, c_float),
    "fp16": Kind(CUBLAS_COMPUTE_32F, CUDA_R_32F, CUDA_R_16F, c_float),
}
# cuBLASLt counts columns first: what is C (rows, columns) here is Cᵀ there, the product of the
# second factor and the first. Whether each is transposed on the way, as it lies in memory:
TRANSPOSED = {
    "linear_forward": (CUBLAS_OP_T, CUBLAS_OP_N),  # W, X
    "linear_dgrad": (CUBLAS_OP_N, CUBLAS_OP_N),  # W, dZ
    "linear_wgrad": (CUBLAS_OP_N, CUBLAS_OP_T),  # X, dZ
}


class Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t."""

    _fields_ = [("data", c_uint64 * 8)]


class Found(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algo", Algorithm), ("workspaceSize", c_size_t), ("state", c_int),
        ("wavesCount", c_float), ("reserved", c_int * 4),
    ]  # fmt: skip


SIGNATURES = {  # every one returns a cublasStatus_t
    "cublasLtCreate": [POINTER(c_void_p)],
    "cublasLtMatmulDescCreate": [POINTER(c_void_p), c_int, c_int],
    "cublasLtMatmulDescSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    "cublasLtMatrixLayoutCreate": [POINTER(c_void_p), c_int, c_uint64, c_uint64, c_int64],
    "cublasLtMatmulPreferenceCreate": [POINTER(c_void_p)],
    "cublasLtMatmulPreferenceSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    "cublasLtMatmulPreferenceDestroy": [c_void_p],
    "cublasLtMatmulAlgoGetHeuristic": [
        c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int,
        POINTER(Found), POINTER(c_int),
    ],
    "cublasLtMatmul": [
        c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p,
        c_void_p, c_void_p, c_void_p, POINTER(Algorithm), c_void_p, c_size_t, c_void_p,
    ],
}  # fmt: skip


class Setting(NamedTuple):
    """One product as cuBLASLt is told of it, and what it answered."""

    descriptor: c_void_p
    layouts: tuple[c_void_p, c_void_p, c_void_p]
    algorithm: Algorithm
    workspace: int  # bytes


def available() -> bool:
    """Whether cuBLASLt is installed."""
    try:
        library()
    except DeviceUnavailableError:
        return False
    return True


def version() -> int:
    """Of cuBLASLt, as it gives it itself."""
    return int(library().cublasLtGetVersion())


def product(
    operator: str, precision: str, first: Array, second: Array, out: Array,
    factor: Array | None = None,
) -> None:  # fmt: skip
    """out, of sums = the operator's product of its two factors, times `factor` () on the device.

    All rows start on 16 bytes.
    """
    shapes = tuple(array.shape for array in (second, first, out))
    setting = _setting(operator, precision, shapes, factor is not None, out.device.id)
    scalar = KINDS[precision].scalar
    device, workspace = out.device.id, empty((setting.workspace,), np.uint8)
    zero = None if factor is None else constant(0, out.dtype)
    one_and_zero = scalar(1), scalar(0)

    def run() -> None:
        A, B, D = setting.layouts
        scalars = (
            (byref(one_and_zero[0]), byref(one_and_zero[1]))
            if factor is None or zero is None
            else (factor.data.ptr, zero.data.ptr)
        )
        _call(
            "cublasLtMatmul", _handle(device), setting.descriptor, scalars[0], second.data.ptr, A,
            first.data.ptr, B, scalars[1], out.data.ptr, D, out.data.ptr, D,
            byref(setting.algorithm), workspace.data.ptr if setting.workspace else None,
            setting.workspace, cupy().cuda.get_current_stream().ptr,
        )  # fmt: skip

    given = (first, second, out, workspace, factor, zero)
    submit(run, *(array for array in given if array is not None))


@cache
def _setting(
    operator: str, precision: str, shapes: tuple[tuple[int, int], ...], scaled: bool, device: int
) -> Setting:
    """With the first algorithm that cuBLASLt names: it knows which is fastest on which GPU."""
    kind = KINDS[precision]
    descriptor = _made("MatmulDesc", kind.compute, kind.sums)
    for attribute, value in zip(
        (CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB), TRANSPOSED[operator],
        strict=True,
    ):  # fmt: skip
        _set("MatmulDesc", descriptor, attribute, c_int(value))
    if scaled:
        mode = c_int(CUBLASLT_POINTER_MODE_DEVICE)
        _set("MatmulDesc", descriptor, CUBLASLT_MATMUL_DESC_POINTER_MODE, mode)
    types = kind.operand, kind.operand, kind.sums
    # An array (r, c) is, columns first, c rows of r columns, each c after the one before.
    A, B, D = (
        _made("MatrixLayout", type_, columns, rows, columns)
        for type_, (rows, columns) in zip(types, shapes, strict=True)
    )
    preference = _made("MatmulPreference")
    try:
        limit = c_uint64(WORKSPACE)
        _set("MatmulPreference", preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, limit)
        # Where K is split: sums of parts in float32, added in one order, so that bits repeat.
        reduction = c_uint32(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE)
        _set("MatmulPreference", preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reduction)
        for number in range(4):
            attribute = CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES + number
            _set("MatmulPreference", preference, attribute, c_uint32(ROWS_ON))
        found, count = Found(), c_int()
        failed = library().cublasLtMatmulAlgoGetHeuristic(
            _handle(device), descriptor, A, B, D, D, preference, 1, byref(found), byref(count)
        )
        if failed or not count.value or found.state:
            rows, columns = shapes[-1]
            raise DeviceUnavailableError(
                f"{operator}: cuBLASLt: expected an algorithm for {rows} × {columns} elements in "
                f"{precision}, found none"
            )
        return Setting(descriptor, (A, B, D), found.algo, int(found.workspaceSize))
    finally:
        _call("cublasLtMatmulPreferenceDestroy", preference)


def _made(what: str, *numbers: int) -> c_void_p:
    pointer = c_void_p()
    _call(f"cublasLt{what}Create", byref(pointer), *numbers)
    return pointer


def _set(what: str, target: c_void_p, attribute: int, value: Any) -> None:
    _call(
        f"cublasLt{what}SetAttribute", target, attribute, byref(value), ctypes.sizeof(value)
    )  # fmt: skip


def _call(name: str, *arguments: Any) -> None:
    status = getattr(library(), name)(*arguments)
    if status:
        raise DeviceUnavailableError(f"cuBLASLt: {name} failed with cublasStatus_t {status}")


@cache
def _handle(device: int) -> c_void_p:
    with cupy().cuda.Device(device):
        return _made("")


@cache
def library() -> Any:
    """cuBLASLt with the types of its arguments. Raises DeviceUnavailableError where it is not."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        path = load_nvidia_dynamic_lib("cublasLt").abs_path
    except Exception as problem:  # pathfinder has an error class of its own
        raise DeviceUnavailableError(
            f"device: cuBLASLt was not found ({problem}); install nvidia-cublas"
        ) from problem
    return typed(ctypes.CDLL(path))


def typed(found: Any) -> Any:
    """`found` with the signatures of the functions that are used here."""
    for name, arguments in SIGNATURES.items():
        getattr(found, name).argtypes = arguments
        getattr(found, name).restype = c_int
    found.cublasLtGetVersion.argtypes, found.cublasLtGetVersion.restype = [], c_size_t
    return found
