"""The emulator bites: every mistake it is there to find, planted in a kernel of a few lines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from backprop_kernels import cuda
from backprop_kernels.arrays import Dropout
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.epilogue import plain_variant
from backprop_kernels.cuda.launch import launch, on_device
from backprop_kernels.errors import KindError, ShapeError

from tests.cuda_host import cupy_stand_in
from tests.cuda_host.threads import RACE_FOUND, under_thread_sanitizer

pytestmark = pytest.mark.usefixtures("emulator")
SUMS = Unit("column_sums.cu", plain_variant(np.dtype(np.float32)))
ROOT = Path(__file__).parent.parent.parent


def run(body: str, tmp_path: Path, attribute: str = "") -> None:
    """A kernel `f(float* x)` on 64 floats, once in each schedule."""
    file = tmp_path / "unit.cu"
    file.write_text(
        f'#include "ptx.cuh"\nextern "C" __global__ void {attribute} f(float* x) {{\n{body}\n}}\n'
    )
    for _ in range(cupy_stand_in.SCHEDULES):
        x = cupy_stand_in.zeros(64, np.float32)
        launch(Unit(str(file), ""), "f", (2,), (64,), x, shared=1024)


WRONG = {
    "read past the end": ("x[0] = x[64 + threadIdx.x];", "bytes past an array of 256 bytes"),
    "write past the end": ("x[64 + threadIdx.x] = 1;", "bytes past an array of 256 bytes"),
    "write before the start": ("x[-1 - int(threadIdx.x % 2)] = 1;", "wrote before an array of 256"),
    "read far before the start": ("x[0] = x[-1024];", "bytes before an array of 256 bytes"),
    "a barrier that not all reach": (
        "if (threadIdx.x < 32) __syncthreads();", "a thread exited before __syncthreads, line 3"
    ),
    "two barriers at once": (
        "if (threadIdx.x < 32) __syncthreads();\nelse __syncthreads();", "__syncthreads diverges"
    ),
    "a shuffle without one lane": (
        "if (threadIdx.x % 32) x[0] = __shfl_xor_sync(0xffffffffu, x[0], 1);",
        "a thread exited before a warp collective",
    ),
    "a partial mask": ("x[0] = __shfl_sync(0xffffu, x[0], 0);", "expected a full mask"),
    "a barrier that nobody completes": (
        "__shared__ u64 b;\nif (threadIdx.x == 0) barrier_init(shared_address(&b), 1);\n"
        "__syncthreads();\nbarrier_wait(shared_address(&b), 0);", "deadlock"
    ),
    "two warpgroups at one barrier": ("group_sync(1);", "group_sync by another warpgroup's number"),
    "a copy to an odd address": (
        "__shared__ __align__(16) float s[8];\ncopy_async_16(shared_address(s + 1), x, 16);",
        "cp.async to: address not on 16 bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_mistake_is_an_error_that_names_it(mistake: str, tmp_path: Path) -> None:
    body, message = WRONG[mistake]
    with pytest.raises((RuntimeError, MemoryError), match=message):
        run(body, tmp_path)


BARRIER = "DYNAMIC_SHARED(s);\nconst shared_t b = shared_address(s);\n"
WRONG_IN_A_CLUSTER = {
    "a rank that is not there": (
        BARRIER + "in_cluster(b, 2);", "a rank beyond the cluster"
    ),
    "static memory of another block": (
        "__shared__ u64 b;\nin_cluster(shared_address(&b), 1);", "dynamic shared memory only"
    ),
    "a block that has ended": (
        BARRIER + "barrier_init(b, 64);\ncluster_sync();\nif (cluster_rank()) return;\n"
        "barrier_wait(b, 0);\nbarrier_arrive_remote(in_cluster(b, 1));", "deadlock",
    ),
    "memory of a block that has ended": (
        BARRIER + "barrier_init(b, 1);\ncluster_sync();\nif (cluster_rank()) {\n"
        "  if (threadIdx.x == 0) barrier_arrive_remote(in_cluster(b, 0));\n  return;\n}\n"
        "barrier_wait(b, 0);\nfor (int i = 0; i < 99; ++i) __syncthreads();\n"
        "barrier_arrive_remote(in_cluster(b, 1));", "shared memory of a block that has ended",
    ),
    "a barrier that one block does not reach": (
        "if (cluster_rank()) cluster_sync();", "a thread exited before cluster_sync, line "
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG_IN_A_CLUSTER)
def test_mistake_in_a_cluster_is_an_error_that_names_it(mistake: str, tmp_path: Path) -> None:
    body, message = WRONG_IN_A_CLUSTER[mistake]
    with pytest.raises(RuntimeError, match=message):
        run(body, tmp_path, "__cluster_dims__(2, 1, 1)")


def test_what_differs_by_schedule_is_seen(tmp_path: Path) -> None:
    """Without its barrier a kernel reads NaN in some order of the warps."""
    body = """
        __shared__ float s[64];
        s[threadIdx.x] = 1;
        x[threadIdx.x] = s[63 - threadIdx.x];"""
    file = tmp_path / "unit.cu"
    results = set()
    for barrier in ("", "__syncthreads();"):
        kernel = body.replace("= 1;", f"= 1; {barrier}")
        file.write_text(f'extern "C" __global__ void f(float* x) {{{kernel}}}\n')
        for _ in range(cupy_stand_in.SCHEDULES):
            x = cupy_stand_in.empty(64, np.float32)
            launch(Unit(str(file), f"// {barrier}"), "f", (1,), (64,), x)
            results.add((barrier, bool(np.isnan(x.get()).any())))
    assert ("", True) in results and ("__syncthreads();", True) not in results


def test_copies_land_only_when_waited_for(tmp_path: Path) -> None:
    body = """
        __shared__ __align__(16) float s[4];
        if (threadIdx.x == 0) {
            copy_async_16(shared_address(s), x, 16);
            copy_async_commit();
            x[8] = s[0];
            copy_async_wait<0>();
            x[9] = s[0];
        }"""
    file = tmp_path / "unit.cu"
    file.write_text(f'#include "ptx.cuh"\nextern "C" __global__ void f(float* x) {{{body}}}\n')
    x = cupy_stand_in.zeros(64, np.float32)
    launch(Unit(str(file), ""), "f", (1,), (32,), x)
    assert np.isnan(x.get()[8]) and x.get()[9] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, None), "argument 1 has 8 bytes, the kernel takes 4"),
        ((None,), "1 arguments are too few"),
        ((None, np.int32(1), 1), "argument 2 has 8 bytes, the kernel takes -1"),
    ],
)
def test_arguments_of_the_wrong_size_are_refused(
    arguments: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "unit.cu"
    file.write_text('extern "C" __global__ void f(float* x, int n) {}\n')
    with pytest.raises(TypeError, match=message):
        launch(Unit(str(file), ""), "f", (1,), (32,), *arguments)


def test_launchers_refuse_what_a_kernel_would_misread() -> None:
    X = cupy_stand_in.zeros((4, 4), np.float32)
    raw = cupy_stand_in.zeros(17 * 4, np.uint8)
    odd = raw[2:66].view(np.float32).reshape(4, 4)
    for array, error, message in (
        (np.zeros((4, 4), np.float32), KindError, "X: expected a CuPy array, got numpy.ndarray"),
        (X.T[:, ::2], ShapeError, "X: expected a C-contiguous array"),
        (odd, ShapeError, "X: expected memory aligned to 4 bytes"),
    ):
        with pytest.raises(error, match=message):
            on_device("linear_forward", X=array)
    with pytest.raises(KindError, match=r"argument: expected an array or integer, got 1\.0"):
        launch(
            SUMS,
            "column_sums",
            (1,),
            (32,),
            1.0,
        )
    Y, saved = cuda.linear_forward(X, X, None, "relu")
    assert (saved.shape, saved.dtype) == ((4, 1), np.uint32)
    with pytest.raises(KindError, match=r"saved: expected the words of bits that relu's forward"):
        cuda.linear_dgrad(X, X, Y, "relu")
    with pytest.raises(
        ShapeError, match=r"saved: expected shape \(batch=4, in_features / 32 bits=1"
    ):
        cuda.linear_dgrad(X, X, cupy_stand_in.zeros((4, 2), np.uint32), "relu")
    with pytest.raises(KindError, match=r"out saved: expected dtype uint32, got float32"):
        cuda.linear_forward(X, X, None, "relu", None, (Y, Y))
    with pytest.raises(KindError, match=r"dropout: stream: expected a CuPy array, got numpy"):
        cuda.linear_forward(X, X, None, "relu", Dropout(0.5, np.array([1, 2]), 0))
    # The device serves on.
    assert np.array_equal(cuda.linear_forward(X, X)[0].get(), np.zeros((4, 4)))


def test_a_grid_that_no_gpu_takes_is_refused() -> None:
    with pytest.raises(ShapeError, match="column_sums: expected a grid of at most"):
        launch(
            SUMS,
            "column_sums",
            (2**31,),
            (32,),
        )


RACE = """
import sys
sys.path[:0] = [{root!r}, {kernels!r}]
import numpy as np
from backprop_kernels import cuda
from backprop_kernels.cuda import compile as nvrtc
from tests.cuda_host import cupy_stand_in
from tests.cuda_host.backend import installed
if {broken}:
    headers = dict(nvrtc.headers())
    text = headers["product.cuh"]
    assert text.count("        __syncthreads();\\n        now ^= 1;") == 1
    headers["product.cuh"] = text.replace("        __syncthreads();\\n        now", "        now")
    nvrtc.headers = lambda: headers
with installed():
    rng = np.random.default_rng(0)
    X, W = (cupy_stand_in.asarray(rng.random((n, 40), np.float32)) for n in (33, 40))
    Y, saved = cuda.linear_forward(X, W, None, "relu")
    cuda.linear_dgrad(Y, W, saved, "relu")
    dW = cuda.linear_wgrad(Y, X)
    assert np.allclose(dW.get(), Y.get().T @ X.get(), atol=1e-3) or {broken}
"""


@pytest.mark.parametrize("broken", [False, True])
def test_thread_sanitizer(broken: bool) -> None:
    """Every CUDA thread a real one: clean as it is, a data race where a barrier is taken out."""
    code = RACE.format(root=str(ROOT), kernels=str(ROOT / "kernels"), broken=broken)
    done = under_thread_sanitizer(code)
    if broken:
        assert done.returncode == RACE_FOUND and "data race" in done.stderr, done.stderr[-3000:]
    else:
        assert done.returncode == 0, done.stderr[-3000:]
