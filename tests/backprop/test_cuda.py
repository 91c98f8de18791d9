"""device="cuda" end to end, in the emulator: the same weights and data give the CPU's curve."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
from backprop_kernels.arrays import Array

import backprop as bp
from tests.cuda_host import build
from tests.cuda_host.backend import installed


@pytest.fixture(autouse=True)
def emulator() -> Iterator[None]:
    if reason := build.problem():
        pytest.skip(f"the CUDA emulator {reason}")
    with installed():
        yield


def data(rows: int = 203, classes: int = 3) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((rows, 9))
    return X, (np.abs(X @ rng.standard_normal((9, classes)))).argmax(axis=1)


def curve(
    device: str, dtype: str, epochs: int = 3, **options: object
) -> tuple[list[float], dict[str, Array]]:
    X, y = data()
    model = bp.MLP([9, 33, 17, 3], activation="gelu", dtype=dtype, device=device, seed=1,
                   **options)  # fmt: skip
    history = bp.fit(
        model, X, y, loss="cross_entropy", optimizer=bp.AdamW(lr=3e-3), epochs=epochs,
        batch_size=32, eval_set=(X, y), clip_norm=1.0, progress=False,
    )  # fmt: skip
    return [*history["loss"], *history["val_loss"]], model.state_dict()


@pytest.mark.parametrize("norm", [None, "batch", "layer"])
def test_curve_and_weights_are_those_of_the_cpu(dtype: np.dtype, norm: str | None) -> None:
    # A step moves a weight by at most ~lr whatever the rounding of its gradient, so roundings grow
    # with the number of steps (21) and not with their condition.
    bound = 21 * 64 * np.finfo(dtype).eps
    cpu, cpu_state = curve("cpu", str(dtype), dropout=0.1, norm=norm)
    cuda, cuda_state = curve("cuda", str(dtype), dropout=0.1, norm=norm)
    np.testing.assert_allclose(cuda, cpu, rtol=bound)
    assert cpu[2] < cpu[0]
    for name, value in cpu_state.items():
        np.testing.assert_allclose(cuda_state[name], value, rtol=0, atol=64 * bound, err_msg=name)


def test_the_same_seed_gives_the_same_bits(dtype: np.dtype) -> None:
    runs = [curve("cuda", str(dtype), dropout=0.2) for _ in range(2)]
    assert runs[0][0] == runs[1][0]
    assert all(np.array_equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


def test_predictions_files_and_gradients(dtype: np.dtype, tmp_path: object) -> None:
    X, y = data()
    models = [
        bp.MLP([9, 20, 3], activation="tanh", dtype=str(dtype), device=d) for d in ("cpu", "cuda")
    ]
    bound = 256 * float(np.finfo(dtype).eps)
    cpu, cuda = (model.predict(X) for model in models)
    assert isinstance(cuda, np.ndarray)
    np.testing.assert_allclose(cuda, cpu, atol=bound)
    (loss, grads), (loss_there, grads_there) = (
        bp.value_and_grad(model, X, y, loss="cross_entropy") for model in models
    )
    assert loss_there == pytest.approx(loss, rel=bound)
    for name in grads:
        np.testing.assert_allclose(grads_there[name], grads[name], atol=bound, err_msg=name)
    models[1].save(tmp_path / "m.safetensors")  # type: ignore[operator]
    again = bp.load(tmp_path / "m.safetensors", device="cuda")  # type: ignore[operator]
    assert np.array_equal(again.predict(X), cuda)


def test_data_too_large_for_the_device_is_sent_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    from backprop_kernels.cuda.memory import DeviceMemory

    whole = curve("cuda", "float32")
    monkeypatch.setattr(DeviceMemory, "fits", lambda self, arrays: False)
    sent = curve("cuda", "float32")
    assert whole[0] == sent[0]
    assert all(np.array_equal(whole[1][name], sent[1][name]) for name in whole[1])


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    X, y = data()
    model = bp.MLP([9, 8, 3], device="cuda", norm="batch")
    step = bp.TrainStep(model, "cross_entropy", "Adam", batch_size=203)
    step(X, y)
    before = model.state_dict()
    X[5, 2] = np.nan
    with pytest.raises(bp.DataError, match="NaN at row 5, column 2"):
        step(X, y)
    after = model.state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert step.steps == 1
    assert np.isfinite(step(np.zeros_like(X), y))


def test_device_arrays_are_refused_by_name() -> None:
    import cupy

    X, y = data()
    step = bp.TrainStep(bp.MLP([9, 3]), "cross_entropy", "SGD", batch_size=203)
    with pytest.raises(bp.KindError, match=re.escape("X: expected an array in host memory")):
        step(cupy.asarray(X), y)
    with pytest.raises(bp.KindError, match="a mix of cupy and numpy"):
        bp.ops.linear_forward(cupy.asarray(X), X)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        bp.DeviceUnavailableError, match='device "cuda:1": expected a number below 1'
    ):
        bp.MLP([2, 1], device="cuda:1")


def test_out_of_memory_says_what_was_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.cuda_host.cupy_stand_in import Device

    monkeypatch.setattr(Device, "memory", 1 << 16)
    # 256 x 256 weights and 256 biases
    with pytest.raises(bp.DeviceMemoryError, match="room for 263,168 bytes, 65,536 are free"):
        bp.MLP([256, 256], device="cuda", dtype="float32")
