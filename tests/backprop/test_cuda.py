"""device="cuda" end to end, in the emulator: the same weights and data give the CPU's curve."""

from __future__ import annotations

import numpy as np
import pytest
from backprop_kernels.arrays import Array

import backprop as bp
from backprop.passes import Plan, Workspace

pytestmark = pytest.mark.usefixtures("emulator")


def data(rows: int = 203, classes: int = 3) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((rows, 9))
    return X, (np.abs(X @ rng.standard_normal((9, classes)))).argmax(axis=1)


def curve(
    device: str, dtype: str, epochs: int = 3, activation: str = "gelu", **options: object
) -> tuple[list[float], dict[str, Array]]:
    X, y = data()
    model = bp.MLP([9, 33, 17, 3], activation=activation, dtype=dtype, device=device, seed=1,
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


@pytest.mark.parametrize("norm", [None, "batch"])
def test_activations_that_save_a_bit_train_as_on_the_cpu(norm: str | None) -> None:
    options = {"activation": "leaky_relu", "dropout": 0.1, "norm": norm}
    for cuda, cpu in zip(curve("cuda", "float64", **options)[0],
                         curve("reference", "float64", **options)[0], strict=True):  # fmt: skip
        assert abs(cuda / cpu - 1) < 1e-12


def test_where_act_has_two_slopes_a_bit_is_kept() -> None:
    layers = [bp.Linear(3, 70, "relu"), bp.Dropout(0.5), bp.Linear(70, 9, "tanh"), bp.Linear(9, 1)]
    for device, expected in (("cuda", ((4, 3), "uint32")), ("reference", ((4, 70), "float32"))):
        model = bp.Sequential(layers, device=device)
        P = model.parameters
        room = Workspace(4, P.dtype, model.memory)
        plan = Plan(layers, P, {}, model.backend, room, 4, P, model.memory.zeros(2, np.int64))
        first, second, last = plan.passes
        assert first.kept is not None and (first.kept.shape, first.kept.dtype) == expected
        assert second.kept is last.kept is None


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
        float(step(X, y))
    after = model.state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert step.steps == 1
    assert np.isfinite(step(np.zeros_like(X), y))


def twins(norm: str | None = None) -> list[bp.Sequential]:
    return [bp.MLP([9, 12, 3], norm=norm, device="cuda", seed=1) for _ in range(2)]


def bits(model: bp.Sequential) -> list[bytes]:
    return [value.tobytes() for value in model.state_dict().values()]


@pytest.mark.parametrize("layout", ["as the model has it", "float64", "strided", "transposed"])
def test_arrays_on_the_device_give_the_bits_of_those_of_the_host(layout: str) -> None:
    import cupy

    X, y = data()
    X, weight = X.astype(np.float32), np.linspace(0, 2, len(X), dtype=np.float32)
    there = cupy.asarray(X)
    if layout == "float64":
        there = cupy.asarray(X.astype(np.float64))
    elif layout == "strided":
        there = cupy.asarray(np.repeat(X, 2, axis=1))[:, ::2]
    elif layout == "transposed":
        there = cupy.asarray(X.T).T
    ids, shares = cupy.asarray(y.astype(np.int16)), cupy.asarray(weight)
    one, other = twins()
    for model, given in ((one, (X, y, weight)), (other, (there, ids, shares))):
        step = bp.TrainStep(model, "cross_entropy", "Adam", batch_size=203)
        assert [float(step(*given)) for _ in range(3)][2] < 2
        bp.fit(
            model, *given[:2], "cross_entropy", epochs=2, sample_weight=given[2], progress=False,
            validation_fraction=0.2, batch_size=64, class_weight="balanced",
        )  # fmt: skip
    assert bits(one) == bits(other)
    Y, P = other.predict(there), other.predict_proba(there)
    assert isinstance(Y, cupy.ndarray) and isinstance(P, cupy.ndarray)
    assert np.array_equal(Y.get(), one.predict(X)) and np.array_equal(P.get(), one.predict_proba(X))
    results = [
        bp.evaluate(other, *given, "cross_entropy", "accuracy") for given in ((X, y), (there, ids))
    ]
    assert results[0] == results[1]
    assert (
        bp.value_and_grad(other, there, ids, "cross_entropy")[0]
        == bp.value_and_grad(other, X, y, "cross_entropy")[0]
    )
    assert np.array_equal(bp.ops.gather_rows(there, cupy.asarray(y)).get(), there.get()[y])


def test_arrays_of_the_wrong_place_are_refused_by_name() -> None:
    import cupy

    X, y = data()
    there, ids = cupy.asarray(X), cupy.asarray(y)
    model = bp.MLP([9, 3], device="cuda")
    before = bits(model)
    step = bp.TrainStep(model, "cross_entropy", "SGD", batch_size=203)
    mixed = "expected arrays of one kind, got X on a GPU and y in host memory; copy with"
    for call in (
        lambda: step(there, y),
        lambda: bp.fit(model, there, y, "cross_entropy"),
        lambda: bp.evaluate(model, there, y, "cross_entropy"),
    ):
        with pytest.raises(bp.KindError, match=mixed):
            call()
    with pytest.raises(bp.KindError, match="got y on a GPU and X, sample_weight in host memory"):
        step(X, ids, np.ones(203))
    for host in (bp.MLP([9, 3], device="cpu"), bp.MLP([9, 3], device="reference")):
        with pytest.raises(bp.KindError, match="predict: X: expected an array in host memory, got"):
            host.predict(there)
        with pytest.raises(bp.KindError, match="X: expected an array in host memory"):
            bp.fit(host, there, ids, "cross_entropy")
    with pytest.raises(bp.KindError, match="a mix of cupy and numpy"):
        bp.ops.linear_forward(there, X)

    class Tensor:
        __cuda_array_interface__ = None

    with pytest.raises(
        bp.KindError, match=r"expected a NumPy or CuPy array, got .*Tensor; convert"
    ):
        model.predict(Tensor())
    assert bits(model) == before and np.isfinite(step(there, ids))


def test_bad_values_on_the_device_are_found_and_change_nothing() -> None:
    import cupy

    X, y = data()
    there, ids = cupy.asarray(X), cupy.asarray(y)
    model = bp.MLP([9, 8, 3], norm="batch", device="cuda")
    step = bp.TrainStep(model, "cross_entropy", "SGD", batch_size=203)
    raw = cupy.asarray(np.zeros(203 * 36 + 4, np.uint8))
    odd = raw[2:-2].view(np.float32).reshape(203, 9)
    before = bits(model)
    wrong, bad = y.copy(), X.copy()
    wrong[[4, 90]], bad[3, 1] = 3, np.nan
    for error, message, given in (
        (bp.LabelError, "ids 0 … 2, got 3 at row 4 .2 such row", (there, cupy.asarray(wrong))),
        (bp.LabelError, "class ids 0 … 2, got -1", (there, cupy.asarray(y - 1))),
        (bp.DataError, "NaN at row 3, column 1", (cupy.asarray(bad), ids)),
        (bp.BackpropError, "expected class ids", (there, cupy.asarray(y + 0.5))),
        (bp.KindError, "X: expected numbers, got dtype complex128", (cupy.asarray(X + 0j), ids)),
        (bp.ShapeError, "X: expected memory aligned to 4 bytes", (odd, ids)),
        (bp.ShapeError, r"X: expected shape \(batch, in_features=9\)", (there[:, :8], ids)),
        (bp.ShapeError, "one row per row of X", (there, ids[:5])),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            float(step(*given))
        with pytest.raises(error, match=message):
            bp.fit(model, *given, "cross_entropy", progress=False)
        assert bits(model) == before and step.steps == 0
    with pytest.raises(bp.LabelError, match=r"probabilities; got 1.5 at row 0, column 2"):
        step(there, cupy.asarray(np.full((203, 3), [0.5, 0.5, 1.5])))
    with pytest.raises(bp.OptionError, match=r"weights ≥ 0, got -1.0 at row 7"):
        step(there, ids, cupy.asarray(np.where(np.arange(203) == 7, -1.0, 1.0)))
    # The context lives.
    assert np.isfinite(step(there, ids)) and step.steps == 1 and bits(model) != before


def test_data_beyond_2_to_the_31_elements() -> None:
    """Addresses of nothing but zeros take no memory here: rows at both ends of one array."""
    import cupy

    rows, columns = 2**29 + 7, 5  # 10 GiB
    X = cupy.empty_zeros((rows, columns), np.float32)
    last = X[rows - 2 :]
    last[...] = cupy.asarray(np.arange(10, dtype=np.float32).reshape(2, 5))
    index = cupy.asarray(np.array([0, rows - 1, rows - 2, 2**29, 2**28 * 2 - 1]))
    got = bp.ops.gather_rows(X, index).get()
    assert np.array_equal(got[1:3], [[5, 6, 7, 8, 9], [0, 1, 2, 3, 4]])
    assert not got[[0, 3, 4]].any()


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        bp.DeviceUnavailableError, match='device "cuda:1": expected a number below 1'
    ):
        bp.MLP([2, 1], device="cuda:1")
