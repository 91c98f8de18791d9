"""Is the gradient right? The model's kernels against complex step on the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from backprop_kernels import reference
from backprop_kernels.arrays import Array
from backprop_kernels.errors import BackpropError

from backprop.gradients import value_and_grad
from backprop.losses import Loss, options_for_kernel, resolve_loss
from backprop.model import Sequential
from backprop.passes import Plan, Workspace

STEP = 1e-200  # complex step subtracts nothing, so the step can be as small as a double goes
BOUND = {"float32": 1e-4, "float64": 1e-10}


class GradientError(BackpropError, AssertionError):
    """A gradient differs from the complex-step derivative by more than the bound."""


@dataclass(frozen=True)
class GradientReport:
    """Largest error per parameter tensor, relative to that tensor's largest gradient."""

    errors: dict[str, float]
    bound: float
    checked: int

    def __str__(self) -> str:
        width = max(map(len, self.errors))
        lines = [
            f"{name:<{width}}  {error:.1e}  {'ok' if error <= self.bound else 'WRONG'}"
            for name, error in self.errors.items()
        ]
        return "\n".join([*lines, f"{self.checked} derivatives checked, bound {self.bound:g}"])


def gradcheck(
    model: Sequential,
    X: Any,
    y: Any,
    loss: str | Loss = "mse",
    sample_weight: Any = None,
    max_per_tensor: int = 200,
    seed: int = 0,
) -> GradientReport:
    """Compare the kernels' gradient with complex step: g = Im L(p + ih)/h, exact to rounding.

    Up to `max_per_tensor` entries of each tensor are checked (all, if there are no more).
    Dropout is drawn from `seed` on both sides. Raises GradientError beyond the dtype's bound
    (float32 1e-4, float64 1e-10, relative to the tensor's largest derivative).
    """
    loss = resolve_loss(loss)
    _, gradients = value_and_grad(model, X, y, loss, sample_weight, seed)
    evaluate = complex_loss(model, X, y, loss, sample_weight, seed)
    rng = np.random.default_rng(seed)
    exact, got, checked = {}, {}, 0
    for name, shape in model.layout.shapes.items():
        size = int(np.prod(shape))
        picks = np.arange(size)
        if size > max_per_tensor:
            picks = rng.choice(size, max_per_tensor, replace=False)
        exact[name] = np.array([evaluate(model.layout.offsets[name] + int(i)) for i in picks])
        got[name] = gradients[name].reshape(-1)[picks].astype(np.float64)
        checked += len(picks)
    # A derivative that cancels to nothing, such as that of a bias before a batch norm, is held to
    # the rounding of the largest derivative.
    bound = BOUND[str(model.dtype)]
    largest = max(np.abs(e).max() for e in exact.values())
    floor = 16 * np.finfo(model.dtype).eps * largest / bound
    errors = {
        name: float(np.abs(got[name] - e).max() / (max(np.abs(e).max(), floor) or 1.0))
        for name, e in exact.items()
    }
    report = GradientReport(errors, bound, checked)
    if not max(errors.values()) <= report.bound:
        raise GradientError(f"gradcheck: expected every error within the bound, got\n{report}")
    return report


def complex_loss(
    model: Sequential, X: Any, y: Any, loss: Loss, sample_weight: Any = None, seed: int = 0
) -> Any:
    """A function of a parameter's place in the arena: ∂L/∂p by complex step, in float64."""
    inputs = model.inputs(X, "gradcheck").astype(np.complex128)
    target = loss.targets(y, len(inputs), model.out_features, np.float64)
    weight = None if sample_weight is None else np.asarray(sample_weight, np.float64)
    parameters: Array = model.memory.numpy(model.parameters).astype(np.complex128)
    gradients = np.zeros_like(parameters)
    statistics = {
        name: model.memory.numpy(s).astype(np.complex128) for name, s in model.statistics.items()
    }
    plan = Plan(
        model.layers, parameters, statistics, reference,
        Workspace(len(inputs), np.complex128), len(inputs), gradients,
        np.array([seed, 0], np.int64),
    )  # fmt: skip
    options = options_for_kernel(loss, model.out_features)

    def derivative(place: int) -> float:
        real = parameters[place]
        parameters[place] = real + 1j * STEP
        Z = plan.forward(inputs)
        value, _, _ = reference.loss(Z, target, loss.name, options, plan.output_activation, weight)
        parameters[place] = real
        return float(value.imag / STEP)

    return derivative
