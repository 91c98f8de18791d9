"""A whole training step beside the bare matrix products of that step: `make bench-step`.

The products are PyTorch's `mm(out=)`, which is MKL: forward, the weight gradient of every layer,
the delta of every layer but the first. In the same process, interleaved, on as many threads: the
same products by NumPy, which is OpenBLAS; our step; PyTorch's, eager and compiled, with fused Adam;
scikit-learn's `partial_fit` on the batch.
Prints a line per row of SHAPES and appends it to results/step.csv. `--phases` shows instead where
the time of our step goes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backprop_kernels.arrays import Array
from backprop_kernels.cpu.threads import available_cpus
from common import append, draw, interleaved, machine
from sklearn.neural_network import MLPClassifier, MLPRegressor
from threadpoolctl import threadpool_limits

import backprop as bp
from backprop import flights
from backprop.batches import mostly_zeros

# batch, widths
SHAPES = [
    (64, [64, 64, 64, 10]),
    (256, [128, 256, 256, 10]),
    (256, [784, 1024, 1024, 10]),
    (1024, [784, 1024, 1024, 10]),
    (1024, [2048, 2048, 2048, 10]),
    (4096, [64, 128, 128, 1]),
    (1024, [155, 256, 128, 1]),  # the flights: X is theirs, mostly 0
]
CONTENDERS = ["bare", "openblas", "ours", "pytorch", "compile", "sklearn"]
# So small that thousands of steps on one batch do not learn it by heart: gradients that have
# vanished are denormal numbers, which every library computes many times slower.
LEARNING_RATE = 1e-6
RESULTS = Path(__file__).parent / "results" / "step.csv"


def main() -> None:
    """Measure every shape, print, append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--seconds", type=float, default=6.0, help="per shape")
    parser.add_argument(
        "--rows", type=int, nargs="*", help="of the table, from 0; all if not given"
    )
    parser.add_argument("--phases", action="store_true", help="a table of operators for each shape")
    parser.add_argument(
        "--only", nargs="*", choices=CONTENDERS, default=CONTENDERS, help="which to measure"
    )
    options = parser.parse_args()
    bp.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    shapes = [SHAPES[i] for i in options.rows] if options.rows else SHAPES
    if options.phases:
        for batch, widths in shapes:
            X, y, step = ours(batch, widths)
            print(f"{batch}, {widths}\n{bp.profile(step, X, y, seconds=options.seconds / 2)}\n")
        return
    names = [name for name in CONTENDERS if name in options.only or name == "bare"]
    print(f"{'batch, widths':<32}{'bare us':>9}", *(f"{n:>9}" for n in names[1:]), "  (÷ bare)")
    for batch, widths in shapes:
        with threadpool_limits(options.threads):
            times = interleaved(contenders(batch, widths, names), options.seconds)
        bare = times["bare"][0]
        ratios = (f"{times[name][0] / bare:9.2f}" for name in names[1:])
        print(f"{f'{batch}, {widths}':<32}{bare * 1e6:9.0f}", *ratios, flush=True)
        row = {"batch": str(batch), "widths": "-".join(map(str, widths))}
        row["threads"] = str(options.threads)
        for name, (middle, best) in times.items():
            row[f"{name}_median_us"] = f"{middle * 1e6:.1f}"
            row[f"{name}_best_us"] = f"{best * 1e6:.1f}"
        append(RESULTS, {**row, **machine("torch", "scikit-learn")})


def ours(batch: int, widths: list[int]) -> tuple[Array, Array, bp.TrainStep]:
    """X, y and a step of ours."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((batch, widths[0]), dtype=np.float32)
    if widths[0] == 155:
        X = np.ascontiguousarray(flights.load("random").X_train[:batch])
    classes = widths[-1] > 1
    y = rng.integers(0, widths[-1], batch) if classes else X[:, :1].copy()
    loss, optimizer = "cross_entropy" if classes else "mse", bp.Adam(lr=LEARNING_RATE)
    sparse = mostly_zeros(X, batch)
    return X, y, bp.TrainStep(bp.MLP(widths), loss, optimizer, batch, sparse_input=sparse)


def contenders(batch: int, widths: list[int], names: list[str]) -> dict[str, Callable[[], object]]:
    """What is to be timed, on the same data."""
    X, y, step = ours(batch, widths)
    tensors = torch.from_numpy(X), torch.from_numpy(y)
    make: dict[str, Callable[[], Callable[[], object]]] = {
        "bare": lambda: bare(batch, widths, torch.mm, torch.from_numpy),
        "openblas": lambda: bare(batch, widths, np.matmul, np.asarray),
        "ours": lambda: lambda: step(X, y),
        "pytorch": lambda: pytorch(widths, *tensors, compiled=False),
        "compile": lambda: pytorch(widths, *tensors, compiled=True),
        "sklearn": lambda: sklearn(widths, X, y),
    }
    return {name: make[name]() for name in names}


def bare(
    batch: int, widths: list[int], multiply: Callable[..., Any], array: Callable[[Array], Any]
) -> Callable[[], object]:
    """The step's matrix products and nothing else, on what `array` makes of NumPy's."""
    products = []
    for layer, (i, o) in enumerate(pairwise(widths)):
        X, W, dZ = (array(draw(*s, dtype="float32")) for s in ((batch, i), (o, i), (batch, o)))
        Y, dW, dX = (array(np.empty(s, np.float32)) for s in ((batch, o), (o, i), (batch, i)))
        products += [(X, W.T, Y), (dZ.T, X, dW), (dZ, W, dX)][: 3 if layer else 2]

    def run() -> None:
        for A, B, C in products:
            multiply(A, B, out=C)

    return run


def pytorch(
    widths: list[int], X: torch.Tensor, y: torch.Tensor, compiled: bool
) -> Callable[[], object]:
    """PyTorch as most people write it, with its fastest optimizer."""
    layers: list[torch.nn.Module] = []
    for i, o in pairwise(widths):
        layers += [torch.nn.Linear(i, o), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    loss = torch.nn.CrossEntropyLoss() if widths[-1] > 1 else torch.nn.MSELoss()

    def forward(X: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = loss(model(X), y)
        return value

    if compiled:  # forward, and with it backward; the optimizer is one fused kernel already
        forward = torch.compile(forward)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward(X, y).backward()
        optimizer.step()

    return run


def sklearn(widths: list[int], X: Array, y: Array) -> Callable[[], object]:
    """One step of scikit-learn's: `partial_fit` on one batch."""
    kind = MLPClassifier if widths[-1] > 1 else MLPRegressor
    model = kind(
        hidden_layer_sizes=widths[1:-1],
        solver="adam",
        alpha=0.0,
        batch_size=len(X),
        learning_rate_init=LEARNING_RATE,
        random_state=0,
    )
    if widths[-1] > 1:
        return lambda: model.partial_fit(X, y, classes=range(widths[-1]))
    return lambda: model.partial_fit(X, y.ravel())


if __name__ == "__main__":
    main()
