"""A short training on the CUDA backend beside the reference: bugs in stepping.cu must break it."""

from __future__ import annotations

import numpy as np
import pytest

import backprop as bp
from tests.cuda_host.backend import installed


def steps() -> None:
    """A refused step among others, with a rate that changes and running statistics."""
    rng = np.random.default_rng(0)
    X, W = (rng.standard_normal(s).astype(np.float32) for s in ((300, 6), (6, 3)))
    y, bad = (X @ W).argmax(axis=1), X * np.float32(np.nan)
    optimizer = bp.Adam(lr=0.01, groups={"layers.1": {"lr_scale": 0.5}})
    layers = [
        bp.Linear(6, 300, bias=False),
        bp.BatchNorm(300, "relu"),
        bp.Dropout(0.25),
        bp.Linear(300, 3),
    ]
    with installed():
        model = bp.Sequential(layers, device="cuda", seed=3)
        step = bp.TrainStep(model, "cross_entropy", optimizer, batch_size=300)
        twin = bp.Sequential(layers, device="reference", seed=3)
        other = bp.TrainStep(twin, "cross_entropy", optimizer, batch_size=300)
        for number, batch in enumerate((X, bad, X + 1, X)):
            optimizer.lr = 0.01 + number / 100
            losses = [step(batch, y)]
            if batch is bad:  # one refused, and one behind it
                losses.append(step(X - 1, y))
                for loss in losses:
                    with pytest.raises(bp.DataError):
                        float(loss)
                continue
            np.testing.assert_allclose(float(losses[0]), other(batch, y), rtol=1e-5)
        for name, value in twin.state_dict().items():
            np.testing.assert_allclose(model.state_dict()[name], value, rtol=2e-3, atol=2e-5)
