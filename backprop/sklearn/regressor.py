"""The regressor: one target or several."""

from __future__ import annotations

from typing import Any

import numpy as np
from backprop_kernels.arrays import Array
from backprop_kernels.errors import OptionError
from sklearn.base import RegressorMixin

from backprop.evaluation import kind_of
from backprop.losses import Loss, resolve_loss
from backprop.sklearn.network import Network


class MLPRegressor(RegressorMixin, Network):  # type: ignore[misc]
    """scikit-learn's `MLPRegressor`: its parameters and attributes, and these besides.

    Args:
        loss: "squared_error", or any loss of this library for numbers: "poisson", "mae",
            "huber", `Loss("quantile", q=0.9)`, …
        activation, solver, learning_rate, dropout, norm, device: as in `MLPClassifier`.
    """

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Train one epoch on these rows."""
        return self._partial_fit(X, y, sample_weight)

    def predict(self, X: Any) -> Array:
        """(rows,) of one target, (rows, targets) of several."""
        X = self._rows(X)
        Y = self.model_.predict(X)
        if self.out_activation_ == "exp":
            Y = np.exp(Y)
        return Y[:, 0] if self.n_outputs_ == 1 else Y

    @property
    def out_activation_(self) -> str:
        """What makes predictions of the last layer."""
        return "exp" if resolve_loss(self._loss()).name == "poisson" else "identity"

    def _learn(self, y: Array, first: bool, classes: Any) -> None:
        if self.class_weight is not None:
            raise OptionError("MLPRegressor: class_weight: expected None; rows have sample_weight")

    def _loss(self) -> str | Loss:
        if self.loss is None or self.loss == "squared_error":
            return "mse"
        loss = resolve_loss(self.loss)
        if kind_of(loss) != "numbers" or loss.name == "gaussian_nll":
            raise OptionError(f"MLPRegressor: loss: expected one for numbers, got {loss.name}")
        return loss
