"""Membership inference on the canaries of an audit: how well their scores tell members from the rest.

The scores are log-likelihood ratios of "in" and "out" up to a constant factor (Carlini et al. 2022, "LiRA"): the
auditor knows the noise and each canary's gradient, so that neither needs shadow models.
"""

from __future__ import annotations

import numpy as np

from accord_simulations.audit.one_run import Coins, Scores


def auc(scores: Scores, members: Coins) -> float:
    """Probability that a member scores above a non-member, ties counted half; 0.5 without one of the two."""
    from scipy.stats import rankdata  # noqa: PLC0415

    inside = int(members.sum())
    outside = len(members) - inside
    if not inside or not outside:
        return 0.5
    ranks = rankdata(scores)
    return float((ranks[members].sum() - inside * (inside + 1) / 2) / (inside * outside))


def tpr_at_fpr(scores: Scores, members: Coins, fpr: float) -> float:
    """Largest share of members above a threshold that at most `fpr` of the non-members reach."""
    inside, outside = scores[members], np.sort(scores[~members])[::-1]
    if not len(inside) or not len(outside):
        return 0.0
    allowed = int(fpr * len(outside))
    if allowed >= len(outside):
        return 1.0
    return float(np.mean(inside > outside[allowed]))
