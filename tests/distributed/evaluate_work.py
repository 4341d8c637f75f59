"""Runs evaluations on several ranks: one process imports everything, and the ranks are forks of it."""

import ctypes
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
from evaluation_fixtures import build_cheap_features, write_dataset, write_trained_run
from ranks import free_port

from cmscale.config.requests import EvaluateRequest
from cmscale.evaluation import evaluate, manifold
from cmscale.evaluation import session as measuring
from cmscale.evaluation.blocks import BlockStore
from cmscale.runs.folder import RunDir

REQUEST = {"samples": 300, "device": "cpu"}  # three blocks, the last of 44 samples: uneven on 2 and 3 ranks


def evaluate_on_ranks(folder: str) -> None:
    """Evaluates a run on 1, 2 and 3 ranks; then on 2 ranks, one of which is killed, and again on 3."""
    measuring.build_features = build_cheap_features
    manifold._BLOCK_ELEMENTS = 700  # otherwise one block, and so one rank, would have all distances
    root = Path(folder)
    run = write_trained_run(root / "run", data=write_dataset(root))
    _on_1_2_and_3_ranks(run, root, steps="1,2", seeds=2)
    _killed_and_continued(run, root)


def evaluate_trained(folder: str) -> None:
    """Does the same with a trained run and the features of a real network."""
    root = Path(folder)
    _on_1_2_and_3_ranks(RunDir(root / "run"), root, steps="1")
    _killed_and_continued(RunDir(root / "run"), root)


def _on_1_2_and_3_ranks(run: RunDir, root: Path, **asked: Any) -> None:
    torch.set_num_threads(1)
    for num_ranks in (1, 2, 3):
        copy = RunDir(shutil.copytree(run.root, root / f"on {num_ranks}"))
        noted = {rank: note_rows(root / f"rows on {num_ranks}", rank) for rank in range(num_ranks)}
        codes = forked(num_ranks, copy, before=noted, by_command=num_ranks == 2, **asked)
        assert codes == [0] * num_ranks, codes


def _killed_and_continued(run: RunDir, root: Path) -> None:
    copy = RunDir(shutil.copytree(run.root, root / "killed"))
    codes = forked(2, copy, steps="1", before={1: die_at_commit})
    assert codes[1] == -signal.SIGKILL, codes
    assert codes[0] == 1, codes
    (root / "left.json").write_text(json.dumps(sorted(path.name for path in copy.evaluations.rglob("block-*"))))
    codes = forked(3, copy, steps="1", before=dict.fromkeys(range(3), note_commits(root / "commits")))
    assert codes == [0, 0, 0], codes


def forked(
    num_ranks: int,
    run: RunDir,
    *,
    before: dict[int, Callable[[], None]] | None = None,
    by_command: bool = False,
    **asked: Any,
) -> list[int]:
    """The exit codes of ranks that evaluate a run, by rank; `before` is called first on each rank.

    They are a job's, or with `by_command` do what `cmscale evaluate` does under torchrun.
    """
    port = free_port()
    ranks = []
    for rank in range(num_ranks):
        if (process := os.fork()) == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the test
            place = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_ranks}
            os.environ.update({name: str(value) for name, value in place.items()}, MASTER_PORT=str(port))
            os._exit(_evaluates(run, before=(before or {}).get(rank), by_command=by_command, asked=asked))
        ranks.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]


def _evaluates(run: RunDir, *, before: Callable[[], None] | None, by_command: bool, asked: dict[str, Any]) -> int:
    try:
        if before is not None:
            before()
        request = {"source": str(run.root), **REQUEST, **asked}
        if by_command:
            assert evaluate.run_here(EvaluateRequest(**request))
        else:
            assert evaluate.main(request) == "finished"
        sys.stdout.flush()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def die_at_commit() -> None:
    BlockStore.commit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def note_commits(path: Path) -> Callable[[], None]:
    commit = BlockStore.commit

    def noted(store: BlockStore, block: range, features: Any) -> None:
        with path.open("a") as file:
            file.write(f"{block.start}\n")
        commit(store, block, features)

    return lambda: setattr(BlockStore, "commit", noted)


def note_rows(path: Path, rank: int) -> Callable[[], None]:
    """Records how many rows of distances a rank computes."""
    compute = manifold._squared_distances

    def noted(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        with path.open("a") as file:
            file.write(f"{rank} {len(x)}\n")
        return compute(x, *others)

    return lambda: setattr(manifold, "_squared_distances", noted)
