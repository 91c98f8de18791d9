"""A training with the update fused into the weight gradients beside one with a pass of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
from backprop_kernels.arrays import Array
from backprop_kernels.cuda import fused_update
from backprop_kernels.cuda.tiles import Tile

import backprop as bp
from tests.cuda_host import cupy_stand_in
from tests.cuda_host.hopper import on_hopper
from tests.cuda_host.mutants import F32

ROWS, RNG = 40, np.random.default_rng(0)
UNTOUCHED = 7.0  # stands where a gradient would, that nobody writes or reads


@contextmanager
def gpu(capability: int = 80, tile: Tile | None = None) -> Iterator[None]:
    """One where any update is worth fusing; Hopper's tiles are `tile`, batches in runs of 64."""
    with pytest.MonkeyPatch.context() as patch, on_hopper(tile) if tile else nullcontext():
        patch.setattr(fused_update, "SAVED", 1 << 40)
        patch.setattr(cupy_stand_in.Device, "compute_capability", str(capability))
        yield


class Training:
    """Steps of `layers` on batches; before each, weights' gradients are UNTOUCHED."""

    def __init__(
        self, fused: bool, layers: list[Any], rule: Callable[[], bp.Optimizer],
        precision: str | None = None, loss: str = "mse", rows: int = ROWS, freeze: str = "",
    ) -> None:  # fmt: skip
        self.model = bp.Sequential(layers, device="cuda", seed=3)
        if freeze:
            self.model.freeze(freeze)
        self.step = bp.TrainStep(
            self.model, loss, rule(), rows, precision=precision, fused_update=fused
        )
        shapes = self.model.layout.shapes
        self.weights = [n for n in shapes if len(shapes[n]) == 2 and n not in self.model.frozen]

    def __call__(self, X: Array, y: Array, *weight: Array) -> Any:
        for name in self.weights:
            self.step.gradients.views[name].fill(UNTOUCHED)
        return self.step(X, y, *weight)

    def written(self) -> set[str]:
        """The weights whose gradient is in memory."""
        views = self.step.gradients.views
        return {name for name in self.weights if (views[name].get() != UNTOUCHED).any()}

    def bits(self) -> dict[str, bytes]:
        """Of parameters, running statistics and moments."""
        state = {**self.model.state_dict(), **self.step.state_dict()["moments"]}
        return {name: value.tobytes() for name, value in state.items()}

    def put(self, **weights: float | Array) -> None:
        """Weights that are all the same number, by the layer's name; no biases."""
        state = self.model.state_dict()
        for name, value in state.items():
            if name.endswith("bias"):
                value[...] = 0
        for name, value in weights.items():
            state[f"{name.replace('_', '.')}.weight"][...] = value
        self.model.load_state_dict(state)


def layers(i: int = 6, activation: str = "identity", bias: bool = True) -> list[Any]:
    """Ragged for every tile; what TMA takes, where it takes the input. No bias at the end."""
    wide = (40, 136, 8) if i % 8 == 0 else (37, 130, 5)
    return [
        bp.Linear(i, wide[0], activation, bias=bias), bp.Linear(wide[0], wide[1], activation),
        bp.Linear(wide[1], wide[2], bias=False),
    ]  # fmt: skip


def batch(i: int = 6, o: int = 5, rows: int = ROWS) -> tuple[Array, Array]:
    return RNG.standard_normal((rows, i)).astype(F32), RNG.standard_normal((rows, o)).astype(F32)


def adamw() -> bp.Optimizer:
    return bp.AdamW(lr=1e-2)


def momentum() -> bp.Optimizer:
    return bp.SGD(lr=1e-3, momentum=0.9, weight_decay=0.1)


def same(one: Training, other: Training, norm: float = 1e-12) -> None:
    assert one.bits() == other.bits()
    norms = [float(t.step.norm.get()) for t in (one, other)]
    assert norms[0] == pytest.approx(norms[1], rel=norm)


