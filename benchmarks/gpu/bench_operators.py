"""Each operator on a GPU beside its yardstick: `python benchmarks/gpu/bench_operators.py`.

A product's yardstick is cuBLAS in the same precision (`torch.mm`), bare of bias, activation and
column sums, of bf16x3 and bf16x6 cuBLAS in float32; rows named "bare" are without those on our
side, too, or without the update by AdamW that linear_wgrad makes where one kernel can do both. The
yardstick of what is bound by memory is the device's own copy of as many bytes. Both sides run many
times in one CUDA graph, so that no launch is timed. Operands are N(0, 1). `roofline` is the least
time by the device's highest clocks (roofline.py) over ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from measure import Clock, Table, device, options, torch_device
from roofline import roof

REPEATS = 10  # calls in one graph
SECONDS = 1.0  # per row
# batch, in_features, out_features
PRODUCTS = [(8192, 2048, 2048), (4096, 4096, 4096), (1024, 1024, 1024), (65536, 128, 128),
            (256, 784, 1024)]  # fmt: skip
# On tensor cores only; where most of a large network's time is.
GRID = [(8192, n, n) for n in (4096, 8192, 2048, 1024)]
GRID += [(4096, 4096, 4096), (16384, 4096, 4096), (16384, 8192, 8192), (1024, 1024, 1024),
         (1024, 4096, 4096), (4096, 1024, 1024), (65536, 4096, 4096)]  # fmt: skip
ARRAYS = [(8192, 1024), (65536, 256), (4096, 4096), (65536, 10)]  # batch, features
PARAMETERS = [2**18, 2**22, 2**25]


class Work(NamedTuple):
    """One operator on preallocated arrays; a product has some `flop`."""

    operator: str
    shape: tuple[int, ...]
    call: Callable[[], object]
    flop: float = 0.0
    precision: str = "float32"
    moved: float = 0.0  # bytes at least


def main() -> None:
    """Measure every row, print, append."""
    given = options(__doc__)
    torch, where = torch_device(given.dry_run)
    table = Table(given.out / "operators.csv")
    with device(given.dry_run) as cupy:
        clock = Clock(cupy, torch, given.dry_run)
        peaks = roof(cupy, given.dry_run)
        for work in works(cupy, given.dry_run):
            from backprop_kernels import cuda

            def often(work: Work = work) -> None:
                for _ in range(REPEATS):
                    work.call()

            contenders = {"ours": cuda.capture(often)}
            if torch is not None:
                bare = product(torch, where, work) if work.flop else copy(torch, where, work)
                contenders["yardstick"] = graph(torch, bare, given.dry_run)
            times = clock.interleaved(contenders, 0.0 if given.dry_run else SECONDS)
            ours = times["ours"] / REPEATS
            yardstick = times.get("yardstick", float("nan")) / REPEATS
            table.add(
                operator=work.operator, shape="x".join(map(str, work.shape)),
                precision=work.precision, us=ours * 1e6,
                rate=(work.flop or work.moved) / ours / 1e9,
                unit="GFLOP/s" if work.flop else "GB/s",
                yardstick="cuBLAS" if work.flop else "device copy", yardstick_us=yardstick * 1e6,
                ratio=ours / yardstick,
                roofline=peaks.seconds(work.flop, work.precision, work.moved) / ours,
            )  # fmt: skip


def works(cupy: Any, dry: bool) -> Iterator[Work]:
    """The rows of the table."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return cupy.asarray(rng.standard_normal(shape, dtype=np.float32))

    tiny = [(40, 30, 20)] if dry else None
    for batch, i, o in tiny or GRID:
        yield from products(cupy, normal, "bf16", batch, i, o)
    for batch, features in [(40, 30)] if dry else ARRAYS:
        yield from passes(cupy, normal, batch, features)
    for count in [1000] if dry else PARAMETERS:
        yield update(cupy, normal, count)
    for precision in ("tf32", "bf16x6", "bf16x3", "float32", "fp16"):
        for batch, i, o in tiny or PRODUCTS:
            yield from products(cupy, normal, precision, batch, i, o)


