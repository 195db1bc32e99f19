"""Grouping methods, one file each, found by name (`group: {method: NAME}`). numpy and scipy only."""

import numpy as np

from megatron_moe2dense.common.registry import Registry
from megatron_moe2dense.surgery.types import Grouper, Grouping

groupers: Registry[Grouper] = Registry("group", __name__)


def cosine(gram_EE: np.ndarray, experts_K: np.ndarray) -> np.ndarray:
    """cosine_KK of the kept experts from a matrix of inner products; 0 towards an expert whose own product is 0."""
    gram_KK = gram_EE[np.ix_(experts_K, experts_K)]
    norm_K = np.sqrt(np.diag(gram_KK))
    product_KK = np.outer(norm_K, norm_K)
    return np.divide(gram_KK, product_KK, out=np.zeros_like(gram_KK), where=product_KK > 0)


def average_linkage(cosine_KK: np.ndarray, groups: int) -> Grouping:
    """Agglomerative clustering by average linkage on 1 - cosine, cut where exactly `groups` clusters are left."""
    # Loaded when used: `moe2dense --help` lists the methods without it.
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import squareform

    # Symmetric and never negative to the last bit, as scipy requires: a cosine can round to a little over 1.
    distance_KK = np.maximum(1.0 - (cosine_KK + cosine_KK.T) / 2, 0.0)
    tree = linkage(squareform(distance_KK, checks=False), method="average")
    return Grouping(cut_tree(tree, n_clusters=groups)[:, 0], groups)
