"""Training time on the flights beside scikit-learn's MLPClassifier: `make bench`.

One process, the same network, batch size, epochs, optimizer and thread count; after each of our
epochs comes one of scikit-learn's, so that a busy machine slows both. Then the same AUC with fewer
epochs, by a schedule that scikit-learn's Adam has no counterpart of. All that from several seeds:
AUCs differ by more from seed to seed than from one program to the other. Prints one table, times
medians and AUCs means over the seeds, and appends one line to results/flights.csv.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

from backprop_kernels.cpu.threads import available_cpus, set_num_threads
from common import SETTLE, append, machine
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits

import backprop as bp
from backprop import flights
from backprop.metrics import auc

HIDDEN = (256, 128)
LR = 1e-3
# Reaches the AUC of 8 epochs at LR. Picked on a tenth of the training rows, held out of the others.
CYCLE_EPOCHS, CYCLE_LR, CYCLE_BETAS = 3, 1e-2, (0.8, 0.99)
RESULTS = Path(__file__).parent / "results" / "flights.csv"


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    settings = {"threads": options.threads, "batch": options.batch_size, "epochs": options.epochs}
    set_num_threads(options.threads)
    data = flights.load("random", seed=0)
    every = [measure(data, seed=seed, **settings) for seed in range(options.seeds)]
    found = {
        name: (mean if name.endswith("auc") else median)([one[name] for one in every])
        for name in every[0]
    }
    print(
        f"{len(data.y_train):,} flights, {data.X_train.shape[1]} columns, hidden {HIDDEN}, ", end=""
    )
    print(f"batch {options.batch_size}, {options.epochs} epochs, {options.threads} thread(s) each,")
    print(f"{options.seeds} seed(s): median times, mean AUC (lowest to highest)")
    print(f"{'':<24} {'an epoch':>10} {'all epochs':>12} {'AUC':>8}")
    cycle = f"one_cycle, {CYCLE_EPOCHS} epochs"
    for name, short in (("fused-backprop", "ours"), ("scikit-learn", "sklearn"), (cycle, "cycle")):
        epoch, total, score = (found[f"{short}_{what}"] for what in ("epoch", "total", "auc"))
        aucs = sorted(one[f"{short}_auc"] for one in every)
        print(f"{name:<24} {epoch:8.3f} s {total:10.2f} s {score:8.4f}", end="")
        print(f" ({aucs[0]:.4f} to {aucs[-1]:.4f})")
    for name, short in (("scikit-learn ÷ ours", "total"), ("scikit-learn ÷ one_cycle", "cycle")):
        ratios = sorted(one[f"ratio_{short}"] for one in every)
        print(f"{name:<24} {found[f'ratio_{short}']:23.2f}   ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    print(f"{'epoch by epoch':<24} {found['ratio_epoch']:10.2f}")
    numbers = {name: f"{value:.4f}" for name, value in found.items()}
    given = {name: str(value) for name, value in settings.items()}
    append(RESULTS, {**given, **numbers, "seeds": str(options.seeds), **machine("scikit-learn")})


def measure(
    data: flights.FlightsData, threads: int, batch: int, epochs: int, seed: int
) -> dict[str, float]:
    """Seconds of each epoch of both, interleaved, and the AUCs."""
    X, y = data.X_train, data.y_train
    theirs = MLPClassifier(
        HIDDEN, solver="adam", learning_rate_init=LR, batch_size=batch, alpha=0.0,
        random_state=seed,
    )  # fmt: skip
    sklearn_seconds: list[float] = []

    def sklearn_epoch(epoch: int, history: bp.History) -> None:
        started = time.perf_counter()
        with threadpool_limits(threads):
            theirs.partial_fit(X, y, classes=[0.0, 1.0])
        sklearn_seconds.append(time.perf_counter() - started)
        time.sleep(SETTLE)

    def fit(model: bp.Sequential, optimizer: bp.Optimizer, epochs: int, **options: Any) -> Any:
        started = time.perf_counter()
        history = bp.fit(
            model, X, y, "bce_with_logits", optimizer, epochs, batch, seed=seed, progress=False,
            **options,
        )  # fmt: skip
        return history["seconds"], time.perf_counter() - started

    ours, sooner = (bp.MLP([X.shape[1], *HIDDEN, 1], seed=seed) for _ in range(2))
    seconds, total = fit(ours, bp.Adam(lr=LR), epochs, callbacks=[sklearn_epoch])
    # What our fit took besides: checking the data, and compiling on a machine's first run.
    total -= sum(sklearn_seconds) + SETTLE * epochs
    cycle = bp.Adam(lr=CYCLE_LR, betas=CYCLE_BETAS)
    cycle_seconds, cycle_total = fit(sooner, cycle, CYCLE_EPOCHS, schedule="one_cycle")
    epoch, sklearn_epoch_median = median(seconds), median(sklearn_seconds)
    return {
        "ours_epoch": epoch,
        "sklearn_epoch": sklearn_epoch_median,
        "ratio_epoch": sklearn_epoch_median / epoch,
        "ours_first": seconds[0],
        "sklearn_first": sklearn_seconds[0],
        "ours_total": total,
        "sklearn_total": sum(sklearn_seconds),
        "ratio_total": sum(sklearn_seconds) / total,
        "ours_auc": auc(data.y_valid, ours.predict(data.X_valid)[:, 0]),
        "sklearn_auc": auc(data.y_valid, theirs.predict_proba(data.X_valid)[:, 1]),
        "cycle_epoch": median(cycle_seconds),
        "cycle_first": cycle_seconds[0],
        "cycle_total": cycle_total,
        "ratio_cycle": sum(sklearn_seconds) / cycle_total,
        "cycle_auc": auc(data.y_valid, sooner.predict(data.X_valid)[:, 0]),
    }


if __name__ == "__main__":
    main()
