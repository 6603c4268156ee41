"""Controls: what a score must be when there is nothing to learn, or nothing but the view."""

from collections.abc import Sequence

import numpy as np


def column_scores(train_values: Sequence, train_labels, test_values: Sequence) -> np.ndarray:
    """Scores (n_test, n_classes) from one column alone, such as the view position: each value scores the share of
    positives that it has in the training part. A value not seen there scores the class's prevalence."""
    train_values = np.asarray(train_values, dtype=str)
    labels = np.asarray(train_labels, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        overall = np.nanmean(labels, axis=0)
        share = {value: np.nanmean(labels[train_values == value], axis=0) for value in np.unique(train_values)}
    scores = np.array([share.get(value, overall) for value in np.asarray(test_values, dtype=str)])
    return np.where(np.isnan(scores), overall, scores)
