"""What the eigenvalues of a gram matrix say about a set of experts."""

from __future__ import annotations

import numpy as np


def eigenvalue_shares(gram_KK: np.ndarray) -> np.ndarray:
    """[K]: eigenvalues over their sum, largest first; below 0 by rounding counts as 0. All 0 for a zero matrix."""
    values = np.clip(np.linalg.eigvalsh(gram_KK)[::-1], 0.0, None)
    return values / values.sum() if values.sum() > 0 else values


def effective_rank(gram_KK: np.ndarray) -> float:
    """exp(entropy of the normalised eigenvalues): how many directions a set of experts really spans, 1..K; 0 for a zero matrix."""
    shares = eigenvalue_shares(gram_KK)
    present = shares[shares > 0]
    return float(np.exp(-(present * np.log(present)).sum())) if len(present) else 0.0
