from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import backprop as bp
from backprop.layers import Layer

rng = np.random.default_rng(0)
X, ids = rng.standard_normal((9, 5)), np.arange(9) % 3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_kind_of_layer_passes(device: str, dtype: str) -> None:
    model = bp.Sequential(
        [bp.Linear(5, 8, "gelu"), bp.Dropout(0.3), bp.LayerNorm(8, "tanh"), bp.Linear(8, 6),
         bp.BatchNorm(6, "silu"), bp.Linear(6, 3)],
        dtype=dtype, device=device,
    )  # fmt: skip
    loss = bp.Loss("cross_entropy", label_smoothing=0.1, class_weight=[1, 2, 3])
    report = bp.gradcheck(model, X, ids, loss, sample_weight=rng.random(9))
    assert list(report.errors) == list(model.layout.shapes)
    assert report.checked == model.n_parameters
    assert report.bound == (1e-4 if dtype == "float32" else 1e-10)
    assert max(report.errors.values()) <= report.bound


def spoiled(backend: ModuleType, name: str, spoil: Any) -> Any:
    """The backend with one operator's outputs changed after the call."""
    functions = {f: getattr(backend, f) for f in backend.__all__}

    def wrong(*arguments: Any, **options: Any) -> Any:
        result = functions[name](*arguments, **options)
        spoil(result)
        return result

    return SimpleNamespace(**{**functions, name: wrong})


def off_by_a_percent(dW: Any) -> None:
    dW[1, 2] *= 1.01


def test_one_wrong_element_is_found() -> None:
    model = bp.MLP([5, 8, 3], dtype="float64", device="reference")
    model.backend = spoiled(model.backend, "linear_wgrad", off_by_a_percent)
    with pytest.raises(bp.GradientError) as error:
        bp.gradcheck(model, X, ids, "cross_entropy")
    first, *lines = str(error.value).splitlines()
    assert first == "gradcheck: expected every error within the bound, got"
    verdicts = {line.split()[0]: line.split()[-1] for line in lines[:-1]}
    assert verdicts == {
        "layers.0.weight": "WRONG",
        "layers.0.bias": "ok",
        "layers.1.weight": "WRONG",
        "layers.1.bias": "ok",
    }
    assert lines[-1] == f"{model.n_parameters} derivatives checked, bound 1e-10"


def test_large_tensors_are_sampled() -> None:
    model = bp.MLP([5, 40, 3], dtype="float64", device="reference")
    assert bp.gradcheck(model, X, ids, "cross_entropy", max_per_tensor=7).checked == 7 + 7 + 7 + 3


def test_bias_that_a_batch_norm_takes_out_again_passes(device: str) -> None:
    """Its derivative is 0, and what rounding leaves of it means nothing."""
    for dtype in ("float32", "float64"):
        layers: list[Layer] = [bp.Linear(5, 4), bp.BatchNorm(4, "tanh"), bp.Linear(4, 3)]
        model = bp.Sequential(layers, dtype=dtype, device=device)
        bp.gradcheck(model, X, ids, "cross_entropy")


def test_model_is_left_as_it_was() -> None:
    model = bp.MLP([5, 8, 3], norm="batch", device="reference")
    before = {name: value.tobytes() for name, value in model.state_dict().items()}
    bp.gradcheck(model, X, ids, "cross_entropy")
    assert {name: value.tobytes() for name, value in model.state_dict().items()} == before
