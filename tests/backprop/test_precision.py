"""precision= of fit, TrainStep and predict: what it changes, by how much, and what is refused."""

from __future__ import annotations

import re
from contextlib import nullcontext
from itertools import chain, pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
from backprop_kernels.arrays import Array
from backprop_kernels.cuda import launch, tuning
from backprop_kernels.precisions import PRECISIONS

import backprop as bp
from backprop import precision as module
from backprop.precision import LARGEST, LossScale
from tests.cuda_host import cupy_stand_in
from tests.cuda_host.hopper import IN_TURN, SHARED, on_hopper

LOW = ["bf16", "fp16", *(pytest.param(p, marks=pytest.mark.long) for p in ("tf32", "bf16x3"))]
SIZES = [9, 33, 17, 3]


def data(rows: int = 61) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((rows, SIZES[0]))
    return X, (np.abs(X @ rng.standard_normal((SIZES[0], SIZES[-1])))).argmax(axis=1)


def mlp(device: str = "cuda", **options: Any) -> bp.Sequential:
    return bp.MLP(SIZES, activation="gelu", device=device, seed=1, **options)


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("precision", LOW)
def test_gradient_is_the_cpus_within_the_precision(precision: str) -> None:
    """Each of 3 layers rounds two operands forward and two backward, each time by a part in
    2^digits at most; by another 2 for what is stored. No gradient is exactly float32's."""
    X, y = data()
    model = mlp()
    exact, gradients = bp.value_and_grad(mlp("cpu"), X, y, loss="cross_entropy")
    step = bp.TrainStep(
        model, "cross_entropy", "SGD", batch_size=61, precision=precision, fused_update=False
    )
    unit = 2.0 ** -PRECISIONS[precision].digits
    assert step(X, y) == pytest.approx(exact, rel=3 * 4 * unit)
    for name, view in step.gradients.views.items():
        error = np.linalg.norm(view.get() - gradients[name]) / np.linalg.norm(gradients[name])
        assert 0 < error < 3 * 6 * unit, name


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("precision", LOW)
def test_fit_learns_and_predict_is_near(precision: str) -> None:
    X, y = data()
    model = mlp(dropout=0.1)
    history = bp.fit(
        model, X, y, loss="cross_entropy", optimizer=bp.AdamW(lr=1e-2), epochs=3, batch_size=31,
        eval_set=(X, y), precision=precision, progress=False,
    )  # fmt: skip
    assert history["val_loss"][-1] < history["val_loss"][0]
    assert model.parameters.dtype == np.float32
    plain, low = model.predict(X), model.predict(X, precision=precision)
    assert low.dtype == np.float32
    error = np.linalg.norm(low - plain) / np.linalg.norm(plain)
    assert 0 < error < 3 * 4 * 2.0 ** -PRECISIONS[precision].digits
    assert np.array_equal(low[:7], model.predict(X[:7], precision=precision))


@pytest.mark.long
@pytest.mark.usefixtures("emulator")
def test_steps_on_hopper_are_near_those_of_the_ampere_generation() -> None:
    """Each a graph that is replayed; sums are added in another order, then rounded to bfloat16."""
    rng = np.random.default_rng(2)
    X, Y = (rng.standard_normal((136, n)).astype(np.float32) for n in (16, 8))
    losses, gradients = [], []
    for place in (nullcontext(), on_hopper(SHARED)):
        with place:
            model = bp.MLP(
                [16, 72, 64, 8], activation="relu", dropout=0.1, device="cuda", seed=1
            )  # fmt: skip
            step = bp.TrainStep(model, "mse", bp.SGD(lr=0.1), batch_size=136, precision="bf16")
            losses.append([float(step(X, Y)) for _ in range(3)])
            gradients.append(step.gradients.flat.get())
    np.testing.assert_allclose(*losses, rtol=2**-9)
    assert losses[0][2] < losses[0][0] and not np.array_equal(*gradients)
    error = np.linalg.norm(gradients[0] - gradients[1]) / np.linalg.norm(gradients[0])
    assert error < 3 * 6 * 2**-8


