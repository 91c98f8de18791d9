"""Is the gradient healthy in every layer? Norms sampled while a fit runs, a verdict, a picture.

A sample costs a few passes over what the step left in its buffers; one in 50 steps is taken. The
share of dead units looks at one batch, which is enough to see a layer die.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.errors import DataError, OptionError
from backprop_kernels.precisions import widen

from backprop.callbacks import Callback, Training
from backprop.extras import need
from backprop.passes import LinearPass, Pass

# What is sampled of every Linear layer. The first three are root mean squares of one element.
MEASURES = {
    "activation": "of the layer's output",
    "delta": "of ∂L/∂Z, times the rows of the batch: that of one row's loss",
    "gradient": "of ∂L/∂W",
    "update": "length of the step over the length of the weights",
    "dead": "share of units that are 0 for every row of the batch (relu and its kin)",
    "saturated": "share of outputs within 2 % of an end of the range (sigmoid, tanh, …)",
}
# Where a verdict begins. A factor of 3 a layer is 1e3 over 6 layers and more than deltas differ by
# between healthy layers; an update of 1e-3 of the weights a step is the usual advice.
LIMITS = {
    "vanishing": 1e-3,  # first delta over last delta, and less
    "exploding": 1e3,
    "dead": 0.5,
    "saturated": 0.5,
    "frozen": 1e-6,  # update over weights, and less
    "restless": 1e-1,
}
RANGES = {"sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0), "hardsigmoid": (0.0, 1.0),
          "hardtanh": (-1.0, 1.0), "softsign": (-1.0, 1.0)}  # fmt: skip
RECTIFIERS = ("relu", "relu6")


class Health(Callback):
    """`callbacks=[bp.Health()]`; afterwards `print(health)` and `health.plot("health.png")`.

    `samples` holds, by measure (see `MEASURES`), a row a sample with a number for each Linear layer
    from the first to the last, and `steps` the step of each. In the history stands the last sample
    of each epoch, as "delta layers.0".
    """

    def __init__(self, every: int = 50) -> None:
        checks.integer("Health", "every", every, 1)
        self.every = int(every)
        self.layers: list[str] = []
        self.steps: list[int] = []
        self.samples: dict[str, list[list[float]]] = {name: [] for name in MEASURES}
        self._due = False
        self._loss_scale = 1.0

    def fit_begin(self, training: Training) -> None:
        model, recompute = training.model, training.step.gradients.recompute
        if recompute > 1:
            raise OptionError(
                f"Health: recompute: expected 1, got {recompute}, which leaves no layer's "
                "activations and deltas to look at"
            )
        training.step.gradients.keeps_activations = True
        self.layers = [p for p in model.layout.prefixes if p.startswith("layers.")]
        self._before = model.parameters.copy()
        self._change = model.parameters.copy()
        flats = (training.step.gradients.flat, self._change, self._before)
        views = [model.layout.views(flat) for flat in flats]
        self._tensors = [[view[f"{layer}.weight"] for view in views] for layer in self.layers]

    def step_begin(self, training: Training) -> None:
        step = training.step
        self._due = step.steps % self.every == 0 and step.pending + 1 == step.accumulate
        if self._due:
            self._before[...] = training.model.parameters
            self._loss_scale = _loss_scale(training)

    def step_end(self, training: Training) -> None:
        if not self._due:
            return
        step = training.step
        plan = step.gradients.plans[step.rows]
        self._change[...] = training.model.parameters
        self._change -= self._before
        measured = {name: [np.nan] * len(self.layers) for name in MEASURES}
        # Halved before the batch was computed again, or doubled after it.
        loss_scale = min(self._loss_scale, _loss_scale(training))
        passes = [p for p in plan.passes if isinstance(p, LinearPass)]
        with np.errstate(over="ignore"):
            for i, (p, tensors) in enumerate(zip(passes, self._tensors, strict=True)):
                output = _after(plan.passes, p)
                gradient, moved, weight = tensors
                Y = _numbers(output.Y, training)
                measured["activation"][i] = _rms(Y)
                if p.dZ is not None and p.d_weight is not None:
                    measured["delta"][i] = _rms(_numbers(p.dZ, training)) * len(Y) / loss_scale
                    measured["gradient"][i] = _rms(gradient)
                length = _norm(weight)
                measured["update"][i] = _norm(moved) / length if length else np.nan
                self._units(measured, i, output, Y)
        self.steps.append(step.steps)
        for name, row in measured.items():
            self.samples[name].append(row)

    def _units(self, measured: Mapping[str, list[float]], i: int, p: Pass, Y: Array) -> None:
        activation = p.activation
        if activation in RECTIFIERS and p.dropout is None:
            measured["dead"][i] = float((Y.max(axis=0) <= 0).mean())
        elif activation in RANGES and p.dropout is None:
            low, high = RANGES[activation]
            edge = 0.02 * (high - low)
            middle = 0.5 * (low + high)
            far = 0.5 * (high - low) - edge
            measured["saturated"][i] = float((abs(Y - middle) > far).mean())

    def epoch_end(self, training: Training) -> None:
        for name, rows in self.samples.items():
            for i, layer in enumerate(self.layers):
                value = rows[-1][i] if rows else np.nan
                if not np.isnan([row[i] for row in rows]).all():
                    training.history.append(**{f"{name} {layer}": float(value)})

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps), "samples": {k: list(v) for k, v in self.samples.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = list(state["steps"])
        self.samples = {name: list(rows) for name, rows in state["samples"].items()}

    def mean(self, measure: str) -> Array:
        """One number a layer: the mean over the samples, on a logarithmic scale for lengths."""
        checks.choice("Health", "measure", measure, MEASURES)
        self._expect_samples()
        rows = np.array(self.samples[measure])
        if measure in ("dead", "saturated"):
            return rows.mean(axis=0)
        tiny = np.finfo(np.float64).tiny
        return np.exp(np.log(np.maximum(rows, tiny)).mean(axis=0))

    def _expect_samples(self) -> None:
        if not self.steps:
            raise DataError("Health: samples: expected a fit before, got no sample")

    def verdicts(self) -> list[str]:
        """What is wrong, in words; empty where nothing is."""
        found = []
        delta = self.mean("delta")
        known = np.flatnonzero(np.isfinite(delta))
        if len(known) > 1:
            first, last = self.layers[known[0]], self.layers[known[-1]]
            ratio = delta[known[0]] / delta[known[-1]]
            if ratio < LIMITS["vanishing"]:
                found.append(
                    f"vanishing: the delta of {first} is {ratio:.0e} of that of {last}; use relu "
                    "or gelu with its own init, a norm, or fewer layers"
                )
            elif ratio > LIMITS["exploding"]:
                found.append(
                    f"exploding: the delta of {first} is {ratio:.0e} times that of {last}; use the "
                    "activation's own init, a norm, or clip_norm"
                )
        advice = {
            "dead": ("dead", "of the units are 0 for a whole batch; lower lr, or leaky_relu"),
            "saturated": ("saturated", "of the outputs are at an end of their range; scale the "
                          "inputs, smaller init"),
        }  # fmt: skip
        for measure, (word, text) in advice.items():
            for layer, share in zip(self.layers, self.mean(measure), strict=True):
                if share > LIMITS[measure]:
                    found.append(f"{word}: {layer}: {share:.0%} {text}")
        for layer, ratio in zip(self.layers, self.mean("update"), strict=True):
            if ratio > LIMITS["restless"]:
                found.append(
                    f"restless: {layer} moves by {ratio:.0%} of its length a step; lower lr"
                )
            elif 0 < ratio < LIMITS["frozen"]:
                found.append(
                    f"frozen: {layer} moves by {ratio:.0e} of its length a step; raise lr, or see "
                    "whether its gradient vanishes"
                )
        return found

    def __str__(self) -> str:
        self._expect_samples()
        width = max(map(len, self.layers))
        names = list(MEASURES)
        lines = [" " * width + "".join(f"{name:>12}" for name in names)]
        columns = [self.mean(name) for name in names]
        for i, layer in enumerate(self.layers):
            cells = [
                "" if np.isnan(c[i]) else f"{c[i]:.0%}" if n in ("dead", "saturated")
                else f"{c[i]:.1e}"
                for n, c in zip(names, columns, strict=True)
            ]  # fmt: skip
            lines.append(f"{layer:<{width}}" + "".join(f"{cell:>12}" for cell in cells))
        return "\n".join([*lines, *(self.verdicts() or ["healthy"])])

    def plot(self, path: str | PathLike[str], title: str = "") -> None:
        """Draw the four lengths by layer and step to a PNG, SVG or PDF file."""
        self._expect_samples()
        Figure = need("matplotlib.figure", "plot", "Health.plot").Figure
        figure = Figure(figsize=(9, 6), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True).ravel()
        shades = np.linspace(0.85, 0.1, len(self.layers))
        for axes, measure in zip(panels, MEASURES, strict=False):
            rows = np.array(self.samples[measure])
            for i, layer in enumerate(self.layers):
                axes.plot(self.steps, rows[:, i], color=str(shades[i]), label=layer)
            axes.set(yscale="log", title=measure)
            axes.grid(alpha=0.3)
        for axes in panels[2:]:
            axes.set(xlabel="step")
        panels[0].legend(fontsize="x-small", ncols=2)
        figure.suptitle(title)
        figure.savefig(path, dpi=90)


def _after(passes: list[Pass], linear: Pass) -> Pass:
    """The pass that activates a Linear layer: itself, or the norm behind it."""
    i = next(k for k, p in enumerate(passes) if p is linear)
    following = passes[i + 1] if i + 1 < len(passes) else None
    return linear if following is None or isinstance(following, LinearPass) else following


def _norm(array: Array) -> float:
    flat = array.reshape(-1)
    square = float(flat.dot(flat))
    if square == np.inf and flat.dtype == np.float32:  # the norm itself may be in range
        wide = flat.astype(np.float64)
        square = float(wide.dot(wide))
    return math.sqrt(square)


def _loss_scale(training: Training) -> float:
    scale = training.step.loss_scale
    return 1.0 if scale is None else scale.scale


def _numbers(array: Array, training: Training) -> Array:
    """`array` itself, or what is stored in 16 bits as float32."""
    return widen(training.model.memory.numpy(array)) if array.dtype.itemsize == 2 else array


def _rms(array: Array) -> float:
    return _norm(array) / math.sqrt(max(array.size, 1))
