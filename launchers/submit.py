"""Trains a config on Slurm or on this machine: `submit.py [flags] CONFIG [key=value ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for a run from any folder

if __name__ == "__main__":
    from cmscale.commands.ending import end_early_interrupts

    end_early_interrupts()

import argparse
import os

from cmscale.commands.ending import leave
from cmscale.commands.parser import CommandParser, whole_number
from cmscale.commands.use import USED, Given, Use
from cmscale.config import Config, differences, dump_config, leaves, parse_config, read_config, trajectory
from cmscale.config.cautions import cautions
from cmscale.config.site import LaunchSettings, site_layers, unused_variables
from cmscale.errors import UserError
from cmscale.io.durable import replace_durably
from cmscale.io.slurm import Refused
from cmscale.runs.copies import pending_exports
from cmscale.runs.folder import RunDir
from cmscale.runs.snapshot import Code, read_code, take_snapshot
from launchers.checks import check_evaluation, check_export, check_inputs
from launchers.clusters import CLUSTERS
from launchers.command_line import add_cluster_flags, describe_training, guarded, runs_dir
from launchers.evaluate_checkpoints import arguments_for, with_kept_checkpoints
from launchers.jobs import TRAIN, JobSpec
from launchers.provenance import newest_code, record_start
from launchers.run_folders import (
    create_run,
    existing_run,
    new_run,
    only_launcher,
    remove_run,
    run_named,
    with_absolute_paths,
)
from launchers.submission import newest_step
from launchers.try_inputs import try_inputs
from launchers.where import FLAG, Recorded, decide_where, describe_origins, read_recorded


def main(arguments: list[str]) -> int:
    """Submits or runs a training.

    Returns:
        Its exit status; 0 if it was submitted and is not waited for.

    Raises:
        UserError: a mistake in the command, the config or the inputs.
    """
    flags, given = command_parser().read(arguments)
    origins: dict[str, str] = {}
    run, config = _run_and_config(flags, given, origins)
    recorded = read_recorded(run) if flags.resume else None
    settings = LaunchSettings(slurm=config.slurm, restart=config.restart)
    device = config.engine.device
    where = decide_where(
        flags, given, settings, origins, device=device, device_option="engine.device=", recorded=recorded
    )
    placement, every = where.placement, _evaluate_every(flags, recorded)
    evaluations: tuple[str, ...] = ()
    if every is not None:
        config = with_kept_checkpoints(config, every)
        evaluations = arguments_for(run, placement, every)
    cluster = CLUSTERS[placement.cluster]
    code = read_code()
    job = JobSpec(TRAIN, (str(run.root), flags.fresh), run, placement, evaluations, code=run.code / code.name)
    print(describe_training(placement, config, root=run.root, code=describe_code(code, run)), flush=True)
    if flags.dry_run or flags.resume:
        rows = where if every is None else where.with_row("evaluate every", str(every), _origin_of_every(flags))
        values = {key: value for key, value, _ in leaves(config)}
        file = split_items(flags.items)[0] or str(run.config)
        print("\n" + describe_origins(rows, origins, values, file=file), flush=True)
    if unused := unused_variables(os.environ):
        print(f"note: not used, as launchers say this themselves: {', '.join(unused)}", file=sys.stderr)
    if flags.resume and recorded is None:
        print(
            f"note: run {run.name} does not record where it ran (an earlier release started it); flags and defaults "
            f"give {placement.nodes} nodes of {placement.ranks_per_node} ranks",
            file=sys.stderr,
        )
    for caution in cautions(config):
        print(f"caution: {caution}", file=sys.stderr, flush=True)
    if flags.dry_run:
        if preview := cluster.preview(job):
            print("\n" + preview)
        return 0
    check_inputs(config)
    try_inputs(config, on_this_cpu=placement.cluster == "local" and not placement.gpus)
    if every is not None:
        check_evaluation(config, asked={})
    if config.checkpoint.export_to is not None:
        check_export(config.checkpoint.export_to, run.name, is_new=not flags.resume)
    if not flags.resume:
        create_run(run, config, code)
    with only_launcher(run, TRAIN, take_over=flags.take_over):
        if flags.resume:
            if newest_step(run) >= config.train.total_steps and not copies_missing(run, config):
                print(f"run {run.name} is finished: step {newest_step(run)} of {config.train.total_steps}")
                print(f"run: {run.root}")
                return 0
            replace_durably(run.config, dump_config(config).encode())
            record_start(run, code, take_snapshot(code, run.code))
        Recorded.of(placement, evaluate_every=every).write(run)
        try:
            status = cluster.run(job, wait=flags.wait)
        except Refused:
            if not flags.resume:  # so that the corrected command finds no run of this name
                remove_run(run)
            raise
    print(f"run: {run.root}", flush=True)
    return status


def command_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="submit.py", description=__doc__)
    add_cluster_flags(parser)
    parser.add("--resume", use=USED, metavar="RUN", help="continue a run: its folder, or its name in --runs-dir")
    resumes = Use(needs=("resume",))
    parser.add(
        "--fresh",
        use=resumes,
        action="store_true",
        help="with --resume: start from step 0 if no checkpoint can be loaded",
    )
    parser.add(
        "--take-over",
        use=resumes,
        action="store_true",
        help="with --resume: continue although an earlier job or launcher may be alive; it then ends by itself",
    )
    parser.add(
        "--evaluate-every",
        use=USED,
        type=whole_number(0),
        metavar="N",
        help="evaluate the checkpoint of every N-th step in a job of its own, and keep these checkpoints; "
        "0 with --resume: no longer",
    )
    parser.add(
        "items",
        use=USED,
        nargs="*",
        metavar="CONFIG [key=value ...]",
        help="a YAML file, and values that override its own",
    )
    return parser


def _evaluate_every(flags: argparse.Namespace, recorded: Recorded | None) -> int | None:
    """The interval of evaluations during training: the flag's, else that which a resumed run had."""
    if flags.evaluate_every == 0 and flags.resume:
        return None
    return flags.evaluate_every if flags.evaluate_every is not None else recorded and recorded.evaluate_every


