"""Tests that a rank killed during a save leaves the old checkpoint or the new one, never a mix."""

import pytest
import torch
from ranks import run_ranks
from save_work import CASES, StandIn, flat_config, run_of

from cmscale.distributed.world import World
from cmscale.engine import resume
from cmscale.engine.checkpoint_reader import verify_checkpoint
from cmscale.engine.fence import claim_generation


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folders of the killed saves, one per case."""
    folder = str(tmp_path_factory.mktemp("runs"))
    run_ranks(1, "save_work:save_at_every_point", folder)
    return folder


@pytest.mark.parametrize(("rank", "point"), CASES)
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new_one(runs: str, rank: int, point: str) -> None:
    run = run_of(runs, rank, point)
    claim_generation(run)
    assert all(verify_checkpoint(folder) == [] for folder in run.checkpoints.iterdir())
    found = resume.newest(run, flat_config(), World(), data_fingerprint="data")
    assert found is not None
    is_new = point in ("after the rename", "before removal") or (rank, point) == (1, "after the record")
    assert found.manifest.state.step == (20 if is_new else 10)
    engine = StandIn(0, 1, seed=0)
    resume.restore(found, engine)  # pyright: ignore[reportArgumentType]
    written = StandIn(0, 1, seed=found.manifest.state.step)
    for quantity in engine.shards.quantities:
        assert torch.equal(engine.shards.local(quantity), written.whole[quantity])
