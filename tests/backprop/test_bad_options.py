"""Bad options: refused by name, with what was expected, where they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.losses import LOSSES

import backprop as bp

rng = np.random.default_rng(0)
X, y = rng.standard_normal((10, 3)), rng.standard_normal(10)


def but(array: Any, place: Any, value: Any) -> Any:
    """A copy of `array` with one cell changed."""
    changed = array.copy()
    changed[place] = value
    return changed


def fit(**options: Any) -> Any:
    return bp.fit(bp.MLP([3, 1], device="reference"), X, y, progress=False, **options)


def step(**options: Any) -> bp.TrainStep:
    return bp.TrainStep(bp.MLP([3, 1], device="reference"), **options)


def mlp(sizes: Any = (3, 4, 1), **options: Any) -> Any:
    return bp.MLP(sizes, device="reference", **options)


losses, activations = ", ".join(LOSSES), ", ".join(ACTIVATIONS)
inits = "glorot_uniform, glorot_normal, he_uniform, he_normal, lecun_uniform, lecun_normal, "
OPTIONS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: fit(loss="mze"),
        bp.OptionError,
        f"loss: name: expected one of {losses}; got 'mze'",
    ),
    (
        lambda: fit(optimizer="adm"),
        bp.OptionError,
        "optimizer: rule: expected one of sgd, rmsprop, adam, adamw, adagrad, lion, muon; got "
        "'adm'",
    ),
    (
        lambda: fit(optimizer=3),
        bp.KindError,
        "optimizer: expected a name or an optimizer such as Adam(lr=1e-3), got int",
    ),
    (lambda: fit(epochs=0), bp.OptionError, "fit: epochs: expected an integer ≥ 1, got 0"),
    (lambda: fit(epochs=1.5), bp.OptionError, "fit: epochs: expected an integer ≥ 1, got 1.5"),
    (
        lambda: fit(batch_size=True),
        bp.OptionError,
        "fit: batch_size: expected an integer ≥ 1, got True",
    ),
    (
        lambda: fit(clip_norm=0),
        bp.OptionError,
        "TrainStep: clip_norm: expected a number > 0, got 0",
    ),
    (
        lambda: fit(clip_norm="1"),
        bp.OptionError,
        "TrainStep: clip_norm: expected a number > 0, got '1'",
    ),
    (lambda: fit(seed=-1), bp.OptionError, "TrainStep: seed: expected an integer ≥ 0, got -1"),
    (
        lambda: fit(callbacks=[len, 3]),
        bp.KindError,
        "fit: callbacks[1]: expected a Callback or a function of (epoch, history), got int",
    ),
    (
        lambda: fit(eval_set=X),
        bp.KindError,
        "fit: eval_set: expected (X, y) or (X, y, sample_weight), got ndarray",
    ),
    (
        lambda: fit(eval_set=(X[:0], y[:0])),
        bp.DataError,
        "fit: eval_set: X: expected at least one row, got shape (0, 3)",
    ),
    (
        lambda: fit(eval_set=(but(X, (0, 0), np.nan), y)),
        bp.DataError,
        "fit: eval_set: X: expected finite numbers, got NaN at row 0, column 0 (1 of 30); impute "
        "or drop such rows",
    ),
    (
        lambda: fit(sample_weight=np.ones(9)),
        bp.ShapeError,
        "fit: sample_weight: expected shape (10,), got (9,)",
    ),
    (
        lambda: fit(sample_weight=but(np.ones(10), 4, -0.5)),
        bp.OptionError,
        "fit: sample_weight: expected weights ≥ 0, got -0.5 at row 4",
    ),
    (
        lambda: fit(sample_weight=but(np.ones(10), 4, np.inf)),
        bp.DataError,
        "fit: sample_weight: expected finite numbers, got infinity at row 4 (1 of 10); impute or "
        "drop such rows",
    ),
    (lambda: bp.fit(None, X, y), bp.KindError, "fit: model: expected a model, got NoneType"),  # type: ignore[arg-type]
    (lambda: bp.TrainStep(3), bp.KindError, "TrainStep: model: expected a model, got int"),  # type: ignore[arg-type]
    (
        lambda: step(batch_size=0),
        bp.OptionError,
        "TrainStep: batch_size: expected an integer ≥ 1, got 0",
    ),
    (
        lambda: step(batch_size=4)(X, y),
        bp.ShapeError,
        "TrainStep: X: expected 1 … 4 rows, got 10",
    ),
    (
        lambda: mlp().predict(but(X, (2, 2), np.nan)),
        bp.DataError,
        "predict: X: expected finite numbers, got NaN at row 2, column 2 (1 of 30); impute or "
        "drop such rows",
    ),
    (
        lambda: mlp().predict(X.T),
        bp.ShapeError,
        "predict: X: expected shape (batch, in_features=3), got (3, 10); is X transposed?",
    ),
    (
        lambda: mlp().predict(X, batch_size=-1),
        bp.OptionError,
        "predict: batch_size: expected an integer ≥ 1, got -1",
    ),
    (
        lambda: mlp([3]),
        bp.KindError,
        "MLP: sizes: expected at least [in_features, out_features], got [3]",
    ),
    (
        lambda: mlp([3, 0, 1]),
        bp.OptionError,
        "Linear: out_features: expected an integer ≥ 1, got 0",
    ),
    (
        lambda: mlp([3, 2.5, 1]),
        bp.OptionError,
        "Linear: out_features: expected an integer ≥ 1, got 2.5",
    ),
    (
        lambda: mlp([3, 1], activation="swish"),
        bp.OptionError,
        f"MLP: activation: expected one of {activations}; got 'swish'",
    ),
    (
        lambda: mlp(norm="group"),
        bp.OptionError,
        "MLP: norm: expected one of batch, layer, rms; got 'group'",
    ),
    (
        lambda: mlp(init="xavier"),
        bp.OptionError,
        f"Linear: init: expected one of auto, {inits}orthogonal, zeros; got 'xavier'",
    ),
    (
        lambda: mlp(dtype="float16"),
        bp.OptionError,
        "Sequential: dtype: expected one of float32, float64, got 'float16'",
    ),
    (
        lambda: mlp(dtype="double precision"),
        bp.OptionError,
        "Sequential: dtype: expected one of float32, float64, got 'double precision'",
    ),
    (
        lambda: mlp(dropout=1.0),
        bp.OptionError,
        "Dropout: rate: expected a number in [0.0, 0.9999999999999999], got 1.0",
    ),
    (
        lambda: mlp(seed="one"),
        bp.OptionError,
        "Sequential: seed: expected an integer ≥ 0, got 'one'",
    ),
    (
        lambda: bp.Sequential([]),
        bp.ShapeError,
        "Sequential: layers: expected at least one Linear, got none",
    ),
    (
        lambda: bp.Sequential(["relu"]),  # type: ignore[list-item]
        bp.KindError,
        "Sequential: layers[0]: expected Linear, BatchNorm, LayerNorm, RMSNorm or Dropout, got str",
    ),
    (
        lambda: bp.Sequential([bp.Linear(3, 4), bp.LayerNorm(5)]),
        bp.ShapeError,
        "Sequential: layers[1]: expected 4 input features (what the layer before it makes), got "
        "LayerNorm(features=5, activation='identity', eps=1e-05)",
    ),
    (
        lambda: bp.Sequential([bp.Linear(3, 4), bp.Dropout(0.1)]),
        bp.OptionError,
        "Sequential: layers[1]: expected Dropout before a layer with parameters (it belongs to "
        "what it drops: the input, or the layer before it)",
    ),
    (
        lambda: bp.LayerNorm(3, eps=0),
        bp.OptionError,
        "LayerNorm: eps: expected a number in [1e-12, 1.0], got 0",
    ),
    (
        lambda: bp.BatchNorm(3, momentum=1.5),
        bp.OptionError,
        "BatchNorm: momentum: expected a number in [0.0, 1.0], got 1.5",
    ),
    (
        lambda: bp.Loss("mse", delta=1),
        bp.OptionError,
        "Loss mse: options: expected none; got 'delta'",
    ),
    (
        lambda: bp.Loss("cross_entropy", label_smoothing=1.5),
        bp.OptionError,
        "Loss cross_entropy: label_smoothing: expected numbers in [0.0, 1.0], got 1.5",
    ),
    (
        lambda: bp.Loss("cross_entropy", class_weight=[-1, 1]),
        bp.OptionError,
        "Loss cross_entropy: class_weight: expected numbers in [0.0, inf), got [-1, 1]",
    ),
    (
        lambda: bp.Loss("cross_entropy", class_weight=2.0),
        bp.OptionError,
        "Loss cross_entropy: class_weight: expected one number per class, got 2.0",
    ),
    (
        lambda: bp.Loss("cross_entropy", class_weight="balanced"),
        bp.KindError,
        "Loss cross_entropy: class_weight: expected numbers, got dtype <U8",
    ),
    (
        lambda: bp.Loss("cross_entropy", ignore_index=1.5),
        bp.OptionError,
        "Loss cross_entropy: ignore_index: expected an integer, got 1.5",
    ),
    (
        lambda: bp.Loss("huber", delta=float("nan")),
        bp.OptionError,
        "Loss huber: delta: expected numbers in [1e-30, inf), got nan",
    ),
    (
        lambda: fit(loss=bp.Loss("bce_with_logits", pos_weight=[1, 2])),
        bp.ShapeError,
        "loss bce_with_logits: pos_weight: expected shape (1,), got (2,)",
    ),
    (lambda: bp.Adam(lr=-1), bp.OptionError, "Adam: lr: expected a number in [0, inf), got -1"),
    (
        lambda: bp.Adam(betas=(1.0, 0.9)),
        bp.OptionError,
        "Adam: betas: expected 2 numbers in [0, 1), got (1.0, 0.9)",
    ),
    (
        lambda: bp.SGD(nesterov=1),
        bp.OptionError,
        "SGD: nesterov: expected True or False, got 1",
    ),
    (
        lambda: bp.Adam(momentum=0.9),
        bp.OptionError,
        "Adam: expected options lr, betas, eps, weight_decay, l1, l2, clip_value, "
        "clip_tensor_norm, max_norm, groups; got 'momentum'",
    ),
    (
        lambda: setattr(bp.SGD(), "lr", float("inf")),
        bp.OptionError,
        "SGD: lr: expected a number in [0, inf), got inf",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), OPTIONS, ids=[m[:70] for *_, m in OPTIONS])
def test_refusal(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message
    assert isinstance(error.value, bp.BackpropError)
