"""Grouping methods (docs/method.md#groups-merging-scaling), found by name (`group: {method: NAME}`): kept experts in, groups to merge out.
numpy and scipy only."""

from __future__ import annotations

import numpy as np

from megatron_moe2dense.common.registry import Registry
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import FlatWeights, Grouper, Grouping, Selection

_TILE_BYTES = 512 * 1024**2  # of weights held at once, twice: 2 x 27 experts of Qwen3-30B-A3B
_COLUMNS = 65536  # products of weights are summed in float32 over this many, in float64 beyond
_ROUNDS = 100  # of k-means

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


@groupers.register("round_robin")
class RoundRobin(Grouper):
    """The expert of rank r (best first) joins group r mod G, odd rounds in reverse (snake): groups hold like shares of the score (ours).

    A balanced control that looks at the ranks alone."""

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads: none."""
        return ()

    def group(self, selection: Selection, weights: FlatWeights, stats: LayerStats, groups: int) -> Grouping:  # noqa: ARG002
        """`groups` groups whose sizes differ by one at most."""
        round_K, place_K = np.divmod(np.arange(len(selection.experts_K)), groups)
        return Grouping(np.where(round_K % 2 == 0, place_K, groups - 1 - place_K), groups)


@groupers.register("anchor")
class Anchor(Grouper):
    """The G best experts are anchors; each other expert joins the anchor whose outputs (`gram`) have the highest cosine
    with its own (ours). Ties go to the better anchor."""

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads."""
        return ("gram",)

    def group(self, selection: Selection, weights: FlatWeights, stats: LayerStats, groups: int) -> Grouping:  # noqa: ARG002
        """`groups` groups, each with one anchor."""
        cosine_KK = cosine(stats["gram"], selection.experts_K)
        return Grouping(np.concatenate([np.arange(groups), cosine_KK[groups:, :groups].argmax(axis=1)]), groups)


@groupers.register("output_cluster")
class OutputCluster(Grouper):
    """Average linkage on 1 - cosine of the experts' outputs on the calibration tokens (`gram`) (ours; HC-SMoE in spirit)."""

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads."""
        return ("gram",)

    def group(self, selection: Selection, weights: FlatWeights, stats: LayerStats, groups: int) -> Grouping:  # noqa: ARG002
        """`groups` clusters."""
        return average_linkage(cosine(stats["gram"], selection.experts_K), groups)


@groupers.register("router_cluster")
class RouterCluster(Grouper):
    """Average linkage on 1 - cosine of the experts' router probabilities over the calibration tokens (`prob_gram`): clusters
    of experts that the router likes on the same tokens (ours; M-SMoE in spirit)."""

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads."""
        return ("prob_gram",)

    def group(self, selection: Selection, weights: FlatWeights, stats: LayerStats, groups: int) -> Grouping:  # noqa: ARG002
        """`groups` clusters."""
        return average_linkage(cosine(stats["prob_gram"], selection.experts_K), groups)


@groupers.register("weight_cluster")
class WeightCluster(Grouper):
    """k-means on the flattened [gate; up; down] of each kept expert, L2-normalised, seeded with the G best experts: name
    (paper), rule (ours).

    A cluster that loses its last member takes the point farthest from its own centre.
    """

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads: none."""
        return ()

    def group(self, selection: Selection, weights: FlatWeights, stats: LayerStats, groups: int) -> Grouping:  # noqa: ARG002
        """`groups` clusters."""
        return Grouping(kernel_kmeans(weight_cosine(selection.experts_K.tolist(), weights), groups), groups)


def weight_cosine(experts: list[int], weights: FlatWeights) -> np.ndarray:
    """[K, K] inner products of the normalised weights, float64. Two tiles of at most 512 MB (or one expert each) are in memory."""
    first = weights(experts[0])
    tile = min(len(experts), max(1, _TILE_BYTES // first.nbytes))
    starts = range(0, len(experts), tile)
    left, right = (np.empty((tile, len(first)), first.dtype) for _ in range(2))
    gram_KK = np.zeros((len(experts), len(experts)))
    for i in starts:
        one = _fill(left, experts[i : i + tile], weights)
        for j in starts[starts.index(i) :]:
            other = one if j == i else _fill(right, experts[j : j + tile], weights)
            block = _products(one, other)
            gram_KK[i : i + tile, j : j + tile], gram_KK[j : j + tile, i : i + tile] = block, block.T
    return cosine(gram_KK, np.arange(len(experts)))


def _fill(tile: np.ndarray, experts: list[int], weights: FlatWeights) -> np.ndarray:
    for row, expert in enumerate(experts):
        tile[row] = weights(expert)
    return tile[: len(experts)]


def _products(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    total = np.zeros((len(one), len(other)))
    for start in range(0, one.shape[1], _COLUMNS):
        total += one[:, start : start + _COLUMNS] @ other[:, start : start + _COLUMNS].T
    return total


def kernel_kmeans(gram_KK: np.ndarray, groups: int) -> np.ndarray:
    """group_of_K of k-means on K points known by their inner products; the same as k-means on the points themselves.

    ||x_i - mean of g||^2 = x_i.x_i - 2 mean_j x_i.x_j + mean_jk x_j.x_k. The first `groups` points are the first centres; ties
    go to the lower group; stops when nothing changes, or after 100 rounds.
    """
    distance_KG = _distances(gram_KK, np.eye(len(gram_KK))[:groups])
    group_of_K = np.full(len(gram_KK), -1)
    for _ in range(_ROUNDS):
        nearest_K = _fill_empty(distance_KG.argmin(axis=1), distance_KG)
        if (nearest_K == group_of_K).all():
            break
        group_of_K = nearest_K
        member_GK = (group_of_K == np.arange(groups)[:, None]).astype(float)
        distance_KG = _distances(gram_KK, member_GK / member_GK.sum(axis=1, keepdims=True))
    return group_of_K


def _distances(gram_KK: np.ndarray, weight_GK: np.ndarray) -> np.ndarray:
    """[K, G]: squared distances to centres that are weighted means of the points."""
    toward_KG = gram_KK @ weight_GK.T
    return np.diag(gram_KK)[:, None] - 2 * toward_KG + np.einsum("gk,kg->g", weight_GK, toward_KG)


def _fill_empty(group_of_K: np.ndarray, distance_KG: np.ndarray) -> np.ndarray:
    filled_K = group_of_K.copy()
    own_K = distance_KG[np.arange(len(filled_K)), filled_K]
    for group in range(distance_KG.shape[1]):
        if not (filled_K == group).any():
            alone_K = np.bincount(filled_K, minlength=distance_KG.shape[1])[filled_K] == 1
            farthest = int(np.where(alone_K, -np.inf, own_K).argmax())
            filled_K[farthest], own_K[farthest] = group, 0.0
    return filled_K
