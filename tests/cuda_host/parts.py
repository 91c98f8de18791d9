"""Trainings whose batches come in parts, beside the same in one piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from backprop_kernels.arrays import Array
from backprop_kernels.cuda import tiles
from backprop_kernels.losses import LOSSES

import backprop as bp
from tests.cuda_host.backend import installed
from tests.cuda_host.fused import gpu
from tests.cuda_host.hopper import IN_CLUSTERS, SHARED
from tests.cuda_host.mutants import F32

ROWS, INPUTS, OUTPUTS = 256, 16, 8  # rows of a part: as many as a loss of one output adds up


@contextmanager
def in_one_run() -> Iterator[None]:
    """No batch of `linear_wgrad` is cut."""
    with pytest.MonkeyPatch.context() as patch:
        for generation in tiles.LEAST_TERMS:
            patch.setitem(tiles.LEAST_TERMS, generation, 1 << 20)
        yield


def layers(dropout: float = 0.25, norm: Any = bp.LayerNorm) -> list[Any]:
    return [
        bp.Dropout(dropout), bp.Linear(INPUTS, 24), norm(24, "relu"), bp.Dropout(dropout),
        bp.Linear(24, 40, "gelu"), bp.Dropout(dropout), bp.Linear(40, OUTPUTS),
    ]  # fmt: skip


def data(parts: int, loss: str = "mse", rows: int = ROWS) -> tuple[Array, Array]:
    """X and y of so many parts."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((parts * rows, INPUTS)).astype(F32)
    if loss == "cross_entropy":
        return X, rng.integers(0, OUTPUTS, len(X))
    y = rng.standard_normal((len(X), OUTPUTS // (1 + (loss == "gaussian_nll"))))
    kinds = {"counts": abs(y), "probability": y > 0, "binary": y > 0, "sign": np.sign(y)}
    return X, kinds.get(LOSSES[loss].targets, y).astype(F32)


class Training:
    """Steps on `parts` batches of `rows` rows each, or on one of all of them."""

    def __init__(
        self, parts: int, whole: bool, rule: Callable[[], Any] = lambda: "AdamW",
        loss: Any = "mse", rows: int = ROWS, made_of: list[Any] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        dtype = options.pop("dtype", "float32")
        made_of = layers() if made_of is None else made_of
        self.model = bp.Sequential(made_of, dtype=dtype, device="cuda", seed=3)
        self.rows = rows * parts if whole else rows
        self.step = bp.TrainStep(
            self.model, loss, rule(), self.rows, accumulate=1 if whole else parts, **options
        )
        # One kernel would train a small network in bf16; this has it run layer by layer.
        self.step.gradients.keeps_activations = whole

    def __call__(self, X: Array, y: Array, *weight: Array) -> list[Any]:
        """Steps on all rows → the loss of each batch."""
        cuts = [slice(i, i + self.rows) for i in range(0, len(X), self.rows)]
        return [self.step(X[cut], y[cut], *(w[cut] for w in weight)) for cut in cuts]

    def bits(self) -> dict[str, bytes]:
        """Of parameters, running statistics and moments."""
        arrays = {**self.model.state_dict(), **self.step.state_dict()["moments"]}
        return {name: array.tobytes() for name, array in arrays.items()}


def same_bits(parts: int = 3, steps: int = 2, **options: Any) -> None:
    """Parts of a batch train as the whole batch does, to the bit, and say so."""
    X, y = data(
        parts * steps, str(getattr(options.get("loss"), "name", options.get("loss", "mse")))
    )
    one, several = Training(parts, True, **options), Training(parts, False, **options)
    whole, losses = one(X, y), several(X, y)
    why = several.step.gradients.why
    assert why.endswith(f"with the bits of one batch of {one.rows:,} rows"), why
    assert one.bits() == several.bits()
    assert one.step.steps == several.step.steps == steps and several.step.pending == 0
    means = np.reshape([float(loss) for loss in losses], (steps, parts)).mean(axis=1)
    np.testing.assert_allclose(means, [float(loss) for loss in whole], rtol=1e-5)


# What multiplies: by capability and, for Hopper, tile.
GPUS: dict[str, tuple[int, Any]] = {
    "sm_80": (80, None), "sm_90": (90, SHARED), "sm_90 in clusters": (90, IN_CLUSTERS),
}  # fmt: skip


def on(name: str) -> Any:
    """The emulator of that GPU."""

    @contextmanager
    def both() -> Iterator[None]:
        with installed(), gpu(*GPUS[name]):
            yield

    return both()