def trained(
    make: Callable[[bool], Training], batches: list[tuple[Array, ...]], untouched: int = 3
) -> tuple[Training, Training]:
    """Fused and apart: the same bits after every batch; so many gradients were never written."""
    fused, apart = make(True), make(False)
    for given in batches:
        losses = [float(training(*given)) for training in (fused, apart)]
        assert losses[0] == losses[1]
        same(fused, apart)
        assert len(fused.weights) - len(fused.written()) == untouched, fused.step.update.why
    return fused, apart


# Batches that must be refused, each with the weights that make it so; or `applied`, though no bound
# holds. Where layers.2 is 1 and y −40, the lowest deltas are 260 times layers.1.
BAD: dict[str, dict[str, Any]] = {
    "NaN in X": {"X": np.nan},
    "infinity in X": {"X": -np.inf},
    "NaN in y": {"y": np.nan},
    "the lowest deltas": {"X": 1, "layers_0": 0, "layers_1": 1e30, "layers_2": 1e30},
    "sums of the lowest weights": {"X": 2e36, "layers_0": 0, "layers_1": 0.1, "layers_2": 1},
    "sums of the highest weights": {
        "X": 1, "y": -2500, "layers_0": 4e35, "layers_1": 1 / 37, "layers_2": 0,
    },
    "one product": {"X": 0, "at": 2e36, "layers_0": 0, "layers_1": 4, "layers_2": 1},
    "a bias alone": {"X": 1e-10, "layers_0": 0, "layers_1": 1.5e35, "layers_2": 1},
}  # fmt: skip
FINE: dict[str, Any] = {"X": 2e36, "layers_0": 0, "layers_1": 0.1, "layers_2": 1, "rows": 1}


def bad_batch(
    i: int, o: int, X: float, y: float = -40, rows: int = ROWS, at: float = 0, **_: Any
) -> Any:
    """On the device, where nobody looks at it before the step: X in the first `rows` rows, y.

    Or a number `at` one place, and a small negative one at another.
    """
    features, target = np.zeros((ROWS, i), F32), np.full((ROWS, o), y, F32)
    features[:rows] = X
    if at:
        features[0, 0], features[20, 5] = -1, at
    return tuple(map(cupy_stand_in.asarray, (features, target)))


def refused(
    make: Callable[[bool], Training], i: int, o: int, kind: str, written: Collection[str] = ()
) -> None:
    """Nothing changes, also by steps behind it, the error is the same; then training goes on."""
    told = []
    given, good = BAD[kind], [batch(i, o) for _ in range(3)]
    numbers = {k: v for k, v in given.items() if k.startswith("layers")}
    for training in (make(True), make(False)):
        float(training(*good[0]))
        start = training.model.state_dict()
        training.put(**numbers)
        before = training.bits()
        losses = [training(*bad_batch(i, o, **{"X": 1, **given})), training(*good[1])]
        errors = []
        for loss in losses:
            with pytest.raises(bp.BackpropError) as error:
                float(loss)
            errors.append(f"{error.type.__name__}: {error.value}")
        assert training.bits() == before and training.step.steps == 1
        training.model.load_state_dict(start)
        float(training(*good[1]))
        float(training(*good[2]))
        told.append((errors, training))
    assert told[0][0] == told[1][0]
    fused, apart = told[0][1], told[1][1]
    same(fused, apart)
    assert fused.written() == set(written) and apart.written() == set(apart.weights)
    assert fused.step.steps == 3


def applied(make: Callable[[bool], Training], i: int, o: int) -> None:
    """Finite, though no bound says so: applied with the same bits, and the next step is fused."""
    fused, apart = make(True), make(False)
    numbers = {k: v for k, v in FINE.items() if k.startswith("layers")}
    good = batch(i, o)
    for training in (fused, apart):
        training.put(**numbers)
        before = training.bits()
        assert np.isfinite(float(training(*bad_batch(i, o, **FINE))))
        assert training.bits()["layers.0.weight"] != before["layers.0.weight"]
        assert training.written() == set(training.weights)
        norm = float(training.step.norm.get())
        assert 1e36 < norm < np.inf
    same(fused, apart, 0)
    for training in (fused, apart):
        training.put(layers_0=0.1, layers_1=0.1, layers_2=0.1)
        float(training(*good))
    same(fused, apart)
    assert fused.written() == set()
