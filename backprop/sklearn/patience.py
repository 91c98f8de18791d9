"""When scikit-learn's training ends."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from backprop_kernels.arrays import Array

from backprop.callbacks import Callback, Training

if TYPE_CHECKING:
    from backprop.sklearn.network import Network

LAST_RATE = 1e-6  # an adaptive learning rate of so little ends the training


class PatienceOfScikitLearn(Callback):
    """No improvement by tol for n_iter_no_change epochs ends the training, or divides its rate.

    Other than `EarlyStopping`, the best is also moved by improvements smaller than tol.
    """

    def __init__(self, estimator: Network, key: str, scale: float) -> None:
        self.estimator, self.key, self.scale = estimator, key, scale
        self.factor = -1 / scale if key == "loss" else 1.0
        self.best, self.waited, self.converged = -math.inf, 0, False
        self.parameters: dict[str, Array] = {}  # of the best epoch
        self.step: dict[str, Any] = {}

    def epoch_end(self, training: Training) -> None:
        estimator, optimizer = self.estimator, training.step.optimizer
        score = self.factor * training.history[self.key][-1]
        missed = score < self.best + estimator.tol
        self.waited = self.waited + 1 if missed else 0
        if score > self.best:
            self.best = score
            if self.key != "loss":
                self.parameters = training.model.state_dict()
        if self.waited > estimator.n_iter_no_change:
            adaptive = estimator.learning_rate == "adaptive" and estimator.solver == "sgd"
            if adaptive and optimizer.lr * self.scale > LAST_RATE:
                optimizer.lr, self.waited = optimizer.lr / 5, 0
            else:
                self.converged = training.stop = True

    def fit_end(self, training: Training) -> None:
        if self.parameters:
            training.model.load_state_dict(self.parameters)
        self.step = training.step.state_dict()
