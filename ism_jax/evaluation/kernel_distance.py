"""Kernel distance (KID with Inception's features), in float64 on the host.

The squared maximum mean discrepancy of the kernel k(x, y) = (x . y / F + 1)^3, by its
unbiased estimator (Binkowski et al. 2018, arXiv 1801.01401, section 4; Gretton et al.
2012, equation 3):

    1/(m (m-1)) sum_{i != j} k(x_i, x_j) + 1/(m (m-1)) sum_{i != j} k(y_i, y_j)
        - 2/m^2 sum_{i, j} k(x_i, y_j)

Unlike the Frechet distance it is not biased by the number of samples, and it may be
negative if the distributions agree.
"""

import chex
import numpy as np

DEGREE = 3


def kernel_distance(
    first, second, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Mean and standard deviation of the distance over random subsets of the samples.

    The subsets are those that torch-fidelity draws with this seed.

    Args:
      first: [N, F] features, of any floating type.
      second: [M, F] features.
      subsets: number of pairs of subsets.
      subset_size: m, samples of each subset, drawn without replacement; at least 2 and
        at most min(N, M).
      seed: seed of the subsets.
    """
    features = [np.asarray(first), np.asarray(second)]
    chex.assert_equal_shape_suffix(features, 1)
    random = np.random.RandomState(seed)
    distances = [
        squared_discrepancy(
            *(f[random.choice(len(f), subset_size, replace=False)] for f in features)
        )
        for _ in range(subsets)
    ]
    return float(np.mean(distances)), float(np.std(distances))


def squared_discrepancy(first, second) -> float:
    """The unbiased estimate above from two sets of features, [N, F] and [M, F]."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    return float(
        _mean_off_diagonal(first)
        + _mean_off_diagonal(second)
        - 2 * _kernel(first, second).mean()
    )


def _kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** DEGREE


def _mean_off_diagonal(x):
    """Mean of k(x_i, x_j) over i != j."""
    kernel = _kernel(x, x)
    return (kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1))