def on_hopper_data(batch: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(2)
    X, Y = (rng.standard_normal((batch, n)).astype(np.float32) for n in (16, 8))
    return X, Y


def tf32_step(
    batch: int, precision: str | None = "tf32", recompute: int = 1, **options: Any
) -> bp.TrainStep:
    """Of a network whose every product TMA takes."""
    model = bp.MLP([16, 72, 64, 64, 8], device="cuda", seed=1, **{"activation": "gelu", **options})
    return bp.TrainStep(
        model, "mse", bp.SGD(lr=0.1), batch_size=batch, precision=precision, recompute=recompute,
        fused_update=False,
    )  # fmt: skip


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(
    ("batch", "options"),
    [
        (67, {"dropout": 0.1}),
        *(
            pytest.param(batch, options, marks=pytest.mark.long)
            for batch in (1, 136, 331)
            for options in ({"activation": "tanh"}, {"norm": "layer"}, {"norm": "batch"})
            if batch > 1 or "norm" not in options
        ),
    ],
)
def test_steps_in_tf32_on_hopper_are_float32s_within_the_precision(
    batch: int, options: dict[str, Any]
) -> None:
    """As near as by mma.sync, which rounds as it reads: the loss within one rounding, as up and
    down even out, where digits that are cut off add up. The same bits every time."""
    X, Y = on_hopper_data(batch)
    exact = tf32_step(batch, None, **options)
    value, unit = float(exact(X, Y)), 2.0 ** -PRECISIONS["tf32"].digits
    seen = []
    for place in (nullcontext(), on_hopper(SHARED), on_hopper(SHARED), on_hopper(IN_TURN)):
        with place:
            step = tf32_step(batch, **options)
            assert float(step(X, Y)) == pytest.approx(value, rel=unit)
            for name, view in step.gradients.views.items():
                true = exact.gradients.views[name].get()
                assert np.linalg.norm(view.get() - true) <= 4 * 6 * unit * np.linalg.norm(true)
            step(X[: batch // 2 + 1], Y[: batch // 2 + 1])
            seen.append(step.model.parameters.tobytes())
    assert seen[1] == seen[2] == seen[3]


@pytest.mark.usefixtures("emulator")
def test_what_is_made_once_more_is_copied_once_more() -> None:
    """With recompute, where passes share places and copies of them: the same bits."""
    X, Y = on_hopper_data(67)
    seen = set()
    with on_hopper(SHARED):
        for recompute in (1, 2, 3):
            step = tf32_step(67, recompute=recompute, dropout=0.1)
            for _ in range(2):
                step(X, Y)
            seen.add(step.model.parameters.tobytes())
    assert len(seen) == 1


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(
    ("precision", "capability", "tile", "casts", "transposes"),
    [
        # Of the batch and the last dZ, and of W: forward 4, backward 3.
        ("tf32", "90", SHARED, 2 + 4, 2 + 3),
        ("tf32", "90", None, 0, 0), ("tf32", "80", SHARED, 0, 0), ("bf16x6", "90", SHARED, 0, 0),
        ("bf16", "90", SHARED, 3, 0),  # as ever: of X, dZ and all weights
    ],
)  # fmt: skip
def test_copies_are_made_for_tf32_on_hopper_alone(
    monkeypatch: pytest.MonkeyPatch, precision: str, capability: str, tile: Any, casts: int,
    transposes: int,
) -> None:  # fmt: skip
    """By the epilogues of the products wherever one makes what another one reads."""
    monkeypatch.setattr(cupy_stand_in.Device, "compute_capability", capability)
    launched: list[str] = []
    function = launch._function
    monkeypatch.setattr(
        launch, "_function", lambda unit, entry, *rest: (
            launched.append(entry), function(unit, entry, *rest)
        )[1],
    )  # fmt: skip
    X, Y = on_hopper_data(67)
    with nullcontext() if tile is None else on_hopper(tile):
        step = tf32_step(67, precision)
        step.gradients.keeps_activations = True  # not in one kernel
        step(X, Y)
    assert (launched.count("cast"), launched.count("transpose")) == (casts, transposes)
    names = [name for name, _ in step.gradients.workspace._buffers]
    assert names.count("transposed") == (6 if transposes else 0)  # of Y and dZ between 4 layers


@pytest.mark.usefixtures("emulator")
def test_no_copies_are_made_where_another_kernel_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        tuning, "_fastest", lambda found: next(c for c in found if c.tile.generation == "ampere")
    )
    X, Y = on_hopper_data(67)
    with on_hopper(SHARED):
        step = bp.TrainStep(
            bp.MLP([16, 72, 8], device="cuda"), "mse", "SGD", 67, precision="tf32", autotune=True
        )
        step(X, Y)
    assert not any(name == "transposed" for name, _ in step.gradients.workspace._buffers)


@pytest.mark.usefixtures("emulator")
def test_weights_changed_by_hand_are_read() -> None:
    X, y = data()
    model = mlp()
    step = bp.TrainStep(model, "cross_entropy", "SGD", batch_size=61, precision="bf16")
    first = step(X, y)
    model.load_state_dict(mlp().state_dict())
    assert step(X, y) == first


@pytest.mark.usefixtures("emulator")
def test_one_kernel_trains_as_layers_do() -> None:
    """Both round the same numbers in the same places, so the losses of ten steps differ by less
    than one rounding."""
    X, y = data(200)
    curves = []
    for by_layers in (False, True):
        model = mlp()
        step = bp.TrainStep(
            model, bp.Loss("cross_entropy", label_smoothing=0.1), bp.AdamW(lr=1e-2), 200,
            precision="bf16",
        )  # fmt: skip
        step.gradients.keeps_activations = by_layers
        weight = np.arange(200) % 3
        curves.append([float(step(X, y, weight)) for _ in range(10)])
        assert step.gradients.why.startswith(
            "layer by layer" if by_layers else "network 9-33-17-3 in bf16: one kernel"
        )
        assert (not step.gradients.plans) is not by_layers
    assert curves[0] != curves[1]
    np.testing.assert_allclose(*curves, rtol=2.0**-8)
    assert curves[0][-1] < 0.8 * curves[0][0]


@pytest.mark.usefixtures("emulator")
def test_one_kernel_gives_the_same_bits_and_refuses_what_is_not_finite() -> None:
    X, y = data()
    seen = set()
    for _ in range(2):
        model = mlp()
        step = bp.TrainStep(model, "cross_entropy", "Adam", batch_size=61, precision="bf16")
        for rows in (61, 7, 61):
            step(X[:rows], y[:rows])
        seen.add(model.parameters.tobytes())
    assert len(seen) == 1
    bad = X.copy()
    bad[3, 1] = np.nan
    with pytest.raises(bp.DataError, match="NaN at row 3, column 1"):
        float(step(bad, y))
    assert model.parameters.tobytes() in seen
    assert step(X, y) == step.loss


@pytest.mark.usefixtures("emulator")
def test_what_one_kernel_does_not_serve_runs_layer_by_layer() -> None:
    """In words."""

    def why(model: bp.Sequential, loss: Any = "cross_entropy", precision: str = "bf16") -> str:
        step = bp.TrainStep(model, loss, "SGD", batch_size=61, precision=precision)
        step.gradients.operators(61)
        return step.gradients.why

    frozen, wide = mlp(), bp.MLP([9, 200, 3], device="cuda")
    frozen.freeze("layers.0")
    assert why(mlp(dropout=0.1)) == (
        "layer by layer, as one kernel for all knows Linear layers alone, and there is Dropout"
    )
    assert why(frozen) == "layer by layer, as layers.0.bias is frozen"
    assert (
        why(wide)
        == "network 9-200-3 in bf16: layer by layer, as a layer is 200 wide, more than 128"
    )
    assert why(mlp(), precision="tf32").endswith("as one kernel for all is there for bf16 alone")
    assert why(mlp(), precision="float32") == (
        "layer by layer, as float32 on cuda has no kernel for all"
    )


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_health_is_measured_in_numbers(precision: str) -> None:
    """Of what is stored in 16 bits, and without the loss scale."""
    X, y = data()
    seen = []
    for given in ("float32", precision):
        model, health = mlp(), bp.Health(every=1)
        bp.fit(model, X, y, loss="cross_entropy", epochs=1, batch_size=61, precision=given,
               callbacks=[health], progress=False)  # fmt: skip
        seen.append([health.samples[name][0] for name in ("activation", "delta", "gradient")])
    np.testing.assert_allclose(seen[1], seen[0], rtol=3 * 6 * 2.0 ** -PRECISIONS[precision].digits)


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_scale_falls_until_the_batch_fits(accumulate: int) -> None:
    """No batch is left out, and the gradient is that of an unscaled one."""
    X, y = data()
    models = [mlp() for _ in range(2)]
    scales, gradients = (1.0, 2.0**30), []
    for model, scale in zip(models, scales, strict=True):
        step = bp.TrainStep(
            model, "cross_entropy", "SGD", 61, precision="fp16", accumulate=accumulate
        )
        assert step.loss_scale is not None and step.loss_scale.scale == LARGEST
        step.loss_scale.load_state_dict({"scale": scale, "steps": 0})
        for _ in range(accumulate):
            step(X, y)
        assert step.steps == 1
        gradients.append(step.gradients.flat.get())
        assert step.loss_scale.scale == 1 if scale == 1 else 1 < step.loss_scale.scale < scale
    assert np.linalg.norm(gradients[0] - gradients[1]) < 2**-9 * np.linalg.norm(gradients[0])


@pytest.mark.usefixtures("emulator")
def test_loss_scale_is_part_of_the_state() -> None:
    steps = [bp.TrainStep(mlp(), "mse", "SGD", 61, precision="fp16") for _ in range(2)]
    assert steps[0].loss_scale is not None and steps[1].loss_scale is not None
    steps[0].loss_scale.load_state_dict({"scale": 4.0, "steps": 7})
    steps[1].load_state_dict(steps[0].state_dict())
    assert steps[1].loss_scale.state_dict() == {"scale": 4.0, "steps": 7}


def test_loss_scale_rises_after_many_good_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    class Backend:
        scales: ClassVar[list[float]] = []

        def set_loss_scale(self, scale: float) -> None:
            self.scales.append(scale)

    monkeypatch.setattr(module, "PATIENCE", 3)
    scale = LossScale(Backend())
    assert scale.halve()
    for _ in range(7):
        scale.step()
    assert Backend.scales == [LARGEST, LARGEST / 2, LARGEST]
    while scale.halve():
        pass
    assert scale.scale == 1


@pytest.mark.usefixtures("emulator")
def test_a_batch_with_nan_is_refused_and_the_scale_kept() -> None:
    X, y = data()
    step = bp.TrainStep(mlp(), "cross_entropy", "SGD", batch_size=61, precision="fp16")
    X[3, 1] = np.nan
    with pytest.raises(bp.DataError, match="NaN at row 3, column 1"):
        step(X, y)
    assert step.loss_scale is not None and step.loss_scale.scale == LARGEST


REFUSED = {
    'precision: expected "float32" on device "cpu", got "bf16", which needs a GPU: '
    'device="cuda"': lambda: bp.TrainStep(mlp("cpu"), "mse", precision="bf16"),
    'predict: precision: expected "float32" on device "reference", got "tf32", which needs a GPU: '
    'device="cuda"': lambda: mlp("reference").predict(data()[0], precision="tf32"),
    'precision: expected "float64", the dtype of the model, got "fp16"; make the model with '
    'dtype="float32"': lambda: bp.TrainStep(mlp("cpu", dtype="float64"), "mse", precision="fp16"),
    'precision: expected "float32", the dtype of the model, or one that sums in it ("tf32", '
    '"bf16", "fp16", "bf16x3", "bf16x6"), got "float64"; make the model with dtype="float64"':
    lambda: bp.fit(mlp("cpu"), *data(), loss="cross_entropy", precision="float64"),
    "TrainStep: precision: expected one of float64, float32, tf32, bf16, fp16, bf16x3, "
    "bf16x6; got 'int8'":
    lambda: bp.TrainStep(mlp("cpu"), "mse", precision="int8"),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_had_is_refused(message: str) -> None:
    with pytest.raises(bp.OptionError, match=re.escape(message)):
        REFUSED[message]()


def test_the_dtype_of_the_model_may_be_said() -> None:
    X, y = data()
    for dtype in ("float32", "float64"):
        model = mlp("cpu", dtype=dtype)
        assert np.array_equal(model.predict(X, precision=dtype), model.predict(X))
        bp.TrainStep(model, "cross_entropy", batch_size=61, precision=dtype)(X, y)


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(
    ("precision", "norm"),
    [("bf16", "layer"), ("fp16", "batch"), pytest.param("bf16", "batch", marks=pytest.mark.long),
     pytest.param("fp16", "layer", marks=pytest.mark.long)],
)  # fmt: skip
def test_norms_in_16_bits(precision: str, norm: str) -> None:
    """Also as the first and the last layer; the statistics stay float32's."""
    X, y = data()
    layer = {"layer": bp.LayerNorm, "batch": bp.BatchNorm}[norm]
    sizes = SIZES[:-1]  # a norm of 3 columns at the end would magnify every rounding
    pairs = ((layer(i), bp.Linear(i, o, activation="gelu")) for i, o in pairwise(sizes))
    layers = [bp.Dropout(0.1), *chain(*pairs), layer(sizes[-1])]
    steps = []
    for device, name in (("cpu", "float32"), ("cuda", precision)):
        model = bp.Sequential(layers, device=device, seed=1)
        step = bp.TrainStep(model, "cross_entropy", "SGD", batch_size=61, precision=name)
        value = float(step(X, y))
        views = {k: model.memory.numpy(v).copy() for k, v in step.gradients.views.items()}
        running = [model.memory.numpy(v) for v in model.statistics.values()]
        steps.append((value, views, running))
    unit = 2.0 ** -PRECISIONS[precision].digits
    (exact, true, averages), (value, found, low) = steps
    assert value == pytest.approx(exact, rel=4 * unit)
    for name, gradient in true.items():
        error = np.linalg.norm(found[name] - gradient) / max(np.linalg.norm(gradient), 0.05)
        assert 0 < error < 16 * unit, name
    for ours, theirs in zip(averages, low, strict=True):
        assert theirs.dtype == np.float32
        np.testing.assert_allclose(theirs, ours, rtol=4 * unit, atol=4 * unit)
