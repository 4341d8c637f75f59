"""Rank functions of the tests of killed saves: they save without DeepSpeed and are killed at a named point."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from flat_state import StandIn, flat_config, ranks_of
from torch.distributed import FileStore

from cmscale.distributed.noticeboard import NoticeBoard
from cmscale.distributed.world import World
from cmscale.engine import checkpoint, staged
from cmscale.engine.fence import claim_generation
from cmscale.runs.folder import RunDir
from cmscale.runs.manifests import TrainState


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(action: Callable[..., Any]) -> Callable[..., Any]:
    def acts_then_dies(*arguments: Any, **more: Any) -> None:
        action(*arguments, **more)
        die()

    return acts_then_dies


POINTS: dict[str, Callable[[], None]] = {
    "before the file": lambda: setattr(staged, "save_file", die),
    "before the record": lambda: setattr(checkpoint, "record", die),
    "after the record": lambda: setattr(checkpoint, "record", after(checkpoint.record)),
    "before the manifest": lambda: setattr(staged, "write_manifest", die),
    "after the manifest": lambda: setattr(staged, "write_manifest", after(staged.write_manifest)),
    "after the rename": lambda: setattr(Path, "rename", after(Path.rename)),
    "before removal": lambda: setattr(shutil, "rmtree", die),
}


ON_RANK_1 = ("before the file", "before the record", "after the record")
CASES = (*((0, point) for point in POINTS), *((1, point) for point in ON_RANK_1))


def run_of(folder: str, rank: int, point: str) -> RunDir:
    return RunDir(Path(folder) / f"{rank} {point}")


def save_at_every_point(folder: str) -> None:
    """For every case, saves step 10 of a run; then two ranks save step 20, and one is killed at the case's point."""
    for dying_rank, point in CASES:
        run = run_of(folder, dying_rank, point)
        generation = claim_generation(run)
        save(run, World(), generation, step=10)
        ranks = [_forked(run, world, generation, point if world.rank == dying_rank else None) for world in ranks_of(2)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]
        assert codes[dying_rank] == -signal.SIGKILL, (point, codes)
        assert codes[1 - dying_rank] == 0, (point, codes)


def _forked(run: RunDir, world: World, generation: int, point: str | None) -> int:
    """Forks a rank, as starting Python for every case would take most of the time."""
    process = os.fork()
    if process == 0:
        if point is not None:
            POINTS[point]()
        save(run, world, generation, step=20)
        os._exit(0)
    return process


def save(run: RunDir, world: World, generation: int, *, step: int) -> None:
    config = flat_config("engine.collective_timeout_minutes=0.02")
    board = NoticeBoard(FileStore(str(run.root / "notes"), -1))  # the ranks are forks without a process group
    writer = checkpoint.Checkpoints(run, config, world, generation=generation, data_fingerprint="data", board=board)
    state = StandIn(world.rank, world.num_ranks, seed=step)
    writer.save(TrainState(step=step, cursor=8 * step), state)  # pyright: ignore[reportArgumentType]
    writer.wait()
