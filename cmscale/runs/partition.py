"""Says which rank's file of a checkpoint holds which elements of the flat fp32 space, and where in that file.

`Partition` is the rule by which ranks share the space; `ListedPartition` looks it up in the manifests of versions 1 and
2, which list every piece. Neither keeps what it can compute: the pieces of thousands of ranks would fill gigabytes.
"""

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

from cmscale.runs.manifests import CheckpointManifest, Parameter, RankPart, Segment


class Stretch(NamedTuple):
    """Contiguous elements of the flat space: `length` of them, from position `at` of a rank's tensors on."""

    rank: int
    at: int
    length: int


def own_range(parameter: Parameter, rank: int, *, num_ranks: int) -> tuple[int, int]:
    """The elements of a parameter that a rank holds in stage 3: [begin, end) within the parameter."""
    numel = prod(parameter.shape)
    share = -(-numel // num_ranks)
    return min(rank * share, numel), min((rank + 1) * share, numel)


class AnyPartition(Sequence[tuple[Segment, ...]]):
    """Each rank's segments, by rank."""

    def length(self, rank: int) -> int:
        """The number of elements that a rank holds."""
        return sum(segment.length for segment in self[rank])

    @abstractmethod
    def find(self, start: int, length: int) -> Iterator[Stretch]:
        """Where flat[start : start + length] is, in its order."""


@dataclass(frozen=True)
class Partition(AnyPartition):
    """The rule: stages 0 to 2 split the padded space into one run per rank, stage 3 each parameter into one per rank.

    Attributes:
        part_size: Elements of a rank in stages 0 to 2, with padding.
    """

    parameters: tuple[Parameter, ...]
    num_ranks: int
    zero_stage: int
    part_size: int

    def __len__(self) -> int:
        return self.num_ranks

    def __getitem__(self, rank: Any) -> Any:
        if isinstance(rank, slice):
            return tuple(self[each] for each in range(*rank.indices(self.num_ranks)))
        if not -self.num_ranks <= rank < self.num_ranks:
            raise IndexError(rank)
        segments, at = [], 0
        for begin, end in self._runs(rank % self.num_ranks):
            if end > begin:
                segments.append(Segment(start=begin, length=end - begin, at=at))
                at += end - begin
        return tuple(segments)

    def length(self, rank: int) -> int:
        return sum(max(0, end - begin) for begin, end in self._runs(rank))

    def find(self, start: int, length: int) -> Iterator[Stretch]:
        at, stop = start, start + length
        while at < stop:
            if self.zero_stage < 3:
                rank, place = divmod(at, self.part_size)
                end = (rank + 1) * self.part_size
            else:
                number = bisect_right(self._offsets, at) - 1
                offset, share = self._offsets[number], -(-self._sizes[number] // self.num_ranks)
                rank = (at - offset) // share
                begin = offset + rank * share
                place = self._places(rank)[number] + at - begin
                end = min(begin + share, offset + self._sizes[number])
            end = min(end, stop)
            yield Stretch(rank, place, end - at)
            at = end

    def _runs(self, rank: int) -> Iterator[tuple[int, int]]:
        """[begin, end) of each run of a rank; some are empty."""
        if self.zero_stage < 3:
            total = sum(self._sizes)
            yield rank * self.part_size, min((rank + 1) * self.part_size, total)
            return
        for offset, size in zip(self._offsets, self._sizes, strict=True):
            share = -(-size // self.num_ranks)
            yield offset + min(rank * share, size), offset + min((rank + 1) * share, size)

    @cached_property
    def _sizes(self) -> list[int]:
        return [prod(parameter.shape) for parameter in self.parameters]

    @cached_property
    def _offsets(self) -> list[int]:
        return [parameter.offset for parameter in self.parameters]

    @cached_property
    def _known_places(self) -> dict[int, list[int]]:
        return {}

    def _places(self, rank: int) -> list[int]:
        """Where a rank's share of each parameter begins in its tensors, in stage 3."""
        if rank not in self._known_places:
            lengths = (end - begin for begin, end in self._runs(rank))
            self._known_places[rank] = list(accumulate(lengths, initial=0))
        return self._known_places[rank]


class ListedPartition(AnyPartition):
    """What a manifest of version 1 or 2 lists."""

    def __init__(self, parts: Sequence[RankPart]) -> None:
        self._segments = [part.segments or () for part in parts]

    def __len__(self) -> int:
        return len(self._segments)

    def __getitem__(self, rank: Any) -> Any:
        return self._segments[rank]

    def find(self, start: int, length: int) -> Iterator[Stretch]:
        at, stop = start, start + length
        index = bisect_right(self._listed, (at, float("inf"))) - 1
        while at < stop:
            begin, size, place, rank = self._listed[index]
            end = min(begin + size, stop)
            yield Stretch(rank, place + at - begin, end - at)
            at, index = end, index + 1

    @cached_property
    def _listed(self) -> list[tuple[int, int, int, int]]:
        return sorted(
            (segment.start, segment.length, segment.at, rank)
            for rank, segments in enumerate(self._segments)
            for segment in segments
        )


def partition_of(manifest: CheckpointManifest) -> AnyPartition:
    """Which elements each of a checkpoint's files holds."""
    if manifest.part_size is None:
        return ListedPartition(manifest.parts)
    return Partition(manifest.parameters, manifest.num_ranks, manifest.zero_stage, manifest.part_size)
