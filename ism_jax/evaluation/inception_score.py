"""Inception score, in float64 on the host.

    IS = exp(E_x KL(p(y | x) || p(y))),   p(y) = E_x p(y | x)

(Salimans et al. 2016, arXiv 1606.03498, section 4), the mean over splits of samples.
p(y | x) are the probabilities of Inception from its logits without their bias, as in
the original and in torch-fidelity.
"""

import numpy as np


def inception_score(
    logits, *, splits: int = 10, seed: int | None = 2020
) -> tuple[float, float]:
    """Mean and standard deviation of the score over splits of the samples.

    It grows with the samples of a split, up to about 5,000: compare only numbers from
    equally many.

    Args:
      logits: [N, K], of any floating type; see `models.inception`.
      splits: S, parts of N / S consecutive samples (rounded down to whole ones).
      seed: shuffles the samples first as torch-fidelity does, so that samples sorted
        by class do not end in one split. None for their own order, as in ADM.

    Returns:
      The mean, between 1 and K, and the standard deviation, of the S scores.

    Raises:
      ValueError: another shape, values that are not finite, or fewer samples than
        splits.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or not logits.size:
        raise ValueError(
            f'logits have shape {logits.shape}; [N, K] with N and K of at least 1 is '
            'expected'
        )
    count = len(logits)
    if not 1 <= splits <= count:
        raise ValueError(
            f'splits = {splits} must be in 1 .. {count}, the number of samples'
        )
    order = np.arange(count)
    if seed is not None:
        order = np.random.RandomState(seed).permutation(count)
    scores = []
    for split in range(splits):
        chosen = order[split * count // splits : (split + 1) * count // splits]
        scores.append(_score(logits[chosen].astype(np.float64)))
    return float(np.mean(scores)), float(np.std(scores))


def _score(logits):
    if not np.isfinite(logits).all():
        raise ValueError(
            'logits are not finite; check the samples for NaN, or leave those samples '
            'out and report how many'
        )
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    # Where p(y) is 0 all p(y | x) are, and 0 log 0 is 0.
    marginal = np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny)
    return np.exp((p * (log_p - np.log(marginal)[None])).sum(axis=1).mean())
