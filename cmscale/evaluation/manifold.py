"""Compares the nearest neighbours of two sets of features, in blocks, without an N x N matrix in memory.

Distances come from float32 matrix products of centred features, a block of rows at a time. What such a product cannot
decide (a distance within rounding of a radius, which neighbours are the nearest among near duplicates) is repeated in
float64. So the results are those of exact distances, at the speed of a matrix product. Features stay float32: rounded
to float16 they would have other nearest neighbours.

The blocks depend on the numbers of features only and are distributed over the ranks. The ranks' results are integer
counts and flags, so every number of ranks gives the same bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cmscale.distributed import collectives
from cmscale.distributed.world import World
from cmscale.evaluation.metrics.neighbours import DENSITY_K, K
from cmscale.io.counting import counted

_SLACK = 4  # neighbours beyond the k-th whose distances are computed exactly
_ROUNDING = 128 * torch.finfo(torch.float32).eps  # generous: it only selects what is computed twice
_BLOCK_ELEMENTS = 1 << 24  # 64 MiB per block of distances; glibc returns it, but keeps and fragments up to 32 MiB
_ROWS = 256  # features converted to float64 at a time
_PAIR_ELEMENTS = 1 << 18  # elements of the exact pairs computed at a time; they fit a processor's cache

T = TypeVar("T")


@dataclass(frozen=True)
class Neighbourhood:
    """The metrics of nearest neighbours. All are in [0, 1] except density, which may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


class Manifold:
    """A set of features and the distances from each to its k nearest neighbours, which are computed on first access.

    Args:
        features: Float32 [N, D], the same on every rank.
        world: The ranks that share the work.

    Raises:
        ValueError: DENSITY_K features or fewer.
    """

    def __init__(self, features: np.ndarray, *, device: torch.device | str = "cpu", world: World | None = None) -> None:
        self.world = world or World()
        self.features = torch.from_numpy(np.ascontiguousarray(features)).to(device)
        if len(self.features) <= DENSITY_K:
            raise ValueError(f"{len(self.features)} features; nearest neighbours need at least {DENSITY_K + 1}")

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def radii(self) -> tuple[Tensor, Tensor]:
        """Squared distances from each feature to its K-th and DENSITY_K-th neighbour, float64 [N] each. Collective."""
        centre = _centre(self.features)
        points, norms = _centred(self.features, centre)
        mine = _of_rank(_row_blocks(len(points), len(points)), self.world)
        found = [torch.empty(0, 2, dtype=torch.float64, device=points.device)]
        for rows in _counted(mine, self.world):
            near = _nearest(_squared_distances(points[rows], norms[rows], points, norms))
            own = torch.arange(rows.start, rows.stop, device=points.device)
            exact = self._sorted(own, near.indices)
            unsure = _is_unsure(near.values[:, -1], exact[:, DENSITY_K], norms[rows])
            if bool(unsure.any()) and near.values.shape[1] < len(points):
                again = own[unsure]
                exact[unsure] = self._sorted(again, _nearest(_distances64(self.features, again, centre)).indices)
            found.append(exact[:, [K, DENSITY_K]])  # the nearest of all is the feature itself
        both = np.empty((len(points), 2))
        for blocks, theirs in _gathered((mine, torch.cat(found).cpu().numpy()), self.world):
            both[[row for rows in blocks for row in range(rows.start, rows.stop)]] = theirs
        radii = torch.from_numpy(both).to(self.features.device)
        return radii[:, 0], radii[:, 1]

    def _sorted(self, rows: Tensor, near: Tensor) -> Tensor:
        """Exact squared distances from the features `rows` [B] to the features `near` [B, n], ascending, float64."""
        pairs = _exact(self.features, rows[:, None].expand_as(near).flatten(), self.features, near.flatten())
        return pairs.view_as(near).sort(dim=1).values


def compare(samples: Manifold, reference: Manifold) -> Neighbourhood:
    """Precision, recall, density and coverage of samples [N, D] against a reference [M, D]. Collective.

    The ball of a feature reaches to its k-th neighbour in its own set. With k = K and closed balls (`<=`, as in ADM's
    evaluator and torch-fidelity), precision is the share of samples in a ball of the reference, and recall the share
    of reference features in a ball of the samples. With k = DENSITY_K and open balls (`<`, as in the code released with
    Naeem et al.), density is the mean number of reference balls that hold a sample, over DENSITY_K, and coverage the
    share of reference balls that hold a sample.
    """
    parts = _gathered(_count(samples, reference), samples.world)
    return Neighbourhood(
        precision=sum(part.precise for part in parts) / len(samples),
        recall=float(np.any([part.recalled for part in parts], axis=0).mean()),
        density=sum(part.dense for part in parts) / (DENSITY_K * len(samples)),
        coverage=float(np.any([part.covered for part in parts], axis=0).mean()),
    )


@dataclass(frozen=True)
class NeighbourSets:
    """The samples and the reference of one measurement, for `metrics.registry.NeighbourMetric`."""

    samples: Manifold
    reference: Manifold

    @cached_property
    def comparison(self) -> Neighbourhood:
        """`compare`, computed once for all metrics. Collective on first access."""
        return compare(self.samples, self.reference)


@dataclass(frozen=True)
class _Counts:
    """The counts of one rank's samples.

    Attributes:
        precise: Samples in a ball of the reference.
        dense: Pairs of a sample and a reference ball that holds it.
        recalled, covered: Whether each reference feature counts for recall and for coverage, bool [M].
    """

    precise: int
    dense: int
    recalled: np.ndarray
    covered: np.ndarray


