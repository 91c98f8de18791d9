"""Batches of 32 to 1,024 rows: what a larger batch costs, and what its learning rate wins back.

docs/optimisation.md#batch-size
"""

from __future__ import annotations

import numpy as np

import backprop as bp

ROWS, EPOCHS = 8192, 4


def r2(batch_size: int, lr: float) -> float:
    """R² on rows unseen, after 4 epochs of Adam."""
    X, y = bp.datasets.friedman(ROWS + 2000, seed=0)
    y = (y - y.mean()) / y.std()
    model = bp.MLP([10, 64, 64, 1], "tanh", dtype="float64", seed=0)
    history = bp.fit(
        model, X[:ROWS], y[:ROWS], "mse", bp.Adam(lr=lr), EPOCHS, batch_size, progress=False,
        eval_set=(X[ROWS:], y[ROWS:]), metrics="r2", schedule="cosine",
    )  # fmt: skip
    return history["val_r2"][-1]


def main() -> None:
    print("batch  steps  R² at lr 0.001  R² at lr 0.001 √(batch/32)")
    for batch_size in 2 ** np.arange(5, 11):
        fixed = r2(int(batch_size), 1e-3)
        scaled = r2(int(batch_size), 1e-3 * float(np.sqrt(batch_size / 32)))
        steps = EPOCHS * ROWS // batch_size
        print(f"{batch_size:5}  {steps:5}  {fixed:14.2f}  {scaled:26.2f}")


if __name__ == "__main__":
    main()
