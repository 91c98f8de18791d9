"""`backprop gradcheck`: are the gradients right, on this machine, with these options?"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np
from backprop_kernels.arrays import Array
from backprop_kernels.errors import OptionError
from backprop_kernels.losses import LOSSES

from backprop.cli.tables import LOSSES_OF_TASK, load_with_encoder
from backprop.gradcheck import gradcheck
from backprop.model import MLP
from backprop.table import read_table

FEATURES = 5  # of the random network


def run(options: Namespace) -> None:
    """Print the largest error of each parameter; one beyond the bound is an error."""
    if options.rows < 1:
        raise OptionError(f"gradcheck: --rows: expected 1 or more, got {options.rows}")
    model, X, y, loss = _random(options) if options.model is None else _stored(options)
    print(f"{model!r}\nloss {loss}, {len(X)} rows, {type(model).__name__} on {model.device}")
    print(gradcheck(model, X, y, loss, seed=options.seed))


def _stored(options: Namespace) -> tuple[Any, Array, Array, str]:
    """A model, and the first rows of the data it is for."""
    if options.data is None:
        raise OptionError("gradcheck: DATA: expected rows to check MODEL on, got none")
    model = load_with_encoder(options.model, options.device)
    encoder = model.encoder
    table = read_table(options.data, kinds=encoder.kinds).require(encoder.target.name)
    table = table.take(np.arange(min(options.rows, len(table))))
    loss = options.loss or LOSSES_OF_TASK[encoder.task][0]
    return model, encoder.transform(table), encoder.encode_target(table), loss


def _random(options: Namespace) -> tuple[Any, Array, Array, str]:
    """A small network, and random rows with targets such as the loss wants."""
    loss = options.loss or "mse"
    outputs = 3 if loss == "cross_entropy" else 2
    model = MLP(
        [FEATURES, *options.hidden, outputs], options.activation, options.dropout, options.norm,
        input_dropout=options.input_dropout, dtype=options.dtype, device=options.device,
        seed=options.seed,
    )  # fmt: skip
    rng = np.random.default_rng(options.seed)
    X = rng.standard_normal((options.rows, FEATURES))
    shape = (options.rows, 1 if loss == "gaussian_nll" else outputs)
    targets: dict[str, Array] = {
        "real": rng.standard_normal(shape),
        "counts": rng.integers(0, 5, shape),
        "probability": rng.random(shape),
        "binary": rng.integers(0, 2, shape),
        "sign": 2 * rng.integers(0, 2, shape) - 1,
        "classes": rng.integers(0, outputs, options.rows),
    }
    return model, X, targets[LOSSES[loss].targets], loss
