"""Defines the order of the samples, a pure function of the data set's shard sizes, a seed and the epoch.

The data set is divided into C contiguous parts, one per canonical node (their sizes differ by at most one, larger ones
first), so that a node of the cluster needs only some of the shards. Within a part, the pieces of shards are permuted
and their samples are shuffled in blocks, so that few shards are in use at a time. Position p of an epoch belongs to
canonical node p mod C, so every batch draws evenly from all parts.

The training sequence is the concatenation of the epochs. A global batch is the next `global_batch_size` samples of it,
and may contain samples of two epochs. The samples of a batch are sorted by canonical node (stably) and divided into
equal pieces, one per rank. If C and the global batch size are multiples of the number of nodes, and the batch size is a
multiple of C, each node reads only its own parts, except in batches that contain two epochs.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from cmscale import rng


@dataclass(frozen=True)
class Order:
    """The endless sequence of sample ids.

    Args:
        shard_sizes: Samples in each shard; ids count through the shards in this order.
        num_canonical_nodes: C, fixed for a run and independent of its number of nodes.
        seed: The run's seed.
        shuffle_block: Number of samples that are shuffled among each other, at least 1.
    """

    shard_sizes: tuple[int, ...]
    num_canonical_nodes: int
    seed: int
    shuffle_block: int

    @property
    def num_samples(self) -> int:
        """The number of samples of an epoch."""
        return sum(self.shard_sizes)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, epochs and canonical nodes, each [n] int64, of the samples at positions of the endless sequence."""
        epochs, within = np.divmod(positions, self.num_samples)
        ids = np.empty_like(within)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            ids[chosen] = epoch_order(self, int(epoch))[within[chosen]]
        return ids, epochs, within % self.num_canonical_nodes

    def rank_positions(self, cursor: int, *, global_batch_size: int, rank: int, num_ranks: int) -> np.ndarray:
        """Positions of a rank's share of the global batch that starts at `cursor`, [b] int64.

        b = global_batch_size / num_ranks.
        """
        positions = np.arange(cursor, cursor + global_batch_size, dtype=np.int64)
        nodes = (positions % self.num_samples) % self.num_canonical_nodes
        by_node = positions[np.argsort(nodes, kind="stable")]
        share = global_batch_size // num_ranks
        return by_node[rank * share : (rank + 1) * share]


@lru_cache(maxsize=2)  # a batch may contain samples of two epochs
def epoch_order(order: Order, epoch: int) -> np.ndarray:
    """Sample ids of one epoch, [N] int64, each exactly once."""
    count, nodes = order.num_samples, order.num_canonical_nodes
    sequence = np.empty(count, dtype=np.int64)
    for node, (start, end) in enumerate(parts(count, nodes)):
        sequence[node::nodes] = _part_order(order, epoch, node, start, end)
    return sequence


def parts(count: int, nodes: int) -> list[tuple[int, int]]:
    """[start, end) of each canonical node's samples; the first `count mod nodes` parts have one sample more."""
    small, larger = divmod(count, nodes)
    starts = [node * small + min(node, larger) for node in range(nodes + 1)]
    return list(pairwise(starts))


def _part_order(order: Order, epoch: int, node: int, start: int, end: int) -> np.ndarray:
    bounds = np.concatenate([[0], np.cumsum(order.shard_sizes)])
    inner = bounds[(bounds > start) & (bounds < end)]
    edges = np.concatenate([[start], inner, [end]]).astype(np.int64)
    pieces = [np.arange(a, b, dtype=np.int64) for a, b in pairwise(edges)]
    draws = np.random.Philox(key=rng.key(order.seed, epoch, node, "order"))
    ids = np.concatenate([pieces[piece] for piece in _permutation(draws, len(pieces))])
    for block in range(0, len(ids), order.shuffle_block):
        window = ids[block : block + order.shuffle_block]
        window[:] = window[_permutation(draws, len(window))]
    return ids


def _permutation(draws: np.random.Philox, count: int) -> np.ndarray:
    # Sorted raw draws: numpy guarantees a bit generator's stream across versions, but not that of `permutation`.
    return np.argsort(draws.random_raw(count), kind="stable")


def flips(order: Order, keys: tuple[str, ...], epochs: np.ndarray) -> list[bool]:
    """Whether each sample is mirrored: a fair coin, a function of seed, epoch and the sample's key."""
    return [bool(rng.key(order.seed, int(e), key, "flip") & 1) for key, e in zip(keys, epochs, strict=True)]
