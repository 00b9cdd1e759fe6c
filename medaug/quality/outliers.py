"""How unlike the real training images a synthetic one is: energy, Mahalanobis, nearest neighbours, virtual outliers.

Every score is larger for a stranger image. The limit is what 95 % of the real validation images stay within, so an honest
generator loses about one image in twenty to each method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor
from torch.nn import functional

from medaug.draws import numpy_generator
from medaug.errors import DataError
from medaug.quality.neighbours import checked_features, nearest, unit_rows

PASS_SHARE = 0.95
LEAST_VALIDATION = 20  # fewer say nothing of a 95th percentile
NEIGHBOURS = 5

Score = Callable[[np.ndarray], np.ndarray]

__all__ = ["METHODS", "ClassGaussians", "energy", "fit_gaussians", "fit_vos", "limit_of", "mahalanobis", "neighbour", "vos"]


def energy(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """-T log sum_k exp(f_k / T), (N,), of logits (N, K) (Liu et al. 2020, eq. 4)."""
    scaled = checked_features(logits) / temperature
    peak = scaled.max(axis=1)
    return -temperature * (peak + np.log(np.exp(scaled - peak[:, None]).sum(axis=1)))


@dataclass(frozen=True)
class ClassGaussians:
    """A Gaussian per class with one covariance.

    Attributes:
        means: (K, D).
        covariance: (D, D), shrunk towards a multiple of the identity, so that it can be inverted with fewer images than D.
        shrinkage: how far, in [0, 1].
    """

    means: np.ndarray
    covariance: np.ndarray
    shrinkage: float

    def squared_distances(self, features: np.ndarray) -> np.ndarray:
        """Squared Mahalanobis distance (N, K) to each class mean."""
        factor = np.linalg.cholesky(self.covariance)
        white = np.linalg.solve(factor, checked_features(features).T).T
        means = np.linalg.solve(factor, self.means.T).T
        return np.stack([((white - mean) ** 2).sum(axis=1) for mean in means], axis=1)


def fit_gaussians(features: np.ndarray, labels: np.ndarray) -> ClassGaussians:
    """Class means and the tied covariance by Ledoit and Wolf (2004).

    Args:
        features: (N, D).
        labels: (N,) class indices; classes without an image are left out.

    Raises:
        DataError: labels that do not fit, or features that do not vary within any class (code `features-constant`).
    """
    x, target = checked_features(features), np.asarray(labels)
    if target.shape != (len(x),):
        raise DataError("features-invalid", f"Each of {len(x)} rows of features needs a label, got {target.shape}.")
    means = np.stack([x[target == label].mean(axis=0) for label in np.unique(target)])
    residual = x - means[np.searchsorted(np.unique(target), target)]
    if not np.any(np.abs(residual) > 1e-12):
        raise DataError(
            "features-constant", "The training images of each class have the same features; nothing tells what is unusual."
        )
    fitted = LedoitWolf(assume_centered=True).fit(residual)
    floor = 1e-9 * np.trace(fitted.covariance_) / x.shape[1]
    return ClassGaussians(means, fitted.covariance_ + floor * np.eye(x.shape[1]), float(fitted.shrinkage_))


def mahalanobis(features: np.ndarray, labels: np.ndarray) -> Score:
    """Squared distance to the nearest class mean (Lee et al. 2018), fitted on training features (N, D) and labels."""
    gaussians = fit_gaussians(features, labels)
    return lambda x: gaussians.squared_distances(x).min(axis=1)


def neighbour(features: np.ndarray, labels: np.ndarray, k: int = NEIGHBOURS) -> Score:
    """Distance to the k-th nearest training image, features L2-normalised (Sun et al. 2022); labels play no part."""
    training = unit_rows(features)
    chosen = min(k, len(training))
    return lambda x: nearest(unit_rows(x), training, chosen)[0][:, -1]


@dataclass(frozen=True, eq=False)
class VosHead:
    """A linear head on standardised features, trained with virtual outliers; see `fit_vos`.

    Attributes:
        mean, scale: (D,) of the standardisation.  weight: (K, D).  bias: (K,).
        class_weight: (K,), positive: w_k in the energy.
        slope, offset: of the logistic regression on the energy.
    """

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    class_weight: np.ndarray
    slope: float
    offset: float

    def energies(self, features: np.ndarray) -> np.ndarray:
        """-log sum_k w_k exp f_k(x), (N,)."""
        logits = ((checked_features(features) - self.mean) / self.scale) @ self.weight.T + self.bias
        return energy(logits + np.log(self.class_weight))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Logit (N,) of being an outlier: larger for stranger images."""
        return self.slope * self.energies(features) + self.offset


