"""From eight digits to two others: how many steps does a trained trunk save?  docs/transfer.md

Every network learns to tell 8 from 9 from 40 images. One starts from scratch, one from a network
that has learned 0 to 7.
"""

from __future__ import annotations

import numpy as np

import backprop as bp

SEEDS = range(3)
IMAGES, TARGET = 40, 0.9  # to learn from; the accuracy on the others at which to stop
HIDDEN = [64, 64, 64]


def pretrained(X: np.ndarray, y: np.ndarray, seed: int) -> bp.Sequential:
    """A network that tells 0 to 7 apart."""
    model = bp.MLP([64, *HIDDEN, 8], "sigmoid", dtype="float64", seed=seed)
    known = y < 8
    bp.fit(
        model, X[known], y[known], "cross_entropy", bp.Adam(lr=3e-3), 20, 64, seed=seed,
        schedule="cosine", progress=False,
    )  # fmt: skip
    return model


def steps_to_target(model: bp.Sequential, X: np.ndarray, y: np.ndarray, seed: int) -> int:
    """Steps until the accuracy on held-out 8s and 9s first reaches the target; 300 if never."""
    order = np.random.default_rng(seed).permutation(np.flatnonzero(y >= 8))
    rows, rest = order[:IMAGES], order[IMAGES:]
    history = bp.fit(
        model, X[rows], y[rows] - 8, "cross_entropy", bp.SGD(lr=0.1, momentum=0.9), 300, IMAGES,
        seed=seed, eval_set=(X[rest], y[rest] - 8), metrics="accuracy", progress=False,
        callbacks=[lambda epoch, history: history["val_accuracy"][-1] >= TARGET],
    )  # fmt: skip
    return history.epochs  # one step an epoch


def main() -> None:
    X, y = bp.datasets.digits()
    fresh = []
    for seed in SEEDS:
        model = bp.MLP([64, *HIDDEN, 2], "sigmoid", dtype="float64", seed=seed)
        fresh.append(steps_to_target(model, X, y, seed))
    tuned = []
    for seed in SEEDS:
        model = pretrained(X, y, seed).with_head(2, init="zeros", seed=seed)
        tuned.append(steps_to_target(model, X, y, seed))
    for name, steps in (("from scratch", fresh), ("from 0 to 7", tuned)):
        print(f"{name:<12}  {np.median(steps):3.0f} steps to {TARGET:.0%} (seeds: {steps})")


if __name__ == "__main__":
    main()
