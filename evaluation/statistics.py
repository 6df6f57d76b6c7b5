"""Intervals of what was counted, and whether two models differ on the same questions."""

from collections.abc import Sequence
from math import comb

import numpy as np

RESAMPLES = 10_000


def wilson_interval(share: float, samples: int) -> tuple[float, float]:
    """95% interval of a share seen in `samples` independent trials (Wilson 1927); rounding never puts it beside."""
    z = 1.96
    center = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z / (1 + z * z / samples) * (share * (1 - share) / samples + z * z / (4 * samples**2)) ** 0.5
    return max(0.0, min(share, center - half)), min(1.0, max(share, center + half))


def paired_difference(scores: Sequence[float], reference: Sequence[float]) -> dict[str, float | None]:
    """
    How much better a model does than a reference on the same samples.

    Returns:
        `difference`, of the means; `low` and `high`, its 95% interval by bootstrap over samples, the same in every
        call; `p`, two-sided, by McNemar's exact test where every score is 0 or 1, else `None`.
    """
    differences = np.subtract(scores, reference)
    drawn = np.random.default_rng(0).integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.quantile(differences[drawn].mean(1), (0.025, 0.975))
    p = None
    if set(scores) | set(reference) <= {0, 1}:
        p = mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))
    return {"difference": float(differences.mean()), "low": float(low), "high": float(high), "p": p}


def mcnemar(better: int, worse: int) -> float:
    """Two-sided p of so many samples won and so many lost, were both equally likely (McNemar's exact test)."""
    count = better + worse
    tail = sum(comb(count, index) for index in range(min(better, worse) + 1)) / 2**count
    return min(1.0, 2 * tail)
