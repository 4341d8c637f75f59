"""Owns where a job runs: cluster, nodes, ranks, time; from the flags that all launchers share."""

import argparse
import datetime
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cmscale.config import Config, Restart, Slurm, accumulation_steps
from cmscale.errors import UserError

DEFAULT_MINUTES = 24 * 60


@dataclass(frozen=True)
class Plan:
    """A job's place. `minutes` None means no limit (only on this machine); `beside` starts `launchers.beside`."""

    cluster: Literal["slurm", "local"]
    nodes: int
    ranks_per_node: int
    gpus: bool
    partition: str | None
    minutes: int | None
    slurm: Slurm
    restart: Restart
    beside: tuple[str, ...] = ()

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say where a job runs; `submit.py` and `evaluate.py` have the same."""
    group = parser.add_argument_group("where it runs")
    group.add_argument("--nodes", type=_count, default=1, metavar="N")
    group.add_argument(
        "--gpus-per-node",
        type=_count,
        metavar="G",
        help="GPUs and so ranks of a node (with engine.device=cpu: ranks); default: 8 on Slurm (1 on CPUs), "
        "on this machine the number of its GPUs, or 1",
    )
    group.add_argument(
        "--cluster",
        choices=("auto", "slurm", "local"),
        default="auto",
        help="auto: Slurm where sbatch is on the PATH",
    )
    group.add_argument("--partition", metavar="P")
    group.add_argument(
        "--time", type=parse_time, metavar="T", help="minutes, HH:MM:SS or D-HH:MM; default on Slurm: 1-00:00"
    )
    group.add_argument("--name", help="of the run; default: the config's name and the time")
    group.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="default: ./runs")
    group.add_argument("--dry-run", action="store_true", help="print the plan (and the sbatch script), start nothing")
    group.add_argument(
        "--wait",
        action="store_true",
        help="wait for the end (always on this machine); exit with the job's status",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; it should be a whole number of at least 1")
    return int(text)


def parse_time(text: str) -> int:
    """Minutes, rounded up, of `90`, `HH:MM:SS`, `D-HH`, `D-HH:MM` or `D-HH:MM:SS`."""
    patterns = (
        r"(?P<m>\d+)",
        r"(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)",
        r"(?P<d>\d+)-(?P<h>\d+)(:(?P<m>\d+)(:(?P<s>\d+))?)?",
    )
    for pattern in patterns:
        if match := re.fullmatch(pattern, text):
            part = {name: int(value or 0) for name, value in match.groupdict().items()}
            seconds = 60 * (60 * (24 * part.get("d", 0) + part.get("h", 0)) + part.get("m", 0)) + part.get("s", 0)
            if seconds:
                return -(-seconds // 60)
    raise argparse.ArgumentTypeError(f"got {text!r}; write minutes, HH:MM:SS or D-HH:MM")


def make_plan(flags: argparse.Namespace, *, device: str, slurm: Slurm, restart: Restart) -> Plan:
    """Where a job runs: by its flags, the ranks' device (`auto`, `cpu`, `cuda`) and the config's `slurm`.

    Raises:
        UserError: what was asked for can't be had here.
    """
    has_slurm = shutil.which("sbatch") is not None
    cluster = flags.cluster
    if cluster == "auto":
        cluster = "slurm" if has_slurm or (flags.dry_run and flags.nodes > 1) else "local"
    if cluster == "slurm" and not has_slurm and not flags.dry_run:
        raise UserError(
            "--cluster slurm: there is no sbatch on the PATH; log in to the cluster, or use --cluster local"
        )
    if cluster == "local":
        if flags.nodes > 1:
            raise UserError(
                f"--nodes {flags.nodes}: this machine is one node (no sbatch on the PATH, or --cluster local)"
            )
        count = 0 if device == "cpu" else len(visible_gpus())
        if device == "cuda" and count == 0:
            raise UserError(
                "engine.device: cuda was asked for, but this machine has no CUDA device; use engine.device=cpu"
            )
        if count and (flags.gpus_per_node or 1) > count:
            raise UserError(f"--gpus-per-node {flags.gpus_per_node}: this machine has {count} GPUs")
        return Plan("local", 1, flags.gpus_per_node or count or 1, count > 0, None, flags.time, slurm, restart)
    gpus = device != "cpu"
    minutes = flags.time or DEFAULT_MINUTES
    if minutes * 60 <= restart.signal_seconds:
        raise UserError(
            f"--time: {minutes} minutes leave nothing before the signal that comes restart.signal_seconds "
            f"{restart.signal_seconds} before the end; ask for more time or lower it"
        )
    ranks = flags.gpus_per_node or (8 if gpus else 1)
    return Plan("slurm", flags.nodes, ranks, gpus, flags.partition, minutes, slurm, restart)


def visible_gpus() -> list[str]:
    """The CUDA devices that a job would see here, as CUDA_VISIBLE_DEVICES names them; found without CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part.strip() for part in visible.split(",") if part.strip() and part.strip() != "-1"]
    found = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdecimal()])
    if not found and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        found = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [str(index) for index in range(found)]


def describe_training(plan: Plan, config: Config, *, root: Path) -> str:
    """The plan of a training run, for people.

    Raises:
        UserError: the global batch can't be divided over the ranks.
    """
    accumulation = accumulation_steps(config, num_ranks=plan.num_ranks)
    train = config.train
    rows = {
        "run": str(root),
        **describe_place(plan),
        "method": f"{config.method.kind}, {config.model.image_size} px, {config.engine.precision}, "
        f"ZeRO-{config.engine.zero_stage}",
        "global batch": f"{train.global_batch_size} = {plan.num_ranks} ranks x {accumulation} accumulated x "
        f"{train.micro_batch_size} micro-batch",
        "steps": f"{train.total_steps:,}",
        "images": f"{train.total_steps * train.global_batch_size:,}",
        "data": config.data.path,
        **({"teacher": teacher} if (teacher := getattr(config.method, "teacher", None)) else {}),
        "checkpoints": f"{root / 'checkpoints'}, every {config.checkpoint.every_steps} steps, "
        f"{config.checkpoint.keep_last} kept; exported to {config.checkpoint.export_to or 'nowhere'}",
    }
    return as_table(rows)


def describe_place(plan: Plan) -> dict[str, str]:
    """The rows of a plan that say where it runs."""
    kind = "GPU" if plan.gpus else "CPU"
    where = "this machine" if plan.cluster == "local" else f"Slurm, partition {plan.partition or '(default)'}"
    return {
        "cluster": where,
        "nodes": str(plan.nodes),
        "ranks": f"{plan.num_ranks} ({plan.ranks_per_node} {kind} ranks a node)",
        "time limit": str(datetime.timedelta(minutes=plan.minutes)) if plan.minutes else "none",
    }


def as_table(rows: dict[str, str]) -> str:
    width = max(len(name) for name in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