def products(cupy: Any, normal: Any, precision: str, batch: int, i: int, o: int) -> Iterator[Work]:
    from backprop_kernels import cuda
    from backprop_kernels.cuda.in_precision import InPrecision

    backend: Any = cuda if precision == "float32" else InPrecision(precision)

    def stored(*shape: int) -> Any:
        values = normal(*shape)
        if precision == "float32":
            return values
        rounded = cupy.empty(shape, backend.stored)
        backend.cast(values, rounded)
        return rounded

    X, W, dZ = stored(batch, i), stored(o, i), stored(batch, o)
    Y, saved, dX = stored(batch, o), stored(batch, o), stored(batch, i)
    b, db, dW = normal(o), normal(i), normal(o, i)
    of_X, of_dZ, of_both = _made_before(backend, X, dZ, dW)
    shape, flop = (batch, i, o), 2.0 * batch * i * o
    operands = float(X.nbytes + W.nbytes + Y.nbytes)
    for name, call, more in (
        (
            "linear_forward",
            lambda: backend.linear_forward(X, W, b, "gelu", None, (Y, saved), **of_X),
            Y.nbytes,
        ),
        ("linear_forward bare", lambda: backend.linear_forward(X, W, out=(Y, None), **of_X), 0),
        (
            "linear_dgrad",
            lambda: backend.linear_dgrad(dZ, W, X, "gelu", None, (dX, db), **of_dZ),
            X.nbytes,
        ),
        ("linear_dgrad bare", lambda: backend.linear_dgrad(dZ, W, out=(dX, None), **of_dZ), 0),
        (
            "linear_wgrad bare",
            lambda: backend.linear_wgrad(dZ, X, dW, **of_both),
            dW.nbytes - W.nbytes,
        ),
    ):
        yield Work(name, shape, call, flop, precision, operands + more)
    updates = updating(cupy, None if precision == "float32" else precision, dZ, X, dW)
    if updates is not None:
        more = 6 * dW.nbytes - W.nbytes  # W and both moments in and out
        yield Work("linear_wgrad", shape, updates, flop, precision, operands + more)


def updating(
    cupy: Any, precision: str | None, dZ: Any, X: Any, dW: Any
) -> Callable[[], object] | None:
    """linear_wgrad that updates a weight by AdamW, where the kernel has the whole sum."""
    from backprop_kernels.cuda.linear_wgrad import WeightUpdate, can_update, chosen, squares, wgrad
    from backprop_kernels.cuda.optimizer_step import rule_text
    from backprop_kernels.optimizers import OPTIMIZERS

    choice, row = chosen(precision, dZ, X, dW), OPTIMIZERS["AdamW"]
    if precision == "fp16" or not can_update(choice):  # a loss scale is the host's
        return None
    numbers = row.scalars(1, **row.options)
    update = WeightUpdate(
        rule_text("AdamW", len(numbers), True), *(cupy.zeros(dW.shape, np.float32) for _ in "Wmv"),
        cupy.asarray(np.array(numbers)), cupy.asarray(np.ones(1, np.uint32)),
        cupy.empty((squares(choice),), np.float64),
    )  # fmt: skip
    return lambda: wgrad(precision, None, dZ, X, dW, update=update)


def _made_before(backend: Any, X: Any, dZ: Any, dW: Any) -> tuple[dict[str, Any], ...]:
    """What in a training step the products before have done for each of the three in tf32."""
    from backprop_kernels.cuda.transpose import transposed

    if not (hasattr(backend, "reads_rounded") and backend.reads_rounded(dW)):
        return {}, {}, {}
    copies = None, None
    if backend.reads_along_batch(dZ, dW):
        copies = transposed(dZ), transposed(X)
    return {"X_rounded": True}, {"dZ_rounded": True}, {"copies": copies}


