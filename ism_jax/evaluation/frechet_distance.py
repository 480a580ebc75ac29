"""Frechet distance between Gaussians fitted to features, in float64 on the host.

    d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

(Heusel et al. 2017, arXiv 1706.08500, equation 6; Dowson and Landau 1982). As is
customary, the square is called the Frechet distance.
"""

import chex
import numpy as np


class FeatureStatistics:
    """Count, mean and covariance of features, accumulated batch by batch.

    Accumulates deviations from the mean by the update of Chan, Golub and LeVeque
    (1979): raw second moments would lose digits to cancellation.

    Attributes:
      num_features: F.
      count: number of samples.
      mean: [F] float64.
      scatter: [F, F] float64, the sum of outer products of deviations from the mean.
    """

    def __init__(self, num_features: int):
        self.num_features = num_features
        self.count = 0
        self.mean = np.zeros(num_features)
        self.scatter = np.zeros((num_features, num_features))

    def update(self, features) -> None:
        """Adds samples: features [B, F] of any floating type, B >= 0."""
        features = np.asarray(features).astype(np.float64)
        chex.assert_shape(features, (None, self.num_features))
        if not len(features):
            return
        mean = features.mean(axis=0)
        deviations = features - mean[None]
        total = self.count + len(features)
        delta = mean - self.mean
        between = np.outer(delta, delta) * (self.count * len(features) / total)
        self.scatter = self.scatter + deviations.T @ deviations + between
        self.mean = self.mean + delta * (len(features) / total)
        self.count = total

    def covariance(self) -> np.ndarray:
        """[F, F] float64, divided by count - 1 as in the published FID code."""
        return self.scatter / (self.count - 1)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared Frechet distance between the Gaussians fitted to two sets of features.

    It is biased upwards for few samples: compare only values from equally many.
    """
    return gaussian_distance(
        first.mean, first.covariance(), second.mean, second.covariance()
    )


def gaussian_distance(mean1, covariance1, mean2, covariance2) -> float:
    """Squared Frechet distance between N(mean1, covariance1) and N(mean2, covariance2).

    With factors S = L L^T, from the eigenvectors whose eigenvalues exceed rounding,
    tr (S1 S2)^(1/2) is the sum of the singular values of L1^T L2. Singular covariances
    (fewer samples than features) thus need no offset on the diagonal, and no square
    root is taken of a rounding error, which would turn 1e-16 into 1e-8.

    Means are [F], covariances [F, F], symmetric and positive semi-definite. Rounding
    below 0 is clipped to 0.

    Raises:
      ValueError: a covariance is not positive semi-definite.
    """
    mean1, mean2 = np.asarray(mean1, np.float64), np.asarray(mean2, np.float64)
    chex.assert_equal_shape([mean1, mean2])
    covariance1, factor1 = _factor(covariance1, mean1.size)
    covariance2, factor2 = _factor(covariance2, mean2.size)
    root_trace = np.linalg.svd(factor1.T @ factor2, compute_uv=False).sum()
    traces = np.trace(covariance1) + np.trace(covariance2)
    return max(0.0, float(((mean1 - mean2) ** 2).sum() + traces - 2 * root_trace))


def _factor(covariance, num_features):
    """The covariance S in float64 and its factor L, [F, rank], with S = L L^T."""
    covariance = np.asarray(covariance, np.float64)
    chex.assert_shape(covariance, (num_features, num_features))
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    # The usual bound on the rounding of eigh, as in np.linalg.matrix_rank.
    rounding = num_features * np.finfo(np.float64).eps * max(values[-1], 0.0)
    # A covariance computed in float32 has eigenvalues down to about -1e-7 of the
    # largest; an NPZ file may hold anything.
    if values[0] < -1e-6 * max(values[-1], np.finfo(np.float64).tiny):
        raise ValueError(
            f'a covariance has the eigenvalue {values[0]:g} (largest: {values[-1]:g}) '
            'but must be positive semi-definite; recompute the reference statistics'
        )
    kept = values > rounding
    return covariance, vectors[:, kept] * np.sqrt(values[kept])[None]
