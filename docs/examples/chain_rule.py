"""Every partial derivative of a 2-3-1 network at one data point.  docs/textbook_chain_rule.md"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import backprop as bp

X, y = np.array([[1.0, 1.0]]), np.array([0.0])
NUDGE = 0.0001
WEIGHTS = {  # round numbers, so that every line can be redone by hand
    "layers.0.weight": [[0.6, -0.5], [0.4, 0.7], [-0.8, 0.3]],
    "layers.0.bias": [0.1, -0.2, 0.4],
    "layers.1.weight": [[0.9, -0.7, 0.5]],
    "layers.1.bias": [-0.3],
}


def network(device: str = "auto") -> bp.Sequential:
    """The network with the weights above."""
    layers = [bp.Linear(2, 3, activation="sigmoid"), bp.Linear(3, 1, activation="sigmoid")]
    model = bp.Sequential(layers, dtype="float64", device=device)
    model.load_state_dict(WEIGHTS)
    return model


def factors() -> Iterator[tuple[str, tuple[int, ...], float, float, float]]:
    """(tensor, index, ∂L/∂a, ∂a/∂z, ∂z/∂w) of every weight, in plain arithmetic."""
    W1, b1, W2, b2 = (np.array(WEIGHTS[name]) for name in WEIGHTS)
    x = X[0]
    a1 = 1 / (1 + np.exp(-(W1 @ x + b1)))
    a2 = 1 / (1 + np.exp(-(W2[0] @ a1 + b2[0])))

    dL_da2 = 2 * (a2 - y[0])  # L = (a2 − y)²
    da2_dz2 = a2 * (1 - a2)
    for j in range(3):
        dL_da1 = dL_da2 * da2_dz2 * W2[0, j]  # hidden neuron j reaches L through z2 alone
        da1_dz1 = a1[j] * (1 - a1[j])
        for i in range(2):
            yield "layers.0.weight", (j, i), dL_da1, da1_dz1, x[i]
        yield "layers.0.bias", (j,), dL_da1, da1_dz1, 1.0
    for j in range(3):
        yield "layers.1.weight", (0, j), dL_da2, da2_dz2, a1[j]
    yield "layers.1.bias", (0,), dL_da2, da2_dz2, 1.0


def nudged(model: bp.Sequential, tensor: str, index: tuple[int, ...]) -> float:
    """The slope of L between this weight − 0.0001 and + 0.0001, the others fixed."""
    losses = []
    for shift in (-NUDGE, NUDGE):
        weights = {name: np.array(values) for name, values in WEIGHTS.items()}
        weights[tensor][index] += shift
        model.load_state_dict(weights)
        losses.append(float((model.predict(X)[0, 0] - y[0]) ** 2))
    model.load_state_dict(WEIGHTS)
    return (losses[1] - losses[0]) / (2 * NUDGE)


def main() -> None:
    model = network()
    loss, gradients = bp.value_and_grad(model, X, y, loss="mse")
    print(f"output {model.predict(X)[0, 0]:.6f}, target {y[0]:.0f}, L = {loss:.6f}\n")
    print("weight                     ∂L/∂a      ∂a/∂z      ∂z/∂w    product     kernel     nudged")
    for tensor, index, *parts in factors():
        numbers = (*parts, np.prod(parts), gradients[tensor][index], nudged(model, tensor, index))
        name = f"{tensor}[{', '.join(map(str, index))}]"
        print(f"{name:21}" + "".join(f"{number:11.6f}" for number in numbers))


if __name__ == "__main__":
    main()