def virtual_outliers(gaussians: ClassGaussians, per_class: int, draws: int, key: object) -> np.ndarray:
    """The `per_class` least dense of `draws` draws from each class Gaussian, (K * per_class, D) (Du et al. 2022, eq. 3 and 4)."""
    factor = np.linalg.cholesky(gaussians.covariance)
    kept = []
    for label, mean in enumerate(gaussians.means):
        normal = numpy_generator("vos", key, label).standard_normal((draws, len(mean)))
        # The density falls with the length of the standard normal draw behind a point.
        chosen = np.argsort(-(normal**2).sum(axis=1), kind="stable")[:per_class]
        kept.append(mean + normal[chosen] @ factor.T)
    return np.concatenate(kept)


def fit_vos(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    beta: float = 0.1,
    per_class: int = 100,
    draws: int = 5000,
    steps: int = 300,
    key: object = 0,
) -> VosHead:
    """Train a head on frozen features: cross-entropy plus `beta` times a logistic loss of real against virtual by their energy.

    Du et al. (2022), eq. 5 to 7, with a fixed feature extractor: their virtual outliers also live in the feature space, so
    nothing below it is needed. A linear head is sure of what lies far out in a direction that no class uses, as noise or another
    modality may: such images are for `mahalanobis` and `neighbour`, virtual outliers are for those between and around the classes.

    Args:
        features: (N, D) of real training images.  labels: (N,).
        beta: weight of the uncertainty loss.
        per_class, draws: virtual outliers kept of how many draws per class.
        steps: of Adam, over the whole set.
        key: of the draws.
    """
    x = checked_features(features)
    mean, scale = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-8)
    standard = (x - mean) / scale
    outliers = virtual_outliers(fit_gaussians(standard, labels), per_class, draws, key)
    target = torch.from_numpy(np.unique(labels, return_inverse=True)[1])
    real, virtual = torch.from_numpy(standard), torch.from_numpy(outliers)
    weight, bias, log_w, slope, offset = _train(real, virtual, target, beta, steps)
    return VosHead(mean, scale, weight.numpy(), bias.numpy(), np.exp(log_w.numpy()), float(slope), float(offset))


def _train(real: Tensor, virtual: Tensor, target: Tensor, beta: float, steps: int) -> list[Tensor]:
    """Head weights, bias, log w_k, slope and offset, float64, from fixed starts: nothing is drawn."""
    classes = int(target.max()) + 1
    shapes = [(classes, real.shape[1]), (classes,), (classes,), (), ()]
    parameters = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    with torch.no_grad():
        parameters[3].fill_(1.0)
    optimiser = torch.optim.Adam(parameters, lr=0.02, weight_decay=1e-4)
    weight, bias, log_w, slope, offset = parameters
    counts = torch.tensor([len(real), len(virtual)], dtype=torch.float64)
    for _ in range(steps):
        optimiser.zero_grad()
        logits = real @ weight.T + bias
        energies = [-torch.logsumexp(f + log_w, dim=1) for f in (logits, virtual @ weight.T + bias)]
        # Both sides weigh the same, however many outliers were drawn.
        uncertain = functional.softplus(slope * energies[0] + offset).sum() / counts[0]
        uncertain = uncertain + functional.softplus(-(slope * energies[1] + offset)).sum() / counts[1]
        loss = functional.cross_entropy(logits, target) + beta * uncertain
        loss.backward()
        optimiser.step()
    return [parameter.detach() for parameter in parameters]


def vos(features: np.ndarray, labels: np.ndarray) -> Score:
    """`fit_vos` as a score."""
    return fit_vos(features, labels)


# Fitted on training features (N, D) and labels (N,). "energy" needs a classifier's logits and is not fitted.
METHODS: Mapping[str, Callable[[np.ndarray, np.ndarray], Score]] = {"mahalanobis": mahalanobis, "knn": neighbour, "vos": vos}


def limit_of(validation_scores: np.ndarray, pass_share: float = PASS_SHARE) -> float:
    """The smallest limit that `pass_share` of the real validation images stay within.

    Raises:
        DataError: fewer than `LEAST_VALIDATION` images (code `validation-too-few`), or scores that are not finite.
    """
    scores = np.asarray(validation_scores, dtype=np.float64)
    if len(scores) < LEAST_VALIDATION:
        raise DataError(
            "validation-too-few",
            f"A limit that 95 % of real images pass needs at least {LEAST_VALIDATION} validation images, got {len(scores)}; leave "
            "this check out or split the cohort anew.",
        )
    if not np.isfinite(scores).all():
        raise DataError("features-invalid", "Scores of the validation images must be finite.")
    return float(np.quantile(scores, pass_share, method="higher"))
