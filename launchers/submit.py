"""Trains a config on Slurm or on this machine: `submit.py [flags] CONFIG [key=value ...]`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for a run from any folder

from cmscale.config import Config, differences, dump_config, parse_config, read_config, trajectory
from cmscale.errors import UserError
from cmscale.io.durable import replace_durably
from cmscale.runs.folder import RunDir
from launchers.checks import check_evaluation, check_export, check_inputs
from launchers.clusters import CLUSTERS
from launchers.command_line import add_cluster_flags, describe_training, guarded, placement_from
from launchers.evaluate_checkpoints import arguments_for, with_kept_checkpoints
from launchers.jobs import TRAIN, JobSpec
from launchers.run_folders import (
    create_run,
    existing_run,
    new_run,
    only_launcher,
    with_absolute_paths,
    write_provenance,
)
from launchers.submission import newest_step


def main(arguments: list[str]) -> int:
    """Submits or runs a training.

    Returns:
        Its exit status; 0 if it was submitted and is not waited for.

    Raises:
        UserError: a mistake in the command, the config or the inputs.
    """
    flags = _parser().parse_intermixed_args(arguments)
    run, config = _run_and_config(flags)
    placement = placement_from(flags, device=config.engine.device, config=config)
    evaluations: tuple[str, ...] = ()
    if flags.evaluate_every is not None:
        config = with_kept_checkpoints(config, flags.evaluate_every)
        evaluations = arguments_for(run, placement, flags.evaluate_every)
    cluster = CLUSTERS[placement.cluster]
    job = JobSpec(TRAIN, (str(run.root), flags.fresh), run, placement, evaluations)
    print(describe_training(placement, config, root=run.root), flush=True)
    if flags.dry_run:
        if preview := cluster.preview(job):
            print("\n" + preview)
        return 0
    check_inputs(config)
    if flags.evaluate_every is not None:
        check_evaluation(config, asked={})
    if config.checkpoint.export_to is not None:
        check_export(config.checkpoint.export_to, run.name, is_new=not flags.resume)
    if not flags.resume:
        create_run(run, config)
    with only_launcher(run, TRAIN):
        if flags.resume:
            if newest_step(run) >= config.train.total_steps:
                print(f"run {run.name} is finished: step {newest_step(run)} of {config.train.total_steps}")
                print(f"run: {run.root}")
                return 0
            replace_durably(run.config, dump_config(config).encode())
            write_provenance(run)
        status = cluster.run(job, wait=flags.wait)
    print(f"run: {run.root}", flush=True)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="submit.py", description=__doc__)
    add_cluster_flags(parser)
    parser.add_argument("--resume", metavar="RUN", help="continue a run: its folder, or its name in --runs-dir")
    parser.add_argument(
        "--fresh", action="store_true", help="with --resume: start from step 0 if no checkpoint can be loaded"
    )
    parser.add_argument(
        "--evaluate-every",
        type=int,
        metavar="N",
        help="evaluate the checkpoint of every N-th step in a job of its own, and keep these checkpoints",
    )
    parser.add_argument(
        "items", nargs="*", metavar="CONFIG [key=value ...]", help="a YAML file, and values that override its own"
    )
    return parser


def _run_and_config(flags: argparse.Namespace) -> tuple[RunDir, Config]:
    """The run that the flags name, new or to resume, and the config that it trains with."""
    file, overrides = split_items(flags.items)
    if flags.fresh and not flags.resume:
        raise UserError("--fresh: a new run starts from step 0 anyway; use it with --resume")
    if flags.resume:
        if flags.name:
            raise UserError(f"--name {flags.name}: a run that is resumed keeps its name; leave it out")
        run = existing_run(flags.resume, runs_dir=flags.runs_dir)
        return run, resumed_config(run, file, overrides)
    if file is None:
        raise UserError("no config given: submit.py [flags] CONFIG [key=value ...]")
    run = new_run(name=flags.name, runs_dir=flags.runs_dir, stem=Path(file).stem)
    return run, with_absolute_paths(read_config(file, overrides))


def split_items(items: list[str]) -> tuple[str | None, list[str]]:
    """Splits positional arguments into CONFIG (the one without `=`; None if there is none) and overrides.

    Raises:
        UserError: there are two configs.
    """
    files = [item for item in items if "=" not in item or Path(item).is_file()]
    if len(files) > 1:
        raise UserError(f"one config at a time, got {' and '.join(files)}; overrides are written key=value")
    return (files[0] if files else None), [item for item in items if item not in files]


def resumed_config(run: RunDir, file: str | None, overrides: list[str]) -> Config:
    """The config that a resumed run continues with: its own or that of `file`, with overrides.

    Raises:
        UserError: a value that changes the losses differs from the run's own; the differences are named.
    """
    old = read_config(run.config, resolved=True)
    written_by_older_release = read_config(run.config) != old  # its YAML lacks the same keys as the run's config
    new = (
        read_config(file, overrides, resolved=written_by_older_release)
        if file
        else parse_config(run.config.read_text(), overrides, origin=str(run.config), resolved=True)
    )
    if changed := differences(trajectory(old), trajectory(new)):
        raise UserError(
            f"--resume {run.name}: the config differs where losses would change: {'; '.join(changed)}; "
            "start a new run with it"
        )
    return with_absolute_paths(new)


if __name__ == "__main__":
    sys.exit(guarded(main))
