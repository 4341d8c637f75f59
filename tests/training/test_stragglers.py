"""Tests of finding a slow rank."""

from pathlib import Path

import pytest

from cmscale.distributed.world import World
from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines
from cmscale.training import stragglers
from cmscale.training.stragglers import Stragglers, slowest


@pytest.mark.parametrize(
    ("means", "rank"),
    [
        ([1.0, 1.1, 2.3, 1.0], 2),
        ([1.0, 2.3], 1),
        ([2.3, 1.0], 0),
        ([1.0, 1.9, 1.0, 1.0], None),  # not far above the median
        ([0.001, 0.03], None),  # a large factor, but a negligible time
        ([1.0], None),
    ],
)
def test_a_rank_far_above_the_median_is_the_straggler(means: list[float], rank: int | None) -> None:
    assert slowest(means) == rank


def test_the_straggler_is_named_every_so_often_by_the_mean_of_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[float] = []

    def gather(own: float) -> list[float]:
        gathered.append(own)
        return [own, own + 3.0]

    monkeypatch.setattr(stragglers, "gather", gather)
    run = RunDir(tmp_path)
    watch = Stragglers(run, World(rank=0, num_ranks=2), every=2)
    for step in range(1, 5):
        watch.begin()
        watch.stepped(step, ready=watch._began + step - 0.25, forward=0.25)
    assert gathered == pytest.approx([1.5, 3.5])
    (first,) = read_lines(run.events)
    assert (first["event"], first["step"], first["rank"]) == ("straggler", 2, 1)
    assert first["why"] == "rank 1 needs 4.500 s per step before the first collective, the median rank 1.500 s"
