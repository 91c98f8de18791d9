"""What both estimators share: from scikit-learn's parameters to a model and a fit of it."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.errors import OptionError
from backprop_kernels.optimizers import OPTIMIZERS
from sklearn.base import BaseEstimator, is_regressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from backprop.batches import Batches
from backprop.evaluation import kind_of
from backprop.fit import fit
from backprop.gradients import weights
from backprop.history import History
from backprop.lbfgs import minimize
from backprop.losses import Loss, resolve_loss
from backprop.model import MLP
from backprop.optimizers import Optimizer, resolve_optimizer
from backprop.schedules import Schedule
from backprop.sklearn.patience import PatienceOfScikitLearn
from backprop.step import TrainStep
from backprop.validation import DataSet

SOLVERS = dict.fromkeys(("lbfgs", *(name.lower() for name in OPTIMIZERS)))
AUTO_BATCH = 200
RATES = ("constant", "invscaling", "adaptive")  # scikit-learn's; others are schedules of `fit`


class Network(BaseEstimator):  # type: ignore[misc]
    """What classifier and regressor share. See `MLPClassifier`."""

    _step: dict[str, Any] | None  # the optimizer's state, from which partial_fit goes on

    def __init__(
        self, hidden_layer_sizes: Any = (100,), activation: str = "relu", *,
        solver: str | Optimizer = "adam", alpha: float = 1e-4, batch_size: int | str = "auto",
        learning_rate: Any = "constant", learning_rate_init: float = 1e-3, power_t: float = 0.5,
        max_iter: int = 200, shuffle: bool = True, random_state: Any = None, tol: float = 1e-4,
        verbose: bool = False, warm_start: bool = False, momentum: float = 0.9,
        nesterovs_momentum: bool = True, early_stopping: bool = False,
        validation_fraction: float = 0.1, beta_1: float = 0.9, beta_2: float = 0.999,
        epsilon: float = 1e-8, n_iter_no_change: int = 10, loss: str | Loss | None = None,
        dropout: float = 0.0, norm: str | None = None, class_weight: Any = None,
        device: str = "auto",
    ) -> None:  # fmt: skip
        self.hidden_layer_sizes, self.activation = hidden_layer_sizes, activation
        self.solver, self.alpha, self.batch_size = solver, alpha, batch_size
        self.learning_rate, self.learning_rate_init = learning_rate, learning_rate_init
        self.power_t, self.max_iter, self.shuffle = power_t, max_iter, shuffle
        self.random_state, self.tol, self.verbose = random_state, tol, verbose
        self.warm_start, self.momentum = warm_start, momentum
        self.nesterovs_momentum, self.early_stopping = nesterovs_momentum, early_stopping
        self.validation_fraction, self.beta_1, self.beta_2 = validation_fraction, beta_1, beta_2
        self.epsilon, self.n_iter_no_change, self.loss = epsilon, n_iter_no_change, loss
        self.dropout, self.norm, self.class_weight = dropout, norm, class_weight
        self.device = device

    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, eval_set: Any = None) -> Any:
        """Train on X (rows, features) and y; returns the estimator.

        Args:
            sample_weight: (rows,), multiplied by those of `class_weight`.
            eval_set: (X, y): rows to stop early by, in place of a share of the training rows.
        """
        self._check()
        first = not (self.warm_start and hasattr(self, "model_"))
        X, target, loss, weight = self._data(X, y, sample_weight, first)
        if first:
            self._begin(X, target, loss)
        train = self._lbfgs if self.solver == "lbfgs" else self._epochs
        history, converged = train(X, target, loss, weight, eval_set)
        self._record(history, _scale(loss, self.n_outputs_), len(X))
        if not converged:
            warnings.warn(
                f"{type(self).__name__}: max_iter: {self.max_iter} iterations were made and the "
                "training has not converged; raise max_iter, or tol",
                ConvergenceWarning, stacklevel=2,
            )  # fmt: skip
        return self

    def _lbfgs(
        self, X: Array, target: Array, loss: Loss, weight: Array | None, eval_set: Any
    ) -> tuple[History, bool]:
        """What happened, and whether it came to an end by itself."""
        if eval_set is not None:
            raise OptionError("fit: eval_set: expected None with solver lbfgs, got rows")
        scale = _scale(loss, self.n_outputs_)
        history = minimize(
            self.model_, X, target, loss, steps=self.max_iter, tolerance=float(self.tol) * scale,
            l2=float(self.alpha) * scale / _mass(weight, len(X)), sample_weight=weight,
        )  # fmt: skip
        return history, history.epochs < self.max_iter

    def _epochs(
        self, X: Array, target: Array, loss: Loss, weight: Array | None, eval_set: Any
    ) -> tuple[History, bool]:
        scale, rows = _scale(loss, self.n_outputs_), len(X)
        metric = "r2" if kind_of(loss) == "numbers" else "accuracy"
        key = f"val_{metric}"
        split = self.early_stopping and eval_set is None
        rule = PatienceOfScikitLearn(self, key if self.early_stopping else "loss", scale)
        size = min(self._batch_rows(), rows)
        history = fit(
            self.model_, X, target, loss,
            self._optimizer(scale, _mass(weight, rows) * size / rows), self.max_iter, size,
            sample_weight=weight,
            eval_set=None if eval_set is None else self._held_out(*eval_set),
            validation_fraction=self.validation_fraction if split else None,
            metrics=metric if split or eval_set is not None else (),
            schedule=self._schedule(rows), shuffle=self.shuffle, callbacks=[rule],
            progress="lines" if self.verbose else False, seed=self._seed,
        )  # fmt: skip
        self._step = rule.step
        self.validation_scores_ = history.get(key)
        self.best_validation_score_ = rule.best if self.early_stopping else None
        asked_for_all = self.n_iter_no_change == math.inf
        return history, rule.converged or history.interrupted or asked_for_all

    def _partial_fit(self, X: Any, y: Any, sample_weight: Any, classes: Any = None) -> Any:
        """One epoch over these rows; the optimizer goes on from the call before."""
        self._check()
        for name, expected in (("early_stopping", False), ("learning_rate", "constant")):
            if getattr(self, name) != expected:
                raise OptionError(
                    f"partial_fit: {name}: expected {expected!r}, got {getattr(self, name)!r}; "
                    "only fit knows all epochs"
                )
        if self.solver == "lbfgs":
            raise OptionError("partial_fit: solver: expected one of small batches, got 'lbfgs'")
        first = not hasattr(self, "model_")
        X, target, loss, weight = self._data(X, y, sample_weight, first, classes)
        if first:
            self._begin(X, target, loss)
        scale, model = _scale(loss, self.n_outputs_), self.model_
        columns = DataSet.checked(model, loss, X, target, weight, "partial_fit").columns
        size = min(self._batch_rows(), len(X))
        optimizer = self._optimizer(scale, _mass(weight, len(X)) * size / len(X))
        step = TrainStep(model, loss, optimizer, size, seed=self._seed)
        if self._step is not None:
            step.load_state_dict(self._step)
        batches = Batches(model.backend, columns, size, self.shuffle, self._seed, model.memory)
        total = sum(len(b[0]) * step.run(*b) for b in batches.epoch(len(self.loss_curve_)))
        self._step = step.state_dict()
        self._record(History(loss=[total / len(X)]), scale, len(X))
        return self

    def _check(self) -> None:
        """Refuse what `fit` would refuse under another name."""
        where = type(self).__name__
        checks.integer(where, "max_iter", self.max_iter, 1)
        if self.batch_size != "auto":
            checks.integer(where, "batch_size", self.batch_size, 1)
        if self.n_iter_no_change != math.inf:
            checks.integer(where, "n_iter_no_change", self.n_iter_no_change, 1)
        if not isinstance(self.solver, Optimizer):
            checks.choice(where, "solver", self.solver, SOLVERS)
        for name in ("alpha", "learning_rate_init", "tol", "power_t"):
            value = getattr(self, name)
            number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if not (number and 0 <= value < math.inf):
                raise OptionError(f"{where}: {name}: expected a number ≥ 0, got {value!r}")

    def _data(
        self, X: Any, y: Any, weight: Any, first: bool, classes: Any = None
    ) -> tuple[Array, Array, Loss, Array | None]:
        """(X, target, loss, weight) as `fit` of this library takes them."""
        X, y = validate_data(
            self, X, y, dtype=(np.float64, np.float32), multi_output=True, reset=first,
            y_numeric=is_regressor(self),
        )  # fmt: skip
        X = np.asarray(X)  # memory maps too: they lie in memory by now
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        self._learn(y, first, classes)
        if weight is not None:
            weight = weights(weight, len(X), type(self).__name__, np.float64)
        if self.class_weight is not None:
            by_class = compute_sample_weight(self.class_weight, y)
            weight = by_class if weight is None else weight * by_class
        return X, self._encoded(y), resolve_loss(self._loss()), weight

    def _learn(self, y: Array, first: bool, classes: Any) -> None:
        """Take note of the classes in y, or refuse it."""

    def _expect_known(self, where: str, y: Array) -> None:
        """Refuse classes that were not there before."""

    def _encoded(self, y: Array) -> Array:
        """y as the loss takes it."""
        return y

    def _loss(self) -> str | Loss:
        raise NotImplementedError

    def _held_out(self, X: Any, y: Any) -> tuple[Array, Array]:
        y = np.asarray(y)
        self._expect_known(f"{type(self).__name__}: eval_set", y)
        return validate_data(self, X, reset=False), self._encoded(y)

    def _begin(self, X: Array, target: Array, loss: Loss) -> None:
        """A new network, as wide as the data."""
        hidden = np.ravel(self.hidden_layer_sizes).tolist()
        self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.n_outputs_ = target.shape[1] if target.ndim == 2 else 1
        if loss.name == "cross_entropy":
            self.n_outputs_ = len(self.classes_)
        self.model_ = MLP(
            [X.shape[1], *hidden, self.n_outputs_],
            "sigmoid" if self.activation == "logistic" else self.activation,
            self.dropout, self.norm, dtype=str(X.dtype), device=self.device, seed=self._seed,
        )  # fmt: skip
        self.n_layers_ = len(hidden) + 2
        self.loss_curve_: list[float] = []
        self.n_iter_ = self.t_ = 0
        self._step = None

    def _record(self, history: History, scale: float, rows: int) -> None:
        self.history_ = history
        losses = [loss / scale for loss in history.get("loss", [])]
        self.loss_curve_ += losses
        self.loss_ = self.loss_curve_[-1] if self.loss_curve_ else math.nan
        self.best_loss_ = None if self.early_stopping else min(self.loss_curve_, default=math.nan)
        self.n_iter_ = max(len(losses), 1)
        self.t_ += len(losses) * rows

    def _batch_rows(self) -> int:
        return AUTO_BATCH if self.batch_size == "auto" else int(self.batch_size)

    def _optimizer(self, scale: float, mass: float) -> Optimizer:
        """`solver` with the parameters that are its own; `mass` is the weight of a batch."""
        if isinstance(self.solver, Optimizer):
            return self.solver
        lr = float(self.learning_rate_init)
        options: dict[str, Any] = {"lr": lr, "l2": float(self.alpha) * scale / mass}
        if self.solver == "sgd":
            nesterov = self.nesterovs_momentum and self.momentum > 0
            options |= {"lr": lr / scale, "momentum": self.momentum, "nesterov": nesterov}
        elif self.solver == "adam":
            options |= {"betas": (self.beta_1, self.beta_2), "eps": self.epsilon * scale}
        return resolve_optimizer(self.solver, **options)

    def _schedule(self, rows: int) -> Any:
        if self.learning_rate == "invscaling" and self.solver == "sgd":
            return Schedule(lambda t: float((int(t) * rows + 1) ** -self.power_t))
        known = isinstance(self.learning_rate, str) and self.learning_rate in RATES
        return None if known else self.learning_rate

    @property
    def coefs_(self) -> list[Array]:
        """The weights, (in_features, out_features) a layer: views, or a GPU's as copies."""
        return [W.T for name, W in self._tensors() if name.endswith("weight")]

    @property
    def intercepts_(self) -> list[Array]:
        """The biases, (out_features,) a layer, likewise."""
        return [b for name, b in self._tensors() if name.endswith("bias")]

    def _tensors(self) -> list[tuple[str, Array]]:
        model = self.model_
        views = model.layout.views(model.memory.numpy(model.parameters))
        return [item for item in views.items() if item[0].startswith("layers.")]

    def _rows(self, X: Any) -> Array:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=(np.float64, np.float32), reset=False)
        return np.asarray(X)


def _scale(loss: Loss, outputs: int) -> float:
    """The gradient here over scikit-learn's, which adds up outputs and halves squares."""
    return {"cross_entropy": 1.0, "mse": 2 / outputs}.get(loss.name, 1 / outputs)


def _mass(weight: Array | None, rows: int) -> float:
    """What scikit-learn divides alpha by: the sum of the weights."""
    mass = rows if weight is None else float(weight.sum())
    if not mass > 0:
        raise OptionError("fit: sample_weight: expected one above 0, got only zeros")
    return mass
