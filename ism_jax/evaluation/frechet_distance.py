"""Frechet distance between Gaussians fitted to features, in float64 on the host.

    d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

(Heusel et al. 2017, arXiv 1706.08500, equation 6; Dowson and Landau 1982). As is the
custom, the square is what is called the Frechet distance.
"""

import math

import numpy as np


class FeatureStatistics:
    """Count, mean and covariance of features that arrive batch by batch.

    Kept as the sum of products of deviations from the mean, merged by the rule of
    Chan, Golub and LeVeque (1979): raw second moments would lose the digits that the
    mean and the covariance have in common.

    Attributes:
      num_features: F.
      count: samples seen.
      mean: [F] float64.
      scatter: [F, F] float64, the sum of outer products of deviations from the mean.
    """

    def __init__(self, num_features: int):
        if num_features < 1:
            raise ValueError(f'num_features = {num_features} must be at least 1')
        self.num_features = num_features
        self.count = 0
        self.mean = np.zeros(num_features)
        self.scatter = np.zeros((num_features, num_features))

    def update(self, features) -> None:
        """Adds the samples `features`, [B, F], of any floating type; B may be 0.

        Raises:
          ValueError: features have another shape, or are not finite.
        """
        features = np.asarray(features).astype(np.float64)
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(
                f'features have shape {features.shape}; these statistics take '
                f'[B, {self.num_features}]'
            )
        bad = np.count_nonzero(~np.isfinite(features).all(axis=1))
        if bad:
            raise ValueError(
                f'features of {bad} of {len(features)} samples are not finite; check '
                'the images for NaN, or leave those samples out and report how many'
            )
        if not len(features):
            return
        mean = features.mean(axis=0)
        deviations = features - mean[None]
        self._add(len(features), mean, deviations.T @ deviations)

    def merge(self, other: 'FeatureStatistics') -> None:
        """Adds the samples that `other` has seen.

        Raises:
          ValueError: `other` has another number of features.
        """
        if other.num_features != self.num_features:
            raise ValueError(
                f'cannot merge statistics of {other.num_features} features into those '
                f'of {self.num_features}: use one feature function for both'
            )
        if other.count:
            self._add(other.count, other.mean, other.scatter)

    def _add(self, count, mean, scatter) -> None:
        total = self.count + count
        delta = mean - self.mean
        between = np.outer(delta, delta) * (self.count * count / total)
        self.scatter = self.scatter + scatter + between
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def covariance(self) -> np.ndarray:
        """[F, F] float64, divided by count - 1 as in the published FID code.

        Raises:
          ValueError: fewer than 2 samples were seen.
        """
        if self.count < 2:
            raise ValueError(
                f'count = {self.count}: a covariance needs at least 2 samples; '
                'evaluate more'
            )
        return self.scatter / (self.count - 1)

    def to_bytes(self) -> np.ndarray:
        """All of it as uint8 [8 (1 + F + F^2)], to be gathered from other processes.

        Bytes, because a JAX collective would round float64 to float32.
        """
        parts = [[np.float64(self.count)], self.mean, self.scatter.ravel()]
        return np.concatenate(parts).view(np.uint8)

    @classmethod
    def from_bytes(cls, data) -> 'FeatureStatistics':
        """What `to_bytes` wrote, bit for bit.

        Raises:
          ValueError: the length is not one that `to_bytes` makes.
        """
        data = np.ascontiguousarray(data, np.uint8)
        num_features = (math.isqrt(max(data.size // 2 - 3, 0)) - 1) // 2
        if num_features < 1 or data.size != 8 * (1 + num_features + num_features**2):
            raise ValueError(
                f'data of {data.size} bytes are not statistics: 8 (1 + F + F^2) are '
                'expected; pass what to_bytes returned'
            )
        values = data.view(np.float64)
        statistics = cls(num_features)
        statistics.count = int(values[0])
        statistics.mean = values[1 : 1 + num_features].copy()
        scatter = values[1 + num_features :].reshape(num_features, num_features)
        statistics.scatter = scatter.copy()
        return statistics


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared Frechet distance between the Gaussians fitted to two sets of features.

    It is biased upwards for few samples: compare only numbers from equally many.

    Raises:
      ValueError: as `gaussian_distance`, or one of them saw fewer than 2 samples.
    """
    return gaussian_distance(
        first.mean, first.covariance(), second.mean, second.covariance()
    )


def gaussian_distance(mean1, covariance1, mean2, covariance2) -> float:
    """Squared Frechet distance between N(mean1, covariance1) and N(mean2, ...).

    With factors S = L L^T, from the eigenvectors whose eigenvalues are above rounding,
    tr (S1 S2)^(1/2) is the sum of the singular values of L1^T L2. Singular covariances
    (fewer samples than features) need no offset on the diagonal, and no tiny number is
    rooted: the root of an eigenvalue that is 1e-16 by rounding would be 1e-8.

    Args:
      mean1, mean2: [F].
      covariance1, covariance2: [F, F], symmetric positive semi-definite.

    Returns:
      The distance, at least 0 (rounding below 0 is cut off).

    Raises:
      ValueError: shapes disagree, a value is not finite, or a covariance is not
        symmetric positive semi-definite.
    """
    mean1, mean2 = _check_mean(mean1, 'mean1'), _check_mean(mean2, 'mean2')
    if mean1.shape != mean2.shape:
        raise ValueError(
            f'mean1 has {mean1.size} features and mean2 {mean2.size}: use one feature '
            'function for both'
        )
    covariance1, factor1 = _factor(covariance1, mean1.size, 'covariance1')
    covariance2, factor2 = _factor(covariance2, mean2.size, 'covariance2')
    root_trace = np.linalg.svd(factor1.T @ factor2, compute_uv=False).sum()
    traces = np.trace(covariance1) + np.trace(covariance2)
    return max(0.0, float(((mean1 - mean2) ** 2).sum() + traces - 2 * root_trace))


def _check_mean(mean, name):
    mean = np.asarray(mean, np.float64)
    if mean.ndim != 1 or not mean.size or not np.isfinite(mean).all():
        raise ValueError(
            f'{name} of shape {mean.shape} must be a finite vector [F]: check the '
            'features that it was computed from'
        )
    return mean


def _factor(covariance, num_features, name):
    """The covariance in float64 and its factor L, [F, rank], with S = L L^T."""
    covariance = np.asarray(covariance, np.float64)
    if covariance.shape != (num_features, num_features):
        raise ValueError(
            f'{name} has shape {covariance.shape}, expected '
            f'({num_features}, {num_features}) as the mean has {num_features} features'
        )
    if not np.isfinite(covariance).all():
        raise ValueError(f'{name} is not finite: check the features it comes from')
    largest_entry = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > 1e-8 * largest_entry:
        raise ValueError(f'{name} is not symmetric: pass a covariance, not a factor')
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    # The customary bound on the rounding of eigh, as in np.linalg.matrix_rank.
    rounding = num_features * np.finfo(np.float64).eps * max(values[-1], 0.0)
    # Covariances computed in float32 are below zero by more than float64's rounding.
    if values[0] < -1e-6 * max(values[-1], np.finfo(np.float64).tiny):
        raise ValueError(
            f'{name} has the eigenvalue {values[0]:g} beside the largest, '
            f'{values[-1]:g}: it must be positive semi-definite; compute it from '
            'features in float64'
        )
    kept = values > rounding
    return covariance, vectors[:, kept] * np.sqrt(values[kept])[None]
