"""The 2-3-1 sigmoid network learns XOR.  docs/textbook_xor.md"""

from __future__ import annotations

import numpy as np

import backprop as bp

X = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
y = np.array([0.0, 1.0, 1.0, 0.0])
STEPS = 2000


def network(device: str = "auto", seed: int = 0) -> bp.Sequential:
    """Two inputs, three hidden sigmoids, one output sigmoid."""
    layers = [bp.Linear(2, 3, activation="sigmoid"), bp.Linear(3, 1, activation="sigmoid")]
    return bp.Sequential(layers, dtype="float64", device=device, seed=seed)


def train(model: bp.Sequential) -> list[float]:
    """The loss before each step of plain gradient descent on all four points."""
    step = bp.TrainStep(model, loss="mse", optimizer=bp.SGD(lr=5.0), batch_size=4)
    return [step(X, y) for _ in range(STEPS)]


def main() -> None:
    model = network()
    before = model.predict(X)
    losses = train(model)
    after = model.predict(X)

    print("input    target  before   after")
    for x, t, b, a in zip(X, y, before[:, 0], after[:, 0], strict=True):
        print(f"({x[0]:.0f}, {x[1]:.0f})   {t:.0f}       {b:.3f}   {a:.3f}")
    print()
    print(" step  loss")
    for n in (1, 10, 100, 500, STEPS):
        print(f"{n:5d}  {losses[n - 1]:.5f}")

    alone = bp.Sequential([bp.Linear(2, 1, activation="sigmoid")], dtype="float64")
    print(f"\nwithout the hidden layer, after {STEPS} steps: loss {train(alone)[-1]:.5f}")


if __name__ == "__main__":
    main()