def _count(samples: Manifold, reference: Manifold) -> _Counts:
    reference_k, reference_density_k = reference.radii
    samples_k, _ = samples.radii
    centre = _centre(reference.features)
    y, y_norms = _centred(reference.features, centre)
    precise = dense = 0
    recalled = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    covered = torch.zeros_like(recalled)
    for rows in _counted(_of_rank(_row_blocks(len(samples), len(y)), samples.world), samples.world):
        x, x_norms = _centred(samples.features[rows], centre)
        distances = _squared_distances(x, x_norms, y, y_norms)
        block = _Block(distances, samples.features[rows], reference.features, float(x_norms.max() + y_norms.max()))
        precise += int(block.within(reference_k[None], inclusive=True).any(dim=1).sum())
        recalled |= block.within(samples_k[rows, None], inclusive=True).any(dim=0)
        inside = block.within(reference_density_k[None], inclusive=False)
        dense += int(inside.sum())
        covered |= inside.any(dim=0)
    return _Counts(precise, dense, recalled.cpu().numpy(), covered.cpu().numpy())


@dataclass(frozen=True)
class _Block:
    """Rounded squared distances [B, M] between `rows` [B, D] and `columns` [M, D].

    `scale` is the largest sum of two squared norms, to which the rounding error is proportional.
    """

    distances: Tensor
    rows: Tensor
    columns: Tensor
    scale: float

    def within(self, radii: Tensor, *, inclusive: bool) -> Tensor:
        """Whether each exact squared distance is within the squared radius (broadcast), bool [B, M]."""
        margin = self.distances - radii.float()
        inside = margin < 0
        undecided = (margin.abs_() <= _ROUNDING * self.scale).nonzero()
        if len(undecided):
            i, j = undecided.unbind(dim=1)
            exact = _exact(self.rows, i, self.columns, j)
            limit = radii.expand(len(self.rows), len(self.columns))[i, j]
            inside[i, j] = exact <= limit if inclusive else exact < limit
        return inside


def _centre(features: Tensor) -> Tensor:
    """The mean, float64 [D], computed without a float64 copy of all features."""
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for part in features.split(_ROWS):
        total += part.double().sum(dim=0)
    return total / len(features)


def _centred(features: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Features minus `centre`, and their squared norms, in float32: centred, a float32 product loses least."""
    points = torch.empty_like(features)
    norms = torch.empty(len(features), device=features.device)
    for part, centred, norm in zip(features.split(_ROWS), points.split(_ROWS), norms.split(_ROWS), strict=True):
        centred.copy_(part.double() - centre)
        norm.copy_(centred.double().square().sum(dim=1))
    return points, norms


def _squared_distances(x: Tensor, x_norms: Tensor, y: Tensor, y_norms: Tensor) -> Tensor:
    was = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # ten bits of mantissa would leave too much undecided
    try:
        distances = torch.addmm(y_norms[None].expand(len(x), -1), x, y.T, alpha=-2)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = was
    return distances.add_(x_norms[:, None])


def _nearest(distances: Tensor) -> "torch.return_types.topk":
    """Of each row of distances the smallest, more of them than are needed, and their columns."""
    return distances.topk(min(DENSITY_K + 1 + _SLACK, distances.shape[1]), largest=False)


def _is_unsure(last: Tensor, radius: Tensor, norms: Tensor) -> Tensor:
    """Whether a feature that is not among the nearest by rounded distances may be nearer than the exact radius, [B].

    Args:
        last: The largest rounded distance of those nearest.
        norms: Squared norms of the rows; a feature within the radius has a norm of at most theirs and the radius.
    """
    scale = norms + (norms.double().sqrt() + radius.sqrt()).square()
    return (radius > 0) & (last - _ROUNDING * scale < radius)


def _distances64(features: Tensor, rows: Tensor, centre: Tensor) -> Tensor:
    """Squared distances of the features `rows` [B] from all [N], by products in float64: [B, N]."""
    x = features[rows].double() - centre
    parts = []
    for part in features.split(_ROWS):
        y = part.double() - centre
        parts.append(torch.addmm(y.square().sum(dim=1)[None].expand(len(x), -1), x, y.T, alpha=-2))
    return torch.cat(parts, dim=1).add_(x.square().sum(dim=1)[:, None])


def _exact(x: Tensor, i: Tensor, y: Tensor, j: Tensor) -> Tensor:
    """Squared distances of the pairs (x[i], y[j]) in float64, from differences: equal features give exactly 0."""
    step = max(1, _PAIR_ELEMENTS // x.shape[1])
    parts = [
        (x[i[at : at + step]].double() - y[j[at : at + step]].double()).square().sum(dim=1)
        for at in range(0, len(i), step)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64, device=x.device)


def _row_blocks(rows: int, columns: int) -> list[slice]:
    size = max(1, _BLOCK_ELEMENTS // columns)
    return [slice(at, min(at + size, rows)) for at in range(0, rows, size)]


def _of_rank(blocks: list[slice], world: World) -> list[slice]:
    """This rank's blocks."""
    return blocks[world.rank :: world.num_ranks]


def _counted(mine: list[slice], world: World) -> Iterator[slice]:
    """This rank's blocks, of which the first rank shows how many are done: on a CPU they take minutes."""
    return counted(mine, "nearest neighbours", total=len(mine), unit="blocks", active=world.is_main)


def _gathered(mine: T, world: World) -> list[T]:
    """Every rank's result, by rank. Collective if the world has several ranks."""
    found = collectives.gather(mine) if world.num_ranks > 1 else [mine]
    assert len(found) == world.num_ranks, f"{world.num_ranks} ranks that are not connected"
    return found
