"""Rank agreement between predicted and measured utilities."""

from __future__ import annotations

import numpy as np
from scipy.stats import kendalltau


def kendall_tau(prediction: np.ndarray, target: np.ndarray) -> float:
    """Kendall's tau-b in [-1, 1]; 0 where one side is constant, -1 if a prediction is not finite.

    Args:
        prediction, target: float [n]; tied pairs count as neither agreement nor disagreement.
    Source: Kendall (1945); the criterion of arXiv:2402.05406, appendix A.1.
    """
    if not np.isfinite(prediction).all():
        return -1.0
    if np.ptp(prediction) == 0 or np.ptp(target) == 0:
        return 0.0
    return float(kendalltau(prediction, target).statistic)
