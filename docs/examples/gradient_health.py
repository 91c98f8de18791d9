"""Twenty layers: where the gradient vanishes, where it explodes, and what helps.  docs/health.md

python gradient_health.py [picture.png]
"""

from __future__ import annotations

import sys

import numpy as np

import backprop as bp

LAYERS, WIDTH = 20, 32
# name: activation, init of one weight (None: the activation's own), clip_norm
NETWORKS = {
    "sigmoid, N(0, 0.1²)": ("sigmoid", 0.1, None),
    "relu, He": ("relu", None, None),
    "relu, N(0, 0.4²)": ("relu", 0.4, None),
    "relu, N(0, 0.4²), clipped": ("relu", 0.4, 100.0),
}


def network(activation: str, std: float | None) -> bp.Sequential:
    model = bp.MLP([10, *[WIDTH] * (LAYERS - 1), 1], activation, seed=0)
    if std is not None:
        rng = np.random.default_rng(0)
        state = model.state_dict()
        drawn = {n: rng.normal(0, std, w.shape) for n, w in state.items() if w.ndim == 2}
        model.load_state_dict({**state, **drawn})
    return model


def experiment(
    activation: str, std: float | None, clip_norm: float | None
) -> tuple[str, bp.Health]:
    """What 400 steps did to the loss, and the health of the gradients."""
    X, y = bp.datasets.friedman(1000, seed=0)
    y = (y - y.mean()) / y.std()
    model, health = network(activation, std), bp.Health(every=20)
    try:
        history = bp.fit(
            model, X, y, "mse", bp.SGD(lr=0.01), 20, 50, clip_norm=clip_norm, callbacks=[health],
            progress=False,
        )  # fmt: skip
        loss = "learns" if history["loss"][-1] < 0.95 else "does not learn"  # 1: predicts the mean
    except bp.NonFiniteError:
        loss = "leaves the range of float32"
    return loss, health


def main(picture: str = "gradient_health.png") -> None:
    healths = {}
    print(f"{'network':<26}  first delta / last  in 400 steps")
    for name, options in NETWORKS.items():
        loss, healths[name] = experiment(*options)
        delta = healths[name].mean("delta")
        ratio = f"10^{round(np.log10(delta[0] / delta[-1]))}"
        verdict = [text.partition(":")[0] for text in healths[name].verdicts()] or ["healthy"]
        print(f"{name:<26}  {ratio:>18}  {loss}: {verdict[0]}")
    draw(healths, picture)


def draw(healths: dict[str, bp.Health], picture: str) -> None:
    """The delta of every layer, as a line a network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, health in healths.items():
        axes.plot(range(1, LAYERS + 1), health.mean("delta"), marker=".", label=name)
    axes.set(yscale="log", xlabel="layer", ylabel="root mean square of the delta")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
