"""How well two sets of images can be distinguished."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.core.rng import generator


def probe(
    real: np.ndarray, synthetic: np.ndarray, count: int, seed: int, named: Sequence[str | int]
) -> float:
    """Out-of-fold area under the ROC curve of a logistic regression that separates `count` vectors
    of each side, drawn by `seed` and `named`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = generator(seed, "probe", *named)
    sides = [side[order.permutation(len(side))[:count]] for side in (real, synthetic)]
    both = np.concatenate(sides)
    truth = np.r_[np.zeros(count), np.ones(count)]
    folds = StratifiedKFold(min(5, count), shuffle=True, random_state=0)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
    scores = cross_val_predict(model, both, truth, cv=folds, method="decision_function")
    return float(roc_auc_score(truth, scores))
