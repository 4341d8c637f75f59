"""Shares the command line of the launchers: flags that say where a job runs, the printed plan, exit statuses."""

import argparse
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cmscale.commands import ending
from cmscale.commands.parser import CommandParser, whole_number
from cmscale.commands.situation import EXPORTED_RUN, NEW_RUN, RUN_IN_RUNS_DIR, SLURM
from cmscale.commands.use import USED, Use
from cmscale.config import Config, accumulation_steps
from cmscale.config.site import read_site, use_site
from cmscale.config.slurm import parse_gpus, parse_minutes, plain_text
from cmscale.io.place import Place
from launchers.clusters import CLUSTERS
from launchers.placement import Placement

T = TypeVar("T")


def guarded(main: Callable[[list[str]], int]) -> int:
    """Runs a launcher with the site's variables, and returns its exit status: see `cmscale.commands.ending`."""

    def at_site(arguments: list[str]) -> int:
        use_site()
        return main(arguments)

    return ending.guarded(at_site)


def add_cluster_flags(parser: CommandParser) -> None:
    """Adds the flags that say where a job runs; `submit.py` and `evaluate.py` have the same."""
    group = parser.add_argument_group("where the job runs")
    parser.add("--nodes", group=group, use=USED, type=whole_number(1), metavar="N", help="number of nodes (default: 1)")
    parser.add(
        "--gpus-per-node",
        group=group,
        use=USED,
        type=parsed_by(parse_gpus, keep=True),
        metavar="[TYPE:]G",
        help="GPUs per node, one rank per GPU, on Slurm also of a type (a100:4); with engine.device=cpu: ranks per "
        "node. Default: 8 on Slurm (1 with engine.device=cpu); on this machine the number of its GPUs, or 1",
    )
    parser.add(
        "--cluster",
        group=group,
        use=USED,
        choices=("auto", *CLUSTERS),
        help="auto: Slurm if sbatch is on the PATH, else this machine (default: auto)",
    )
    parser.add(
        "--partition",
        group=group,
        use=Use(cluster=(SLURM,)),
        type=parsed_by(plain_text),
        metavar="P",
        help="Slurm partition (default: the cluster's)",
    )
    parser.add(
        "--time",
        group=group,
        use=USED,
        type=parse_time,
        metavar="T",
        help="time limit: minutes, HH:MM:SS or D-HH:MM (default: 1-00:00 on Slurm, none on this machine)",
    )
    _add_run_flags(parser, group)


def _add_run_flags(parser: CommandParser, group: Any) -> None:
    """Adds the flags that name the run, and say whether its job is started and waited for."""
    parser.add(
        "--name", group=group, use=Use(run=(NEW_RUN,)), help="name of the run (default: the config's name and the time)"
    )
    parser.add(
        "--runs-dir",
        group=group,
        use=Use(run=(NEW_RUN, EXPORTED_RUN, RUN_IN_RUNS_DIR)),
        type=Place,
        metavar="DIR",
        help="folder of runs (default: the site's, or ./runs)",
    )
    parser.add(
        "--dry-run",
        group=group,
        use=USED,
        action="store_true",
        help="print the plan and the sbatch script; start nothing",
    )
    parser.add(
        "--wait",
        group=group,
        use=USED,
        action="store_true",
        help="wait until the job has ended and exit with its status (always so on this machine)",
    )


def parse_time(text: str) -> int:
    """Minutes, rounded up, of `90`, `HH:MM:SS`, `D-HH`, `D-HH:MM` or `D-HH:MM:SS`."""
    return parsed_by(parse_minutes)(text)


def parsed_by(parse: Callable[[str], T], *, keep: bool = False) -> Callable[[str], T]:
    """The parser of a flag for argparse, from one that raises ValueError; `keep` keeps the text that it allows."""

    def parsed(text: str) -> T:
        try:
            found = parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text if keep else found  # pyright: ignore[reportReturnType]

    return parsed


def runs_dir(flags: argparse.Namespace) -> Place:
    """The folder of runs: the flag's, the site's, else `runs`."""
    return read_site().runs_dir if flags.runs_dir is None else flags.runs_dir


def describe_training(placement: Placement, config: Config, *, root: Path, code: str) -> str:
    """The plan of a training run, as a table.

    Args:
        code: The row that says which code will run.

    Raises:
        UserError: the global batch cannot be divided over the ranks.
    """
    accumulation = accumulation_steps(config, num_ranks=placement.num_ranks)
    train, checkpoint = config.train, config.checkpoint
    rows = {
        "run": str(root),
        "code": code,
        **describe_placement(placement),
        "method": f"{config.method.kind}, {config.model.image_size} px, {config.engine.precision}, "
        f"ZeRO-{config.engine.zero_stage}",
        "global batch": f"{train.global_batch_size} = {placement.num_ranks} ranks x {accumulation} accumulated x "
        f"{train.micro_batch_size} micro-batch",
        "steps": f"{train.total_steps:,}{_schedule_of(config)}",
        "images": f"{train.total_steps * train.global_batch_size:,}",
        "data": config.data.path,
        **({"teacher": teacher} if (teacher := getattr(config.method, "teacher", None)) else {}),
        "checkpoints": f"{root / 'checkpoints'}, every {checkpoint.every_steps} steps, "
        f"{checkpoint.keep_last} kept; exported to {checkpoint.export_to or 'nowhere'}",
    }
    return as_table(rows)


def _schedule_of(config: Config) -> str:
    length = config.method.schedule_length(config.train.total_steps)
    return "" if length == config.train.total_steps else f"; the method's schedules take {length:,}"


def describe_placement(placement: Placement) -> dict[str, str]:
    """The rows of a plan that say where the job runs."""
    kind = "GPU" if placement.gpus else "CPU"
    return {
        "cluster": CLUSTERS[placement.cluster].describe(placement),
        "nodes": str(placement.nodes),
        "ranks": f"{placement.num_ranks} ({placement.ranks_per_node} {kind} ranks per node)",
        "time limit": str(datetime.timedelta(minutes=placement.minutes)) if placement.minutes else "none",
    }


def as_table(rows: dict[str, str]) -> str:
    """Two columns of text, one line per row."""
    width = max(len(name) for name in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
