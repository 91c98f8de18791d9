"""scikit-learn's estimators: `MLPClassifier` and `MLPRegressor` with its parameters, trained here.

What has scikit-learn's name has its meaning: the same gradient, penalty, learning rate and end of
training, so that from the same initial weights come the same numbers. docs/sklearn.md lists what is
more here and what is missing.
"""

from backprop.extras import need

need("sklearn", "sklearn", "backprop.sklearn")

from backprop.sklearn.classifier import MLPClassifier  # noqa: E402
from backprop.sklearn.regressor import MLPRegressor  # noqa: E402

__all__ = ["MLPClassifier", "MLPRegressor"]
