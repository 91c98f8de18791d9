"""What sampling gradient health every 50 steps adds to a step, per cent.

python benchmarks/bench_health.py
"""

from __future__ import annotations

import time

import numpy as np

import backprop as bp
from backprop.callbacks import Training

SHAPES = (
    (64, [64, 64, 64, 10]),
    (256, [128, 256, 256, 10]),
    (256, [784, 1024, 1024, 10]),
)
EVERY = 50
WARM_UP = 20
SECONDS = 4.0


def main() -> None:
    print(f"{'batch':>6}  {'sizes':<22}{'step':>10}{'sampled':>10}  every {EVERY} adds")
    for batch, sizes in SHAPES:
        rng = np.random.default_rng(0)
        X = rng.standard_normal((batch, sizes[0])).astype(np.float32)
        y = rng.integers(0, sizes[-1], batch)
        step = bp.TrainStep(bp.MLP(sizes), "cross_entropy", bp.Adam(lr=1e-4), batch)
        training = Training(step.model, step, bp.History(), 1, batch, ())
        health = bp.Health(every=1)
        health.fit_begin(training)
        for _ in range(WARM_UP):  # compiles what it needs, and wakes the threads
            step(X, y)
        plain, sampled = [], []
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            started = time.perf_counter()
            step(X, y)
            between = time.perf_counter()
            health.step_begin(training)
            step(X, y)
            health.step_end(training)
            plain.append(between - started)
            sampled.append(time.perf_counter() - between)
        base, more = np.median(plain), np.median(sampled)
        share = (more - base) / EVERY / base
        print(
            f"{batch:6}  {'-'.join(map(str, sizes)):<22}{1e6 * base:7.0f} us{1e6 * more:7.0f} us"
            f"  {share:.2%}"
        )


if __name__ == "__main__":
    main()
