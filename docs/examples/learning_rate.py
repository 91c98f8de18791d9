"""How the learning rate moves the weights of a 2-3-1 network.  docs/textbook_learning_rate.md

python learning_rate.py [picture.png]
"""

from __future__ import annotations

import sys

import numpy as np

import backprop as bp

X = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
y = np.array([0.0, 1.0, 1.0, 0.0])
RATES = (0.01, 0.1, 1.0)
STEPS = 2000


def trajectory(
    lr: float, steps: int = STEPS, device: str = "auto"
) -> tuple[np.ndarray, list[float]]:
    """The nine weights (steps + 1, 9), and the loss, after 0, 1, … `steps` steps."""
    layers = [bp.Linear(2, 3, activation="sigmoid"), bp.Linear(3, 1, activation="sigmoid")]
    model = bp.Sequential(layers, dtype="float64", device=device, seed=0)  # one start for all
    step = bp.TrainStep(model, loss="mse", optimizer=bp.SGD(lr=lr), batch_size=4)
    path, losses = [], []
    for _ in range(steps + 1):
        path.append(weights(model))
        losses.append(step(X, y))  # the loss that this step found, before its update
    return np.array(path), losses


def weights(model: bp.Sequential) -> np.ndarray:
    """The six hidden and three output weights, without the biases."""
    state = model.state_dict()
    return np.concatenate([state[f"layers.{i}.weight"].ravel() for i in range(2)])


def draw(paths: dict[float, np.ndarray], picture: str) -> None:
    """One panel per learning rate, one line per weight."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, len(paths), sharey=True)
    for axes, (lr, path) in zip(panels, paths.items(), strict=True):
        hidden, *_ = axes.plot(path[:, :6], color="tab:blue", linewidth=1)
        output, *_ = axes.plot(path[:, 6:], color="tab:orange", linewidth=1)
        axes.set(title=f"lr = {lr:g}", xlabel="step")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="weight")
    figure.legend([hidden, output], ["hidden", "output"], loc="outside right")
    figure.savefig(picture, dpi=90)


def main(picture: str = "learning_rate.png") -> None:
    runs = {lr: trajectory(lr) for lr in RATES}
    print("  lr  steps  lr·steps     loss   hidden weight   output weight")
    for lr, (path, losses) in runs.items():
        for n in (20, 200, 2000):
            hidden, output = path[n, 0], path[n, 6]
            print(f"{lr:4g}  {n:5d}  {lr * n:8g}  {losses[n]:.5f}  {hidden:14.4f}  {output:14.4f}")
    draw({lr: path for lr, (path, _) in runs.items()}, picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
