"""A worker without a network: counts steps with gloo, saves the count, stops on signals."""

import json
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from cmscale.errors import UserError
from cmscale.io.process import EARLY_SIGNAL
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.folder import CHECKPOINT_MANIFEST, RunDir


def main(run_dir: str, total_steps: int, how: str) -> str:
    """Runs to `total_steps`; `how` is `well`, `user_error`, `fault`, `slow` (one step in 0.2 s) or `slow at first`.

    The last is slow in the first start, and quick in those after it, so that one of them ends.
    """
    is_slow = how == "slow" or (how == "slow at first" and os.environ.get("SLURM_RESTART_COUNT", "0") == "0")
    run, signals = RunDir(Path(run_dir)), [EARLY_SIGNAL in os.environ]
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda *_: signals.append(True))
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if how == "user_error":
        raise UserError("train.seed: got -1; it should be at least 0")
    names = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
    )
    facts = {name: os.environ[name] for name in names} | {"node": os.environ.get("SLURMD_NODENAME", "")}
    (run.root / f"facts-{rank}.json").write_text(json.dumps(facts | {"pid": os.getpid()}))
    step = newest(run)
    while step < total_steps:
        totals = torch.tensor([1, int(any(signals))])
        dist.all_reduce(totals)
        step += 1
        if rank == 0:
            with (run.root / "steps.txt").open("a") as file:
                file.write(f"{step} {int(totals[0])}\n")
        if how == "fault" and rank == 1 and step == 2:
            raise RuntimeError("rank 1 is out of luck")
        if totals[1]:
            return "preempted" if save(run, step) else "never"
        if is_slow:
            time.sleep(0.2)
            if step % 10 == 0:
                save(run, step)
    save(run, step)
    return "finished"


def save(run: RunDir, step: int) -> bool:
    if dist.get_rank() == 0:
        folder = run.checkpoint(step)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CHECKPOINT_MANIFEST).write_text("{}")
    dist.barrier()
    return True


def newest(run: RunDir) -> int:
    return max(committed_steps(run), default=0)
