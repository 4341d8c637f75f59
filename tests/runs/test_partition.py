"""Which rank's file holds which elements: the rule, and the lists of older manifests, say the same."""

import random

import pytest
import torch
from flat_state import SHAPES, parameters_of

from cmscale.engine.flat_space import count_elements, flat_part_size
from cmscale.runs.manifests import FileEntry, RankPart
from cmscale.runs.partition import ListedPartition, Partition, own_range

SHAPES = {"empty": (0, 3), **SHAPES, "last": (0,)}


def rule(num_ranks: int, zero_stage: int) -> Partition:
    parameters = parameters_of(SHAPES)
    part_size = flat_part_size(count_elements(parameters), num_ranks=num_ranks, alignment=2)
    return Partition(parameters, num_ranks, zero_stage, part_size)


def listed(partition: Partition) -> ListedPartition:
    """The same as a manifest of version 2 has it."""
    file = FileEntry(name="file", size=0, sha256="")
    return ListedPartition([RankPart(file=file, segments=segments) for segments in partition])


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 40])
def test_every_element_belongs_to_exactly_one_rank(zero_stage: int, num_ranks: int) -> None:
    partition = rule(num_ranks, zero_stage)
    owners = torch.zeros(count_elements(partition.parameters), dtype=torch.int64)
    for rank, segments in enumerate(partition):
        at = 0
        for segment in segments:
            assert segment.at == at
            at += segment.length
            owners[segment.start : segment.start + segment.length] += 1
        assert partition.length(rank) == listed(partition).length(rank) == at
    assert owners.tolist() == [1] * len(owners)
    assert len(partition) == len(listed(partition)) == num_ranks


@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 40])
def test_any_elements_are_found_where_the_segments_have_them(zero_stage: int, num_ranks: int) -> None:
    partition = rule(num_ranks, zero_stage)
    total = count_elements(partition.parameters)
    place = {
        segment.start + number: (rank, segment.at + number)
        for rank, segments in enumerate(partition)
        for segment in segments
        for number in range(segment.length)
    }
    for start in range(total):
        for length in range(total - start + 1):
            for each in (partition, listed(partition)):
                found = [(rank, at + n) for rank, at, count in each.find(start, length) for n in range(count)]
                assert found == [place[element] for element in range(start, start + length)]


def test_thousands_of_ranks_cost_what_is_asked_for() -> None:
    """The segments of all ranks are never made: here they would be 10^9."""
    parameters = parameters_of({f"p{number}": (1000, 10) for number in range(1000)})
    partition = Partition(parameters, 10**6, 3, 10)
    chance = random.Random(0)
    for start in (chance.randrange(10**7) for _ in range(10)):
        ((rank, at, length),) = partition.find(start, 1)
        (segment,) = [each for each in partition[rank] if each.start == start]
        assert (at, length) == (segment.at, segment.length)
        begin, _ = own_range(parameters[start // 10**4], rank, num_ranks=10**6)
        assert begin == start % 10**4
