"""A whole training step beside the bare matrix products of that step: `make bench-step`.

The products are PyTorch's `mm(out=)`, which is MKL: forward, the weight gradient of every layer,
the delta of every layer but the first. In the same process, interleaved, on as many threads:
our step, and PyTorch's eager step with fused Adam. Prints a line per row of SHAPES and appends it
to results/step.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from backprop_kernels.cpu.threads import available_cpus
from common import append, interleaved, machine

import backprop as bp

# batch, widths
SHAPES = [
    (64, [64, 64, 64, 10]),
    (256, [128, 256, 256, 10]),
    (256, [784, 1024, 1024, 10]),
    (1024, [784, 1024, 1024, 10]),
    (1024, [2048, 2048, 2048, 10]),
    (4096, [64, 128, 128, 1]),
    (1024, [155, 256, 128, 1]),
]
RESULTS = Path(__file__).parent / "results" / "step.csv"


def main() -> None:
    """Measure every shape, print, append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--seconds", type=float, default=6.0, help="per shape")
    options = parser.parse_args()
    bp.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    print(f"{'batch, widths':<32}{'bare us':>9}{'ours us':>9}{'ours':>7}{'PyTorch':>9}  (÷ bare)")
    for batch, widths in SHAPES:
        times = interleaved(contenders(batch, widths), options.seconds)
        bare, ours, eager = (times[name][0] for name in ("bare", "ours", "pytorch"))
        shape = f"{batch}, {widths}"
        print(
            f"{shape:<32}{bare * 1e6:9.0f}{ours * 1e6:9.0f}{ours / bare:7.2f}{eager / bare:9.2f}",
            flush=True,
        )
        row = {"batch": str(batch), "widths": "-".join(map(str, widths))}
        row["threads"] = str(options.threads)
        for name, (middle, best) in times.items():
            row[f"{name}_median_us"], row[f"{name}_best_us"] = (
                f"{middle * 1e6:.1f}",
                f"{best * 1e6:.1f}",
            )
        append(RESULTS, {**row, **machine("torch")})


def contenders(batch: int, widths: list[int]) -> dict[str, Callable[[], object]]:
    """The three things to time, on the same data."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((batch, widths[0]), dtype=np.float32)
    classes = widths[-1] > 1
    y = rng.integers(0, widths[-1], batch) if classes else np.zeros((batch, 1), np.float32)

    step = bp.TrainStep(bp.MLP(widths), "cross_entropy" if classes else "mse", "adam", batch)
    return {
        "bare": bare(batch, widths),
        "ours": lambda: step(X, y),
        "pytorch": eager(widths, torch.from_numpy(X), torch.from_numpy(y)),
    }


def bare(batch: int, widths: list[int]) -> Callable[[], object]:
    """The step's matrix products and nothing else."""
    products = []
    for layer, (i, o) in enumerate(pairwise(widths)):
        X, W, dZ = torch.randn(batch, i), torch.randn(o, i), torch.randn(batch, o)
        products.append((X, W.T, torch.empty(batch, o)))
        products.append((dZ.T, X, torch.empty(o, i)))
        if layer:
            products.append((dZ, W, torch.empty(batch, i)))

    def run() -> None:
        for A, B, C in products:
            torch.mm(A, B, out=C)

    return run


def eager(widths: list[int], X: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    """PyTorch as most people write it, with its fastest optimizer."""
    layers: list[torch.nn.Module] = []
    for i, o in pairwise(widths):
        layers += [torch.nn.Linear(i, o), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    loss = torch.nn.CrossEntropyLoss() if widths[-1] > 1 else torch.nn.MSELoss()

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model(X), y).backward()
        optimizer.step()

    return run


if __name__ == "__main__":
    main()
