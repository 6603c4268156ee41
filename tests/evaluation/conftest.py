import numpy as np
import pytest


@pytest.fixture
def cohort():
    """Labels, scores with many ties, and patients of 400 images."""
    g = np.random.default_rng(0)
    patients = g.integers(0, 60, 400)
    labels = (g.random((400, 3)) < (0.4, 0.1, 0.03)).astype(float)
    scores = np.round(labels + g.normal(0, 1.2, labels.shape), 1)
    return labels, scores, patients
