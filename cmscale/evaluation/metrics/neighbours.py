"""Owns the metrics of nearest neighbours: precision, recall (k-NN), density, coverage; blockwise, never N x N
in memory.

Distances come from float32 matrix products of centred features, a block of rows at a time; whatever such a
product can't decide (a distance within rounding of a radius: duplicates, above all) is computed again
directly in float64. So results are those of exact distances, at the rate of a matrix product. Features stay
float32: rounded to float16 they would have other nearest neighbours.

The blocks follow from the numbers of features alone and are dealt to the ranks. What ranks find is put
together by integer counts and flags, so that every number of ranks gives the same bits.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cmscale.distributed import collectives
from cmscale.distributed.world import World

K = 3  # precision and recall: Kynkäänniemi et al. 2019, as ADM's evaluator and torch-fidelity
DENSITY_K = 5  # density and coverage: Naeem et al. 2020, as its released code

_SLACK = 4  # neighbours beyond the k-th whose distances are computed exactly
_ROUNDING = 128 * torch.finfo(torch.float32).eps  # generous: it decides only what is computed twice
_BLOCK_ELEMENTS = 1 << 24  # of a block of distances: 64 MiB, which glibc gives back; it keeps and splinters up to 32
_ROWS = 256  # features taken to float64 at a time
_PAIR_ELEMENTS = 1 << 18  # of the pairs computed exactly at a time: what a cache holds

T = TypeVar("T")


@dataclass(frozen=True)
class Neighbourhood:
    """What `compare` finds; each in [0, 1] but density, which may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


class Manifold:
    """A set of features [N, D] and, once asked for, the distances to each one's k nearest others.

    Args:
        features: all of them, on every rank.
        world: the ranks that share the work.
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
        """Squared distance of each feature to its K-th and its DENSITY_K-th nearest other, float64 [N] each.
        Collective.
        """
        centre = _centre(self.features)
        points, norms = _centred(self.features, centre)
        wanted = min(DENSITY_K + 1 + _SLACK, len(points))
        mine = _shared_out(_row_blocks(len(points), len(points)), self.world)
        found = [torch.empty(0, 2, dtype=torch.float64, device=points.device)]
        for rows in mine:
            near = _squared_distances(points[rows], norms[rows], points, norms).topk(wanted, largest=False).indices
            own = torch.arange(rows.start, rows.stop, device=near.device)[:, None].expand_as(near)
            exact = _exact(self.features, own.flatten(), self.features, near.flatten()).view_as(near)
            found.append(exact.sort(dim=1).values[:, [K, DENSITY_K]])  # the nearest of all is the feature itself
        both = np.empty((len(points), 2))
        for blocks, theirs in _of_all_ranks((mine, torch.cat(found).cpu().numpy()), self.world):
            both[[row for rows in blocks for row in range(rows.start, rows.stop)]] = theirs
        radii = torch.from_numpy(both).to(self.features.device)
        return radii[:, 0], radii[:, 1]


def compare(samples: Manifold, reference: Manifold) -> Neighbourhood:
    """Precision, recall, density and coverage of samples [N, D] against a reference [M, D], on the samples'
    ranks. Collective.

    Precision: samples within the K-th neighbour's distance of a reference feature; recall: the reverse (`<=`,
    as ADM's evaluator and torch-fidelity). Density: reference balls of radius DENSITY_K that hold a sample,
    over DENSITY_K;
    coverage: reference balls that hold any sample (`<`, as the released code of Naeem et al.).
    """
    parts = _of_all_ranks(_count(samples, reference), samples.world)
    return Neighbourhood(
        precision=sum(part.precise for part in parts) / len(samples),
        recall=float(np.any([part.recalled for part in parts], axis=0).mean()),
        density=sum(part.dense for part in parts) / (DENSITY_K * len(samples)),
        coverage=float(np.any([part.covered for part in parts], axis=0).mean()),
    )


@dataclass(frozen=True)
class _Counts:
    """What one rank's samples give: samples near the reference, balls that hold one, and which features of the
    reference [M] are recalled and covered."""

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
    for rows in _shared_out(_row_blocks(len(samples), len(y)), samples.world):
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
    """Rounded squared distances [B, M] between `rows` [B, D] and `columns` [M, D], whose norms sum to `scale`
    at most."""

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
    """The mean, float64 [D], without a float64 copy of all features."""
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for part in features.split(_ROWS):
        total += part.double().sum(dim=0)
    return total / len(features)


def _centred(features: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 features around `centre`, and their squared norms: what a float32 product loses least of."""
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


def _exact(x: Tensor, i: Tensor, y: Tensor, j: Tensor) -> Tensor:
    """Squared distances of the pairs (x[i], y[j]) from their differences in float64; equal features give
    exactly 0."""
    step = max(1, _PAIR_ELEMENTS // x.shape[1])
    parts = [
        (x[i[at : at + step]].double() - y[j[at : at + step]].double()).square().sum(dim=1)
        for at in range(0, len(i), step)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64, device=x.device)


def _row_blocks(rows: int, columns: int) -> list[slice]:
    size = max(1, _BLOCK_ELEMENTS // columns)
    return [slice(at, min(at + size, rows)) for at in range(0, rows, size)]


def _shared_out(blocks: list[slice], world: World) -> list[slice]:
    """This rank's blocks."""
    return blocks[world.rank :: world.num_ranks]


def _of_all_ranks(mine: T, world: World) -> list[T]:
    """What each rank of this world found. Collective where there are several."""
    found = collectives.gather(mine) if world.num_ranks > 1 else [mine]
    assert len(found) == world.num_ranks, f"{world.num_ranks} ranks that are not connected"
    return found
