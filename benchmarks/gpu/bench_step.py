"""A whole training step on a GPU beside the bare products of that step.

`python benchmarks/gpu/bench_step.py`: the products are cuBLAS's in the same precision, in one CUDA
graph, and `graph_by_bare` is the headline; `roofline` is the least time of the products by the
device's highest clocks over ours. Then our step as a graph replay, as called from Python without a
look at its loss, also on arrays of the host, and with its loss read back; `apart` is `graph` with
the update as a pass of its own. PyTorch eager, and PyTorch compiled, with a CUDA graph; both with
fused AdamW, for bf16 under autocast. Other data is on the device, all N(0, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from bench_operators import REPEATS, graph, operand
from measure import Clock, Table, device, options, torch_device
from roofline import roof

SECONDS = 3.0  # per row
# batch, widths
SHAPES = [
    (64, [64, 64, 64, 10]),
    (256, [128, 256, 256, 10]),
    (256, [784, 1024, 1024, 10]),
    (1024, [155, 256, 128, 1]),
    (1024, [784, 1024, 1024, 10]),
    (8192, [128, 256, 256, 10]),
    (1024, [2048, 2048, 2048, 10]),
    (8192, [2048, 2048, 2048, 10]),
    (8192, [4096, 4096, 4096, 10]),
    (65536, [64, 64, 64, 1]),
]
# On tensor cores: batch and width, where most of a large network's time is, and small networks.
GRID = [(8192, 4096), (8192, 8192), (8192, 2048), (8192, 1024), (4096, 4096), (1024, 1024),
        (16384, 4096), (16384, 8192), (1024, 4096), (4096, 1024), (65536, 4096)]  # fmt: skip
LARGE = [(batch, [n, n, n, 10]) for batch, n in GRID]
SMALL = [(2**18, [64, 64, 64, 64, 64, 1]), (2**18, [128, 128, 128, 128, 128, 1]),
         (2**14, [64, 64, 64, 64, 64, 1])]  # fmt: skip
Contenders = dict[str, Callable[[], object]]


def main() -> None:
    """Measure every shape, print, append."""
    given = options(__doc__)
    torch, where = torch_device(given.dry_run)
    table = Table(given.out / "step.csv")
    with device(given.dry_run) as cupy:
        clock = Clock(cupy, torch, given.dry_run)
        peaks = roof(cupy, given.dry_run)
        rows = [("bf16", *shape) for shape in (*LARGE[:4], *SMALL, *LARGE[4:])]
        rows += [("float32", *shape) for shape in SHAPES]
        rows += [(p, *shape) for p in ("tf32", "bf16x6", "bf16x3") for shape in LARGE[:4]]
        if given.dry_run:
            rows = [(precision, 16, [9, 12, 3]) for precision in ("float32", "bf16")]
        for precision, batch, widths in rows:
            contenders = {**ours(precision, batch, widths)}
            contenders["apart"] = ours(precision, batch, widths, fused=False)["graph"]
            if torch is not None:
                contenders |= theirs(torch, where, precision, batch, widths, given.dry_run)
            times = clock.interleaved(contenders, 0.0 if given.dry_run else SECONDS)
            times["bare"] = times.get("bare", float("nan")) / REPEATS
            table.add(
                batch=batch, widths="-".join(map(str, widths)), precision=precision,
                **{f"{name}_us": t * 1e6 for name, t in times.items()},
                **{f"{n}_by_bare": t / times["bare"] for n, t in times.items() if n != "bare"},
                roofline=peaks.seconds(flops(batch, widths), precision, 0.0) / times["graph"],
            )  # fmt: skip


def flops(batch: int, widths: list[int]) -> float:
    """Of the bare products: three of each layer, but two of the first."""
    sizes = [i * o for i, o in pairwise(widths)]
    return 2.0 * batch * (3 * sum(sizes) - sizes[0])


def ours(
    precision: str, batch: int, widths: list[int], by_layers: bool = False, fused: bool = True
) -> Contenders:
    """`graph`: the captured step, launched and not waited for. `queued`: as called from Python.
    `fed`: on arrays of the host. `step`: with its loss as a number."""
    import backprop as bp

    rng = np.random.default_rng(0)
    X = rng.standard_normal((batch, widths[0]), dtype=np.float32)
    classes = widths[-1] > 1
    y = rng.integers(0, widths[-1], batch) if classes else np.zeros((batch, 1), np.float32)
    model = bp.MLP(widths, device="cuda")
    loss = "cross_entropy" if classes else "mse"
    step = bp.TrainStep(model, loss, bp.AdamW(lr=1e-4), batch, precision=precision,
                        fused_update=fused)  # fmt: skip
    step.gradients.keeps_activations = by_layers
    host = step.gradients.inputs(X, y, None, "bench_step", finite=False)
    arrays = [model.memory.place(array) for array in host]
    step.run(*arrays)
    program = step.prepare(*arrays)
    return {
        "graph": lambda: program(*arrays),
        "queued": lambda: step.run(*arrays),
        "fed": lambda: step.run(*host),
        "step": lambda: float(step.run(*arrays)),
    }


def theirs(
    torch: Any, where: str, precision: str, batch: int, widths: list[int], dry: bool
) -> Contenders:
    """The bare products, and PyTorch in two ways."""
    dtype = operand(torch, precision)
    found = {"bare": graph(torch, bare(torch, where, dtype, batch, widths), dry)}
    X = torch.randn(batch, widths[0], device=where)
    classes = widths[-1] > 1
    y = (
        torch.randint(0, widths[-1], (batch,), device=where)
        if classes
        else torch.zeros(batch, 1, device=where)
    )
    found["eager"] = trained(torch, where, dtype, widths, X, y, compiled=False)
    if not dry:
        found["compiled"] = trained(torch, where, dtype, widths, X, y, compiled=True)
    return found


def bare(torch: Any, where: str, dtype: Any, batch: int, widths: list[int]) -> Callable[[], object]:
    """The step's products: forward, weight gradients, all deltas but the first layer's."""
    products = []
    for layer, (i, o) in enumerate(pairwise(widths)):
        shapes = ((batch, i), (o, i), (batch, o))
        X, W, dZ = (torch.randn(s, device=where).to(dtype) for s in shapes)
        products += [(X, W.T, torch.empty_like(dZ)), (dZ.T, X, torch.empty_like(W))]
        if layer:
            products.append((dZ, W, torch.empty_like(X)))

    def run() -> None:
        for A, B, C in products:
            torch.mm(A, B, out=C)

    return run


def trained(
    torch: Any, where: str, dtype: Any, widths: list[int], X: Any, y: Any, compiled: bool
) -> Callable[[], object]:
    """Eager as most people write it; compiled with everything that makes it fast."""
    layers: list[Any] = []
    for i, o in pairwise(widths):
        layers += [torch.nn.Linear(i, o), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1]).to(where)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, fused=True, capturable=compiled and where == "cuda"
    )
    loss = torch.nn.CrossEntropyLoss() if widths[-1] > 1 else torch.nn.MSELoss()

    def forward(X: Any, y: Any) -> Any:
        with torch.autocast(where, dtype, enabled=dtype != torch.float32):
            return loss(model(X), y)

    if compiled:
        forward = torch.compile(forward, mode="max-autotune-no-cudagraphs")

    def run() -> None:
        optimizer.zero_grad(set_to_none=not compiled)
        forward(X, y).backward()
        optimizer.step()

    if not compiled:
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up beside the stream that will be captured
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    replay: Callable[[], object] = captured.replay
    return replay


if __name__ == "__main__":
    main()
