"""Can a classifier tell synthetic images from real ones? Scores of images it was not fitted on (cross-fitting).

The AUC is that of a classifier two-sample test (Lopez-Paz and Oquab 2017): 0.5 says that these features do not tell them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import mannwhitneyu
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from medaug.draws import key_seed
from medaug.errors import DataError
from medaug.quality.neighbours import checked_features
from medaug.quality.outliers import PASS_SHARE, limit_of

FOLDS = 5
REGULARISATION = 0.01  # inverse strength: there are often more features than images

__all__ = ["RealFake", "auc_interval", "fit_real_fake"]


@dataclass(frozen=True, eq=False)
class RealFake:
    """A cross-fitted classifier of real against synthetic.

    Attributes:
        real, synthetic: out-of-fold scores (N,) and (M,): log-odds of being synthetic.
        auc: of these scores.  low, high: 95 % interval.
        accuracy: balanced, at log-odds 0.
        p: one-sided Mann-Whitney p of the scores.
        models: one per fold.
        fold: (M,), the model that gave each synthetic score: the one that was not fitted on the image.
    """

    real: np.ndarray
    synthetic: np.ndarray
    auc: float
    low: float
    high: float
    accuracy: float
    p: float
    models: tuple[Pipeline, ...]
    fold: np.ndarray

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Log-odds (folds, N) by each model, for images that none of them was fitted on."""
        return np.stack([model.decision_function(checked_features(features)) for model in self.models])

    def limits(self, validation: np.ndarray, pass_share: float = PASS_SHARE) -> np.ndarray:
        """For each synthetic image (M,) what `pass_share` of validation images, features (N, D), stay within by the same model.

        Not by the mean over the models: it spreads less than the scores of one, and would turn honest images away too often.
        """
        scores = self.scores(validation) if len(validation) else np.empty((len(self.models), 0))
        return np.array([limit_of(row, pass_share) for row in scores])[self.fold]


def fit_real_fake(
    real: np.ndarray,
    synthetic: np.ndarray,
    real_groups: Sequence[str],
    synthetic_groups: Sequence[str],
    *,
    folds: int = FOLDS,
    key: object = 0,
) -> RealFake:
    """Fit a logistic regression per fold; a patient, and what was made from the patient's images, is in one fold.

    Args:
        real: (N, D).  synthetic: (M, D).
        real_groups, synthetic_groups: of each image.
        folds: at most; fewer where there are fewer groups.
        key: of the assignment to folds.

    Raises:
        DataError: too few groups for two folds (code `groups-too-few`).
    """
    x = np.concatenate([checked_features(real), checked_features(synthetic)])
    y = np.repeat([0, 1], [len(real), len(synthetic)])
    groups = np.array([*real_groups, *synthetic_groups])
    count = min(folds, len(set(real_groups)), len(set(synthetic_groups)))
    if count < 2:
        raise DataError("groups-too-few", "Telling real from synthetic needs images of at least two patients on either side.")
    scores, fold = np.full(len(x), np.nan), np.full(len(x), -1)
    models: list[Pipeline] = []
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=key_seed("real-fake", key) % 2**32)
    for train, test in splitter.split(x, y, groups):
        if len(set(y[train])) < 2:
            raise DataError("groups-too-few", "A fold lacks real or synthetic images; images of more patients are needed.")
        model = make_pipeline(StandardScaler(), LogisticRegression(C=REGULARISATION, class_weight="balanced", max_iter=1000))
        scores[test] = model.fit(x[train], y[train]).decision_function(x[test])
        fold[test] = len(models)
        models.append(model)
    own, made = scores[y == 0], scores[y == 1]
    auc, low, high = auc_interval(made, own)
    accuracy = float(((own < 0).mean() + (made >= 0).mean()) / 2)
    p = float(mannwhitneyu(made, own, alternative="greater").pvalue)
    return RealFake(own, made, auc, low, high, accuracy, p, tuple(models), fold[y == 1])


def auc_interval(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float, float]:
    """AUC and its 95 % interval (Hanley and McNeil 1982, eq. 1 to 3) of scores (N,) that should exceed others (M,)."""
    n, m = len(positive), len(negative)
    if not min(n, m):
        raise DataError("features-empty", "An AUC needs scores on both sides, got none on one.")
    auc = float(mannwhitneyu(positive, negative, alternative="greater").statistic) / (n * m)
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = (auc * (1 - auc) + (n - 1) * (q1 - auc**2) + (m - 1) * (q2 - auc**2)) / (n * m)
    # An AUC of 0 or 1 has no variance by this formula; one pair more that says otherwise bounds it.
    spread = max(1.96 * max(variance, 0.0) ** 0.5, 1 / (min(n, m) + 1) if auc in (0.0, 1.0) else 0.0)
    return auc, max(0.0, auc - spread), min(1.0, auc + spread)
