"""recompute=: activations that backward computes again. The same bits, in less memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from backprop_kernels.arrays import Array

import backprop as bp
from tests.cuda_host import build
from tests.cuda_host.backend import installed

DEVICES = ["reference", "cpu", "cuda"]
ROWS = 19


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """On "cuda" in the emulator."""
    if request.param == "cuda" and build.problem():
        pytest.skip(f"the CUDA emulator {build.problem()}")
    with installed() if request.param == "cuda" else nullcontext():
        yield request.param


def plain() -> list[Any]:
    """Every kind of what is saved, dropout, also of the input; places of one width used again."""
    return [
        bp.Dropout(0.1),
        bp.Linear(5, 12, activation="relu"),
        bp.Dropout(0.3),
        bp.Linear(12, 12, activation="gelu"),
        bp.Linear(12, 12, activation="tanh"),
        bp.Dropout(0.2),
        bp.Linear(12, 12, activation="sigmoid"),
        bp.Linear(12, 12, activation="relu"),
        bp.Linear(12, 12, activation="silu"),
        bp.Linear(12, 7),
        bp.Linear(7, 12, activation="gelu"),
        bp.Dropout(0.2),
        bp.Linear(12, 3),
    ]


def norms() -> list[Any]:
    """Running statistics that move once a step; norms kept and not."""
    return [
        bp.Linear(5, 9),
        bp.BatchNorm(9, activation="relu"),
        bp.Linear(9, 9),
        bp.BatchNorm(9, activation="relu"),
        bp.Linear(9, 9),
        bp.LayerNorm(9, activation="gelu"),
        bp.Dropout(0.3),
        bp.Linear(9, 9, activation="tanh"),
        bp.RMSNorm(9),
        bp.Linear(9, 9),
        bp.BatchNorm(9, activation="silu"),
        bp.Linear(9, 3),
    ]


def trained(
    layers: Callable[[], list[Any]], device: str, recompute: int, **options: Any
) -> list[Any]:
    """What three steps leave: losses, parameters, moments, running statistics."""
    rng = np.random.default_rng(0)
    model = bp.Sequential(layers(), device=device, seed=1)
    step = bp.TrainStep(model, "cross_entropy", "Adam", ROWS, recompute=recompute, **options)
    left: list[Any] = []
    for rows in (ROWS, ROWS, 11):
        X, y = rng.standard_normal((rows, 5)).astype(np.float32), rng.integers(0, 3, rows)
        left.append(float(step(X, y)))
    state = step.state_dict()
    arrays = [*model.state_dict().values(), *state["moments"].values()]
    return left + [np.asarray(model.memory.numpy(array)).tobytes() for array in arrays]


@pytest.mark.parametrize("layers", [plain, norms])
def test_the_bits_are_those_of_a_step_that_keeps_all(device: str, layers: Any) -> None:
    expected = trained(layers, device, 1)
    for recompute in (2, 3, 100):
        assert trained(layers, device, recompute) == expected, recompute


@pytest.mark.parametrize("layers", [pytest.param(plain, marks=pytest.mark.long), norms])
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.long)])
def test_the_bits_are_the_same_in_16_bits(precision: str, layers: Any) -> None:
    if reason := build.problem():
        pytest.skip(f"the CUDA emulator {reason}")
    with installed():
        expected = trained(layers, "cuda", 1, precision=precision)
        assert trained(layers, "cuda", 3, precision=precision) == expected


@pytest.mark.parametrize("frozen", ["layers.0", "layers.1", "layers.2"])
def test_below_what_is_trained_nothing_is_done(frozen: str) -> None:
    """The first layer that is trained is the first, the middle or the last of its group."""

    def all_below(recompute: int) -> Any:
        model = bp.Sequential(plain(), device="cpu", seed=1)
        for number in range(int(frozen[-1]) + 1):
            model.freeze(f"layers.{number}")
        step = bp.TrainStep(model, "cross_entropy", "SGD", ROWS, recompute=recompute)
        rng = np.random.default_rng(0)
        step(rng.standard_normal((ROWS, 5)).astype(np.float32), rng.integers(0, 3, ROWS))
        return model.parameters.tobytes(), step.gradients.flat.tobytes()

    assert all_below(1) == all_below(2) == all_below(3) == all_below(4)


def test_accumulated_batches() -> None:
    options = {"accumulate": 3, "clip_norm": 0.1}
    assert trained(norms, "cpu", 4, **options) == trained(norms, "cpu", 1, **options)


def test_fit_gives_the_same_bits(device: str) -> None:
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((60, 5)).astype(np.float32), rng.integers(0, 3, 60)
    models = [bp.Sequential(plain(), device=device, seed=1) for _ in range(2)]
    for model, recompute in zip(models, (1, 3), strict=True):
        bp.fit(model, X, y, "cross_entropy", batch_size=16, recompute=recompute, progress=False)
    first, second = (model.memory.numpy(model.parameters) for model in models)
    assert np.array_equal(first, second)


def test_memory_falls_with_the_square_root_of_the_depth() -> None:
    """24 layers of one width keep 24 activations and 24 deltas; in groups of 5 there are 5 kept and
    4 in passing, and 2 deltas."""

    def buffers(recompute: int) -> int:
        model = bp.MLP([64] * 25, activation="relu", device="cpu")
        step = bp.TrainStep(model, "mse", "SGD", 512, recompute=recompute)
        X = np.zeros((512, 64), np.float32)
        step(X, X)
        return step.gradients.workspace.nbytes

    one = 512 * 64 * 4
    assert buffers(1) == 48 * one
    assert buffers(5) == (5 + 4 + 2) * one


def test_health_and_wrong_numbers_are_refused() -> None:
    model, X = bp.MLP([3, 4, 1]), np.zeros((4, 3), np.float32)
    with pytest.raises(bp.OptionError, match="TrainStep: recompute: expected an integer ≥ 1, got"):
        bp.TrainStep(model, recompute=0)
    with pytest.raises(bp.OptionError, match="Health: recompute: expected 1, got 2, which leaves"):
        bp.fit(model, X, X[:, :1], recompute=2, callbacks=[bp.Health()], progress=False)


def test_what_is_computed_again_is_what_is_not_kept() -> None:
    """Of 7 linear layers in groups of 3: the first two of every group but the last."""
    calls: list[str] = []
    model = bp.MLP([4] * 8, device="reference")
    backend: Any = model.backend

    class Noting:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(backend, name)

    model.backend = Noting()  # type: ignore[assignment]
    step = bp.TrainStep(model, "mse", "SGD", 2, recompute=3)
    X: Array = np.zeros((2, 4), np.float32)
    step(X, X)
    assert calls.count("linear_forward") == 7 + 4
    assert (calls.count("linear_dgrad"), calls.count("linear_wgrad")) == (6, 7)
