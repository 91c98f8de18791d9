"""Training time on the flights beside scikit-learn's MLPClassifier: `make bench`.

One process, the same network, batch size, epochs, optimizer and thread count; after each of our
epochs comes one of scikit-learn's, so that a busy machine slows both. Then the same AUC with fewer
epochs, by a schedule that scikit-learn's Adam has no counterpart of. Prints one table and appends
one line to results/flights.csv.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

from backprop_kernels.cpu.threads import available_cpus, set_num_threads
from common import SETTLE, append, machine
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits

import backprop as bp
from backprop import flights
from backprop.metrics import auc

HIDDEN = (256, 128)
LR = 1e-3
CYCLE_EPOCHS, CYCLE_LR = 4, 8e-3  # reach the AUC of 8 epochs at LR
RESULTS = Path(__file__).parent / "results" / "flights.csv"


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=1024)
    options = parser.parse_args()
    data = flights.load("random", seed=0)
    row = measure(data, options.threads, options.epochs, options.batch_size)
    print(
        f"{len(data.y_train):,} flights, {data.X_train.shape[1]} columns, hidden {HIDDEN}, ", end=""
    )
    print(f"batch {options.batch_size}, {options.epochs} epochs, {options.threads} thread(s) each")
    print(f"{'':<24} {'median epoch':>12} {'all epochs':>12} {'first epoch':>12} {'AUC':>8}")
    cycle = f"one_cycle, {CYCLE_EPOCHS} epochs"
    for name, short in (("fused-backprop", "ours"), ("scikit-learn", "sklearn"), (cycle, "cycle")):
        numbers = [float(row[f"{short}_{what}"]) for what in ("epoch", "total", "first", "auc")]
        print("{:<24} {:10.3f} s {:10.2f} s {:10.2f} s {:8.4f}".format(name, *numbers))
    print(f"{'scikit-learn ÷ ours':<24} {row['ratio_epoch']:>12} {row['ratio_total']:>12}")
    print(f"{'scikit-learn ÷ one_cycle':<24} {'':>12} {row['ratio_cycle']:>12}")
    append(RESULTS, {**row, **machine("scikit-learn")})


def measure(
    data: flights.FlightsData, threads: int, epochs: int, batch_size: int
) -> dict[str, str]:
    """Seconds of each epoch of both, interleaved, and both AUCs."""
    X, y = data.X_train, data.y_train
    set_num_threads(threads)
    theirs = MLPClassifier(
        HIDDEN, solver="adam", learning_rate_init=LR, batch_size=batch_size, alpha=0.0,
        random_state=0,
    )  # fmt: skip
    sklearn_seconds: list[float] = []

    def sklearn_epoch(epoch: int, history: bp.History) -> None:
        started = time.perf_counter()
        with threadpool_limits(threads):
            theirs.partial_fit(X, y, classes=[0.0, 1.0])
        sklearn_seconds.append(time.perf_counter() - started)
        time.sleep(SETTLE)

    ours = bp.MLP([X.shape[1], *HIDDEN, 1])
    started = time.perf_counter()
    history = bp.fit(
        ours, X, y, "bce_with_logits", bp.Adam(lr=LR), epochs, batch_size,
        callbacks=[sklearn_epoch], progress=False,
    )  # fmt: skip
    # What our fit took besides: checking the data, and compiling on a machine's first run.
    total = time.perf_counter() - started - sum(sklearn_seconds) - SETTLE * epochs
    sooner = bp.MLP([X.shape[1], *HIDDEN, 1])
    started = time.perf_counter()
    cycle = bp.fit(
        sooner, X, y, "bce_with_logits", bp.Adam(lr=CYCLE_LR), CYCLE_EPOCHS, batch_size,
        schedule="one_cycle", progress=False,
    )  # fmt: skip
    cycle_total = time.perf_counter() - started
    epoch, sklearn_epoch_median = median(history["seconds"]), median(sklearn_seconds)
    numbers = {
        "ours_epoch": epoch,
        "sklearn_epoch": sklearn_epoch_median,
        "ratio_epoch": sklearn_epoch_median / epoch,
        "ours_first": history["seconds"][0],
        "sklearn_first": sklearn_seconds[0],
        "ours_total": total,
        "sklearn_total": sum(sklearn_seconds),
        "ratio_total": sum(sklearn_seconds) / total,
        "ours_auc": auc(data.y_valid, ours.predict(data.X_valid)[:, 0]),
        "sklearn_auc": auc(data.y_valid, theirs.predict_proba(data.X_valid)[:, 1]),
        "cycle_epoch": median(cycle["seconds"]),
        "cycle_first": cycle["seconds"][0],
        "cycle_total": cycle_total,
        "ratio_cycle": sum(sklearn_seconds) / cycle_total,
        "cycle_auc": auc(data.y_valid, sooner.predict(data.X_valid)[:, 0]),
    }
    settings = {"threads": threads, "batch": batch_size, "epochs": epochs}
    return {
        **{name: str(value) for name, value in settings.items()},
        **{name: f"{value:.4f}" for name, value in numbers.items()},
    }


if __name__ == "__main__":
    main()