def _origin_of_every(flags: argparse.Namespace) -> str:
    return "placement.json of the run" if flags.evaluate_every is None else FLAG


def _run_and_config(flags: argparse.Namespace, given: Given, origins: dict[str, str]) -> tuple[RunDir, Config]:
    """The run that the flags name, new or to resume, and the config that it trains with.

    Args:
        origins: Gets the origin of each value that is no default, by dotted key.
    """
    file, overrides = split_items(flags.items)
    if flags.resume:
        run = existing_run(flags.resume, runs_dir=runs_dir(flags))
        given.refuse_unused(run=run_named(run.root, runs_dir(flags)))
        return run, resumed_config(run, file, overrides, origins)
    if file is None:
        raise UserError("no config given: submit.py [flags] CONFIG [key=value ...]")
    run = new_run(name=flags.name, runs_dir=runs_dir(flags), stem=Path(file).stem)
    return run, with_absolute_paths(read_config(file, overrides, beneath=site_layers(), origins=origins))


def describe_code(code: Code, run: RunDir) -> str:
    """The code that a job will run, for the plan, and that of the run's last start if it was another."""
    before, folder = newest_code(run), f"{run.code.name}/{code.name}"
    change = f"; until now {before}" if before not in (None, folder) else ""
    return f"{code.revision or 'not in git'}, copied to {folder}{change}"


def copies_missing(run: RunDir, config: Config) -> bool:
    """Whether checkpoints of a run are not exported yet: another start then copies them, and trains no more."""
    export_to = config.checkpoint.export_to
    return export_to is not None and bool(pending_exports(run, export_to))


def split_items(items: list[str]) -> tuple[str | None, list[str]]:
    """Splits positional arguments into CONFIG (the one without `=`; None if there is none) and overrides.

    Raises:
        UserError: there are two configs.
    """
    files = [item for item in items if "=" not in item or Path(item).is_file()]
    if len(files) > 1:
        raise UserError(f"one config at a time, got {' and '.join(files)}; overrides are written key=value")
    return (files[0] if files else None), [item for item in items if item not in files]


def resumed_config(
    run: RunDir, file: str | None, overrides: list[str], origins: dict[str, str] | None = None
) -> Config:
    """The config that a resumed run continues with: its own or that of `file`, with overrides.

    A site's values are beneath those of `file`; the run's own config holds those that it was started with.

    Args:
        origins: Gets the origin of each value that is no default, by dotted key.

    Raises:
        UserError: a value that changes the losses differs from the run's own; the differences are named.
    """
    old = read_config(run.config, resolved=True)
    written_by_older_release = read_config(run.config) != old  # its YAML lacks the same keys as the run's config
    new = (
        read_config(file, overrides, resolved=written_by_older_release, beneath=site_layers(), origins=origins)
        if file
        else parse_config(run.config.read_text(), overrides, origin=str(run.config), resolved=True, origins=origins)
    )
    if changed := differences(trajectory(old), trajectory(new)):
        raise UserError(
            f"--resume {run.name}: the config differs where losses would change: {'; '.join(changed)}; "
            "start a new run with it"
        )
    return with_absolute_paths(new)


if __name__ == "__main__":
    leave(guarded(main))
