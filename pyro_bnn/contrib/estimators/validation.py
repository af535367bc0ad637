# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The checks of scikit-learn's estimators, in the versions that do not have them in public."""

from typing import Any

import numpy as np
from sklearn.utils.validation import check_array, check_X_y


def validate_data(
    estimator: Any, X: Any, y: Any = "no_validation", *, reset: bool = True, **options: Any
) -> Any:
    """What :func:`sklearn.utils.validation.validate_data` does, which is there from scikit-learn 1.6 on."""
    columns = getattr(X, "columns", ())
    names: Any = np.asarray(list(columns), dtype=object) if all(isinstance(c, str) for c in columns) else []
    if y is None:
        raise ValueError(f"{type(estimator).__name__} requires y to be passed, but the target y is None")
    if isinstance(y, str) and y == "no_validation":
        options = {key: value for key, value in options.items() if key not in ("multi_output", "y_numeric")}
        result = X = check_array(X, **options)
    else:
        X, _ = result = check_X_y(X, y, **options)
    if reset:
        estimator.n_features_in_ = X.shape[1]
        if len(names):
            estimator.feature_names_in_ = names
        return result
    known = getattr(estimator, "feature_names_in_", [])
    if len(known) and len(names) and list(known) != list(names):
        raise ValueError(
            f"The feature names should match those that were passed during fit: {list(known)}, found {list(names)}"
        )
    if X.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has {X.shape[1]} features, but {type(estimator).__name__} is expecting {estimator.n_features_in_} features as input"
        )
    return result
