"""Kernel distance (KID when of Inception's features), in float64 on the host.

The squared maximum mean discrepancy of the kernel k(x, y) = (x . y / F + 1)^3, by its
unbiased estimator (Binkowski et al. 2018, arXiv 1801.01401, section 4; Gretton et al.
2012, equation 3):

    1/(m (m-1)) sum_{i != j} k(x_i, x_j) + 1/(m (m-1)) sum_{i != j} k(y_i, y_j)
        - 2/m^2 sum_{i, j} k(x_i, y_j)

It is not biased by the number of samples as the Frechet distance is, and may be
negative where the distributions agree.
"""

import numpy as np

DEGREE = 3


def kernel_distance(
    first,
    second,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """Mean and standard deviation of the distance over random subsets of the samples.

    The subsets are those that torch-fidelity draws with this seed.

    Args:
      first, second: [N, F] and [M, F] features, of any floating type.
      subsets: how many pairs of subsets are drawn.
      subset_size: m, samples of each subset, drawn without replacement.
      seed: of the subsets.

    Raises:
      ValueError: shapes disagree, values are not finite, or there are fewer samples
        than a subset takes.
    """
    features = [_check(first, 'first'), _check(second, 'second')]
    if features[0].shape[1] != features[1].shape[1]:
        raise ValueError(
            f'first has {features[0].shape[1]} features and second '
            f'{features[1].shape[1]}: use one feature function for both'
        )
    if subsets < 1:
        raise ValueError(f'subsets = {subsets} must be at least 1')
    fewest = min(map(len, features))
    if not 2 <= subset_size <= fewest:
        raise ValueError(
            f'subset_size = {subset_size} must be in 2 .. {fewest}, the number of '
            'samples of the smaller set'
        )
    random = np.random.RandomState(seed)
    distances = [
        squared_discrepancy(
            *(f[random.choice(len(f), subset_size, replace=False)] for f in features)
        )
        for _ in range(subsets)
    ]
    return float(np.mean(distances)), float(np.std(distances))


def squared_discrepancy(first, second) -> float:
    """The estimate of the head of this file for two sets, [N, F] and [M, F]."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    return float(
        _mean_off_diagonal(first)
        + _mean_off_diagonal(second)
        - 2 * _kernel(first, second).mean()
    )


def _kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** DEGREE


def _mean_off_diagonal(x):
    """Of the kernel of a set with itself."""
    kernel = _kernel(x, x)
    return (kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1))


def _check(features, name):
    features = np.asarray(features)
    if features.ndim != 2 or not features.size:
        raise ValueError(f'{name} has shape {features.shape}; [N, F] is expected')
    if not np.isfinite(features).all():
        raise ValueError(
            f'{name} is not finite; check the images for NaN, or leave those samples '
            'out and report how many'
        )
    return features
