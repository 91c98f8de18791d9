"""The classifier: classes of any kind to and from what the losses take."""

from __future__ import annotations

from typing import Any

import numpy as np
from backprop_kernels.activations import sigmoid
from backprop_kernels.arrays import Array
from backprop_kernels.errors import LabelError, OptionError
from backprop_kernels.reference import array_math
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets, type_of_target

from backprop.losses import Loss, resolve_loss
from backprop.sklearn.network import Network


class MLPClassifier(ClassifierMixin, Network):  # type: ignore[misc]
    """scikit-learn's `MLPClassifier`: its parameters and attributes, and these besides.

    Args:
        activation: also any name from the activation table.
        solver: also "adamw", "lion", …, or an optimizer such as `Muon(lr=0.02)`, which brings all
            its options, so that alpha and learning_rate_init are not used.
        learning_rate: also a schedule of `fit`: "cosine", `Schedule("cosine", warmup=2)`, …
        loss: log loss, or one such as `Loss("cross_entropy", label_smoothing=0.1)`.
        dropout, norm, device: of `MLP`.
        class_weight: "balanced", or weights by class.
    """

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, classes: Any = None) -> Any:
        """Train one epoch on these rows; `classes`, of all calls, is needed in the first."""
        if classes is None and not hasattr(self, "classes_"):
            raise OptionError(
                "partial_fit: classes: expected those of all calls in the first, got None"
            )
        return self._partial_fit(X, y, sample_weight, classes)

    def predict(self, X: Any) -> Array:
        """The class of each row, or of several labels each 0 or 1."""
        P = self.predict_proba(X)
        return (P > 0.5).astype(int) if self._multilabel else self.classes_[P.argmax(axis=1)]

    def predict_proba(self, X: Any) -> Array:
        """(rows, classes): the probability of each, in the order of `classes_`."""
        X = self._rows(X)
        if self._multilabel:
            with np.errstate(under="ignore"):
                return sigmoid(array_math, self.model_.predict(X))
        P = self.model_.predict_proba(X)
        return np.hstack([1 - P, P]) if self.n_outputs_ == 1 else P

    def predict_log_proba(self, X: Any) -> Array:
        """The logarithm of `predict_proba`."""
        return np.log(self.predict_proba(X))

    @property
    def out_activation_(self) -> str:
        """What makes probabilities of the last layer."""
        return "logistic" if self.n_outputs_ == 1 or self._multilabel else "softmax"

    @property
    def _multilabel(self) -> bool:
        return bool(self._kind == "multilabel-indicator")

    def _learn(self, y: Array, first: bool, classes: Any) -> None:
        where = type(self).__name__
        check_classification_targets(y)
        kind = type_of_target(y)
        if kind == "multiclass-multioutput":
            raise LabelError(f"{where}: y: expected one class a row, or labels 0 and 1, got {kind}")
        if first:
            self._kind = kind
            self.classes_ = self._classes(y) if classes is None else np.unique(classes)
            if len(self.classes_) < 2:
                raise LabelError(
                    f"{where}: y: expected at least 2 classes, got 1 class: {self.classes_}"
                )
        self._expect_known(where, y)

    def _classes(self, y: Array) -> Array:
        return np.arange(y.shape[1]) if self._multilabel else np.unique(y)

    def _expect_known(self, where: str, y: Array) -> None:
        found = self._classes(y)
        if unknown := sorted(set(found.tolist()) - set(self.classes_.tolist())):
            raise LabelError(f"{where}: y: expected classes {self.classes_}, got {unknown} too")

    def _encoded(self, y: Array) -> Array:
        return y if self._multilabel else np.searchsorted(self.classes_, y)

    def _loss(self) -> str | Loss:
        many = len(self.classes_) > 2 and not self._multilabel
        if self.loss is None:
            return "cross_entropy" if many else "bce_with_logits"
        name = resolve_loss(self.loss).name
        fitting = [] if self._multilabel else ["cross_entropy"]
        fitting += [] if many else ["bce_with_logits", "focal"]
        if name not in fitting:
            expected = " or ".join(fitting)
            raise OptionError(
                f"MLPClassifier: loss: expected {expected} for these classes, got {name}"
            )
        return self.loss

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags
