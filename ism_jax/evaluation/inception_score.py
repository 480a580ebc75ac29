"""Inception score, in float64 on the host.

    IS = exp(E_x KL(p(y | x) || p(y))),   p(y) = E_x p(y | x)

(Salimans et al. 2016, arXiv 1606.03498, section 4), averaged over splits of the
samples. p(y | x) are Inception's probabilities from its logits without their bias, as
in the original and in torch-fidelity.
"""

import chex
import numpy as np


def inception_score(
    logits, *, splits: int = 10, seed: int | None = 2020
) -> tuple[float, float]:
    """Mean and standard deviation of the score over splits of the samples.

    The score grows with the samples per split, up to about 5,000: compare only values
    from the same number of samples.

    Args:
      logits: [N, K], of any floating type; see `models.inception`.
      splits: S <= N; each split is about N / S consecutive samples.
      seed: shuffles the samples first, as torch-fidelity does, so that samples sorted
        by class are spread over the splits. None keeps their order, as ADM does.

    Returns:
      The mean, between 1 and K, and the standard deviation of the S scores.
    """
    logits = np.asarray(logits)
    chex.assert_rank(logits, 2)
    count = len(logits)
    order = np.arange(count)
    if seed is not None:
        order = np.random.RandomState(seed).permutation(count)
    scores = []
    for split in range(splits):
        chosen = order[split * count // splits : (split + 1) * count // splits]
        scores.append(_score(logits[chosen].astype(np.float64)))
    return float(np.mean(scores)), float(np.std(scores))


def _score(logits):
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    # If p(y) is 0, so are all p(y | x), and 0 log 0 is 0.
    marginal = np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny)
    return np.exp((p * (log_p - np.log(marginal)[None])).sum(axis=1).mean())
