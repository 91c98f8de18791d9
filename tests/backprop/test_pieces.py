"""No room on the device: rows in pieces, the same numbers, messages that say what was lacking.

The emulator's allocator refuses what goes beyond a limit that the tests set.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from backprop_kernels.arrays import Array

import backprop as bp
from tests.cuda_host import memory
from tests.cuda_host.cupy_stand_in import Device

pytestmark = pytest.mark.usefixtures("emulator")
SHORT = r"room for [\d,]+ bytes, [\d,]+ are free"


def data(rows: int = 203, classes: int = 3) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((rows, 9))
    return X, (np.abs(X @ rng.standard_normal((9, classes)))).argmax(axis=1)


def bits(model: bp.Sequential) -> list[bytes]:
    return [value.tobytes() for value in model.state_dict().values()]


def leave(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Give the device so many bytes more than it uses."""
    gc.collect()
    monkeypatch.setattr(Device, "memory", memory.used() + free)


def test_out_of_memory_says_what_was_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    leave(monkeypatch, 65_536)
    # 256 x 256 weights and 256 biases
    with pytest.raises(bp.DeviceMemoryError, match="room for 263,168 bytes, 65,536 are free"):
        bp.MLP([256, 256], device="cuda", dtype="float32")


def test_batch_that_does_not_fit_is_kept_and_cut_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as it takes, in the first step or when data is there already; same numbers."""
    X, y = data()
    there, weight = X.astype(np.float32), np.linspace(0.1, 2, len(X))

    def trained(free: int | None = None) -> tuple[bp.TrainStep, list[float]]:
        model = bp.MLP([9, 64, 64, 3], device="cuda", seed=1)
        step = bp.TrainStep(model, "cross_entropy", "Adam", batch_size=203, clip_norm=1.0)
        if free is not None:
            leave(monkeypatch, free)
            said = r"room for [\d,]+ bytes, [\d,]+ are free.* in pieces of \d+ rows, slower"
            with pytest.warns(RuntimeWarning, match=said):
                losses = [float(step(there, y, weight))]
        else:
            losses = [float(step(there, y, weight))]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            losses += [float(step(there, y, weight)) for _ in range(3)]
        monkeypatch.setattr(Device, "memory", 1 << 32)
        return step, losses

    whole, expected = trained()
    bound = 4 * 64 * np.finfo(np.float32).eps
    # 203 rows need 320,000 bytes: outputs and deltas of 64 columns, sums, two sent ahead.
    for free, rows in ((205_000, 102), (95_000, 51)):
        step, losses = trained(free)
        again, _ = trained(free)
        assert bits(step.model) == bits(again.model)  # the same pieces, the same bits
        assert step.steps == 4 and step._room.rows == rows
        np.testing.assert_allclose(losses, expected, rtol=bound)
        for name, value in whole.model.state_dict().items():
            np.testing.assert_allclose(
                step.model.state_dict()[name], value, atol=64 * bound, err_msg=name
            )


def test_each_piece_draws_masks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [bp.Dropout(0.5), bp.Linear(200, 1, bias=False)]
    model = bp.Sequential(layers, device="cuda")
    step = bp.TrainStep(model, "mse", bp.SGD(lr=0.0), batch_size=40)
    leave(monkeypatch, 60_000)
    with pytest.warns(RuntimeWarning, match="pieces of"):
        float(step(np.ones((40, 200)), np.zeros(40)))
    masks = []
    for piece in range(2):
        step.gradients.set_piece(piece)
        rows = step._room.rows
        program = step.prepare(np.ones((rows, 200), np.float32), np.zeros((rows, 1), np.float32))
        program(np.ones((rows, 200), np.float32), np.zeros((rows, 1), np.float32))
        masks.append(next(iter(step.gradients.plans.values())).passes[0].Y.get() > 0)
    assert 0.4 < (masks[0] == masks[1]).mean() < 0.6


def test_what_cannot_be_cut_is_an_error_that_says_what_was_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    X, y = data()
    wide = bp.MLP([9, 1024, 3], device="cuda")
    normed = bp.MLP([9, 64, 3], norm="batch", device="cuda")
    for model, free in ((normed, 60_000), (wide, 50_000)):
        step = bp.TrainStep(model, "cross_entropy", "SGD", batch_size=203)
        before = bits(model)
        leave(monkeypatch, free)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(bp.DeviceMemoryError, match=r"room for [\d,]+ bytes, [\d,]+ are"):
                step(X, y)
        monkeypatch.setattr(Device, "memory", 1 << 32)
        assert bits(model) == before and step.steps == 0
        assert np.isfinite(step(X, y))  # and the device serves on


@contextmanager
def short(monkeypatch: pytest.MonkeyPatch, free: int, where: str) -> Iterator[None]:
    """With so many bytes free there is a warning, and the device serves on."""
    leave(monkeypatch, free)
    with pytest.warns(RuntimeWarning, match=rf"^{where}: device memory: .*{SHORT}.*pieces of \d+"):
        yield
    monkeypatch.setattr(Device, "memory", 1 << 32)


@pytest.mark.parametrize("there", [False, True], ids=["NumPy", "CuPy"])
def test_predict_and_evaluate_go_on_with_fewer_rows(
    monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    import cupy

    X, y = data()
    X, weight = X.astype(np.float32), np.linspace(0.1, 2, len(X)).astype(np.float32)
    given = [cupy.asarray(a) for a in (X, y, weight)] if there else [X, y, weight]
    model = bp.MLP([9, 64, 64, 3], norm="batch", device="cuda", seed=1)  # of running statistics

    def predict() -> Any:
        return model.memory.numpy(model.predict(given[0]))

    def evaluate() -> Any:
        return bp.evaluate(model, *given[:2], "cross_entropy", "accuracy", sample_weight=given[2])

    whole, exact = predict(), evaluate()
    for free in (80_000, 20_000):
        with short(monkeypatch, free, "predict"):
            assert np.array_equal(predict(), whole)
        with short(monkeypatch, free, "evaluate"):
            found = evaluate()
        assert found["accuracy"] == exact["accuracy"]
        assert abs(found["loss"] / exact["loss"] - 1) < 8 * np.finfo(np.float32).eps
    assert np.array_equal(predict(), whole)


def test_rows_of_a_file_go_on_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    X = np.memmap(tmp_path / "X", np.float32, "w+", shape=(203, 9))
    X[...] = data()[0]
    model = bp.MLP([9, 64, 3], device="cuda", seed=1)
    whole = model.predict(np.asarray(X))
    with short(monkeypatch, 20_000, "predict"):
        assert np.array_equal(model.predict(X, batch_size=100), whole)


def test_value_and_grad_adds_pieces_up(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = data()
    y[:90] = -100  # pieces that weigh nothing, others that weigh differently
    weight = np.linspace(0.1, 2, len(X))
    model = bp.MLP([9, 64, 64, 3], dtype="float64", device="cuda", seed=1)
    exact, expected = bp.value_and_grad(model, X, y, "cross_entropy", weight)
    for free in (400_000, 200_000):
        with short(monkeypatch, free, "value_and_grad"):
            value, gradients = bp.value_and_grad(model, X, y, "cross_entropy", weight)
        assert abs(value / exact - 1) < 1e-13
        for name, gradient in expected.items():
            np.testing.assert_allclose(gradients[name], gradient, rtol=1e-10, atol=1e-15)


CALLS: dict[str, Callable[[bp.Sequential, Array, Array], Any]] = {
    "predict": lambda model, X, y: model.predict(X),
    "evaluate": lambda model, X, y: bp.evaluate(model, X, y, "cross_entropy"),
    "value_and_grad": lambda model, X, y: bp.value_and_grad(model, X, y, "cross_entropy"),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_room_for_one_row_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    X, y = data()
    model = bp.MLP([9, 64, 3], device="cuda", seed=1)
    expected, before = CALLS[name](model, X, y), bits(model)
    leave(monkeypatch, 50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(bp.DeviceMemoryError, match=SHORT):
            CALLS[name](model, X, y)
    monkeypatch.setattr(Device, "memory", 1 << 32)
    assert bits(model) == before
    np.testing.assert_equal(CALLS[name](model, X, y), expected)


def test_a_batch_norm_needs_its_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = data()
    model = bp.MLP([9, 64, 3], norm="batch", device="cuda", seed=1)
    before = bits(model)
    leave(monkeypatch, 80_000)
    with pytest.raises(bp.DeviceMemoryError, match=SHORT):
        bp.value_and_grad(model, X, y, "cross_entropy")
    assert bits(model) == before  # running statistics, too


def test_arrays_that_cupy_makes_are_told_of_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    X = cupy.asarray(data()[0])  # float64: a copy in float32 is needed
    model = bp.MLP([9, 64, 3], device="cuda", seed=1)
    leave(monkeypatch, 50)
    said = r"device memory: out of memory allocating [\d,]+ bytes, 50 are free"
    with pytest.raises(bp.DeviceMemoryError, match=said):
        model.predict(X)
