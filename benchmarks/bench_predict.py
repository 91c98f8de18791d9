"""Few rows, again and again, as a service predicts them: `make bench-predict`.

The flights' network on 1, 64 and 1,024 rows: ours, PyTorch eager without gradients, and
scikit-learn's `predict_proba`, in turns. Prints microseconds a call and appends a line per row
count to results/predict.csv.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from backprop_kernels.cpu.threads import available_cpus
from common import append, interleaved, machine
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits

import backprop as bp

WIDTHS = [155, 256, 128, 1]
RESULTS = Path(__file__).parent / "results" / "predict.csv"


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 64, 1024])
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--seconds", type=float, default=6.0, help="per row count")
    options = parser.parse_args()
    bp.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    model = bp.MLP(WIDTHS)
    data = np.random.default_rng(0).standard_normal((max(options.rows), WIDTHS[0]), np.float32)
    layers: list[torch.nn.Module] = []
    for i, o in pairwise(WIDTHS):
        layers += [torch.nn.Linear(i, o), torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers[:-1])
    theirs = MLPClassifier(WIDTHS[1:-1]).partial_fit(data[:2], [0, 1], classes=[0, 1])
    print(f"{'rows':<8}{'ours us':>10}{'PyTorch us':>12}{'scikit-learn us':>17}")
    for rows in options.rows:
        X = data[:rows]
        tensor = torch.from_numpy(X)
        with threadpool_limits(options.threads), torch.inference_mode():
            times = interleaved(
                {
                    "ours": lambda X=X: model.predict(X),
                    "pytorch": lambda tensor=tensor: network(tensor),
                    "sklearn": lambda X=X: theirs.predict_proba(X),
                },
                options.seconds,
            )
        medians = {name: f"{middle * 1e6:.1f}" for name, (middle, _) in times.items()}
        print("{:<8}{:>10}{:>12}{:>17}".format(rows, *medians.values()), flush=True)
        row = {"rows": str(rows), "threads": str(options.threads)}
        row |= {f"{name}_us": us for name, us in medians.items()}
        append(RESULTS, {**row, **machine("torch", "scikit-learn")})


if __name__ == "__main__":
    main()