def passes(cupy: Any, normal: Any, batch: int, features: int) -> Iterator[Work]:
    """What reads and writes a whole array: bytes are the least that must move."""
    from backprop_kernels import cuda

    X, dZ, Y, saved, dX = (normal(batch, features) for _ in range(5))
    gamma, beta, db, dgamma, column, square = (normal(features) for _ in range(6))
    row, width = normal(batch), normal(batch)
    ids = cupy.asarray(np.arange(batch) % features)
    order = cupy.asarray(np.random.default_rng(0).permutation(batch))
    value = cupy.empty((), np.float64)
    shape, once = (batch, features), 4.0 * batch * features
    yield Work(
        "loss cross_entropy", shape,
        lambda: cuda.loss(X, ids, "cross_entropy", out=(value, dX, db)), moved=2 * once,
    )  # fmt: skip
    yield Work("loss mse", shape, lambda: cuda.loss(X, dZ, out=(value, dX, db)), moved=3 * once)
    yield Work(
        "layer_norm_forward", shape,
        lambda: cuda.layer_norm_forward(X, gamma, beta, out=(Y, None, row, width)), moved=2 * once,
    )  # fmt: skip
    yield Work(
        "layer_norm_backward", shape,
        lambda: cuda.layer_norm_backward(
            dZ, X, gamma, row, width, saved, "gelu", out=(dX, db, dgamma)
        ), moved=4 * once,
    )  # fmt: skip
    yield Work(
        "batch_norm_forward", shape,
        lambda: cuda.batch_norm_forward(
            X, gamma, beta, column, square, out=(Y, None, dgamma, db)
        ), moved=3 * once,
    )  # fmt: skip
    yield Work(
        "batch_norm_backward", shape,
        lambda: cuda.batch_norm_backward(
            dZ, X, gamma, column, square, saved, "gelu", out=(dX, db, dgamma)
        ), moved=6 * once,
    )  # fmt: skip
    yield Work("gather_rows", shape, lambda: cuda.gather_rows(X, order, Y), moved=2 * once)


def update(cupy: Any, normal: Any, count: int) -> Work:
    from backprop_kernels import cuda
    from backprop_kernels.optimizers import OPTIMIZERS

    P, G = normal(count), normal(count)
    state = [cupy.zeros(count, np.float32) for _ in range(2)]
    row = OPTIMIZERS["AdamW"]
    scalars = cupy.asarray(np.array([1.0, *row.scalars(1, **row.options)]))
    norm = cupy.empty((), np.float64)
    return Work(
        "optimizer_step AdamW", (count,),
        lambda: cuda.optimizer_step(P, G, state, scalars, "AdamW", None, norm),
        moved=8 * 4.0 * count,  # G twice, P and both moments in and out
    )  # fmt: skip


def product(torch: Any, where: str, work: Work) -> Callable[[], object]:
    """The same product, and nothing else."""
    batch, i, o = work.shape
    dtype = operand(torch, work.precision)
    X, W, dZ = (torch.randn(s, device=where).to(dtype) for s in ((batch, i), (o, i), (batch, o)))
    A, B = {"forward": (X, W.T), "dgrad": (dZ, W), "wgrad": (dZ.T, X)}[
        work.operator.removeprefix("linear_").removesuffix(" bare")
    ]
    C = torch.empty(A.shape[0], B.shape[1], device=where, dtype=dtype)
    return lambda: torch.mm(A, B, out=C)


def operand(torch: Any, precision: str) -> Any:
    """PyTorch's dtype for what is multiplied; TF32 is on from here on where it is asked for."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def copy(torch: Any, where: str, work: Work) -> Callable[[], object]:
    """As many bytes, half of them read and half written."""
    source, target = (torch.zeros(int(work.moved / 8), device=where) for _ in range(2))
    return lambda: target.copy_(source)


def graph(torch: Any, call: Callable[[], object], dry: bool) -> Callable[[], object]:
    """REPEATS calls in one CUDA graph."""

    def often() -> None:
        for _ in range(REPEATS):
            call()

    if dry:
        return often
    often()  # cuBLAS allocates its workspace now
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        often()
    replay: Callable[[], object] = captured.replay
    return replay


if __name__ == "__main__":
    main()
