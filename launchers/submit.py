"""Trains a config on Slurm or on this machine: `submit.py [flags] CONFIG [key=value ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for a run from any folder

if __name__ == "__main__":
    from cmscale.commands.ending import end_early_interrupts

    end_early_interrupts()

import argparse
import os
from functools import partial

from cmscale.commands.ending import leave
from cmscale.commands.parser import CommandParser, whole_number
from cmscale.commands.use import USED, Use
from cmscale.config import Config, dump_config, leaves
from cmscale.config.cautions import cautions
from cmscale.config.sbatch_variables import unused_variables
from cmscale.config.site import LaunchSettings
from cmscale.io.durable import replace_durably
from cmscale.runs.copies import exported_run, pending_copies
from cmscale.runs.folder import RunDir
from cmscale.runs.homes import must_be_home
from cmscale.runs.snapshot import Code, read_code, take_snapshot
from launchers.beginning import Beginning, beginning
from launchers.checks import check_continues, check_evaluation, check_export, check_inputs, fetch_published
from launchers.clusters import CLUSTERS
from launchers.command_line import add_cluster_flags, describe_training, guarded
from launchers.evaluate_checkpoints import arguments_for, with_kept_checkpoints
from launchers.jobs import TRAIN, JobSpec
from launchers.provenance import newest_code, record_start
from launchers.run_folders import only_launcher, removed_if_refused
from launchers.submission import newest_step
from launchers.try_inputs import try_inputs
from launchers.where import FLAG, Recorded, Where, decide_where, describe_origins


def main(arguments: list[str]) -> int:
    """Submits or runs a training.

    Returns:
        Its exit status; 0 if it was submitted and is not waited for.

    Raises:
        UserError: a mistake in the command, the config or the inputs.
    """
    flags, given = command_parser().read(arguments)
    origins: dict[str, str] = {}
    begun = beginning(flags, given, origins)
    run, config = begun.run, begun.config
    settings = LaunchSettings(slurm=config.slurm, restart=config.restart)
    device = config.engine.device
    where = decide_where(
        flags, given, settings, origins, device=device, device_option="engine.device=", recorded=begun.recorded
    )
    every = _evaluate_every(flags, begun.recorded)
    evaluations: tuple[str, ...] = ()
    if every is not None:
        config = with_kept_checkpoints(config, every)
        evaluations = arguments_for(run, where.placement, every)
    code = read_code()
    plan = describe_training(where.placement, config, root=run.root, code=describe_code(code, run))
    describe = partial(_describe, plan, flags, begun, config, where, every, origins=origins)
    worker, folder = (TRAIN, (str(run.root), flags.fresh)), run.code / code.name
    job = JobSpec(*worker, run, where.placement, evaluations, code=folder, taken=describe)
    if flags.dry_run:
        describe()
        if preview := CLUSTERS[where.placement.cluster].preview(job):
            print("\n" + preview)
        return 0
    config.storage.apply(interactive=True)
    if begun.exported_step >= config.train.total_steps:
        return _say_finished(run, begun.exported_step, config, at=f"{begun.exports}/{run.name}")
    begins = flags.fresh or begun.begins
    data = check_inputs(config, begins=begins)
    if begun.is_there:
        check_continues(config, run, data)
    if begins or config.method.facts.follows_teacher:
        try_inputs(config, on_this_cpu=where.placement.cluster == "local" and not where.placement.gpus)
    if every is not None:
        check_evaluation(config, asked={})
    if config.checkpoint.export_to is not None:
        prunes = config.checkpoint.export_keep_last is not None
        check_export(config.checkpoint.export_to, run.name, is_new=begun.exports_anew(config), prunes=prunes)
        if begun.is_there:
            must_be_home(exported_run(run, config.checkpoint.export_to), run)
    fetch_published(config, evaluates=every is not None)
    if begun.make is not None:
        begun.make(config, code, data)
    return _launch(flags, begun, config, job, every=every, code=code)


def _launch(
    flags: argparse.Namespace, begun: Beginning, config: Config, job: JobSpec, *, every: int | None, code: Code
) -> int:
    """Starts the job of a run whose folder is there. Returns its exit status."""
    run = begun.run
    with only_launcher(run, TRAIN, take_over=flags.take_over):
        if begun.bring_back is not None:
            begun.bring_back(config, code)
        elif begun.is_there:
            if newest_step(run) >= config.train.total_steps and not copies_missing(run, config):
                return _say_finished(run, newest_step(run), config, at=str(run.root))
            replace_durably(run.config, dump_config(config).encode())
            record_start(run, code, take_snapshot(code, run.code))
        Recorded.of(job.placement, evaluate_every=every).write(run)
        with removed_if_refused(run, job.submission, is_new=not flags.resume):
            status = CLUSTERS[job.placement.cluster].run(job, wait=flags.wait)
    print(f"run: {run.root}", flush=True)
    return status


def _say_finished(run: RunDir, step: int, config: Config, *, at: str) -> int:
    print(f"run {run.name} is finished: step {step} of {config.train.total_steps}")
    print(f"run: {at}")
    return 0


def _describe(
    plan: str,
    flags: argparse.Namespace,
    begun: Beginning,
    config: Config,
    where: Where,
    every: int | None,
    *,
    origins: dict[str, str],
) -> None:
    """Prints the plan, where its values come from, notes and cautions, once nothing is left to refuse."""
    run, placement = begun.run, where.placement
    print(plan, flush=True)
    if flags.dry_run or flags.resume or flags.branch:
        rows = where if every is None else where.with_row("evaluate every", str(every), _origin_of_every(flags))
        values = {key: value for key, value, _ in leaves(config)}
        print("\n" + describe_origins(rows, origins, values, file=begun.origin), flush=True)
    if unused := unused_variables(os.environ):
        print(f"note: not used, as launchers say this themselves: {', '.join(unused)}", file=sys.stderr)
    if begun.is_there and begun.recorded is None:
        print(
            f"note: run {run.name} does not record where it ran (an earlier release started it); flags and defaults "
            f"give {placement.nodes} nodes of {placement.ranks_per_node} ranks",
            file=sys.stderr,
        )
    for caution in cautions(config):
        print(f"caution: {caution}", file=sys.stderr, flush=True)


def command_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="submit.py", description=__doc__)
    add_cluster_flags(parser)
    parser.add(
        "--resume",
        use=USED,
        metavar="RUN",
        help="continue a run: its folder, its name in --runs-dir, or its exports (s3://.../NAME), from which it goes "
        "on in --runs-dir",
    )
    parser.add(
        "--branch",
        use=Use(excludes=("resume",)),
        metavar="RUN[@STEP]",
        help="a new run that goes on from a checkpoint of RUN (a folder, a name, s3://.../NAME) with other values; "
        "default: its newest intact one",
    )
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


def describe_code(code: Code, run: RunDir) -> str:
    """The code that a job will run, for the plan, and that of the run's last start if it was another."""
    before, folder = newest_code(run), f"{run.code.name}/{code.name}"
    change = f"; until now {before}" if before not in (None, folder) else ""
    return f"{code.revision or 'not in git'}, copied to {folder}{change}"


def copies_missing(run: RunDir, config: Config) -> bool:
    """Whether checkpoints of a run are not exported yet: another start then copies them, and trains no more."""
    export_to = config.checkpoint.export_to
    return export_to is not None and bool(pending_copies(run, export_to, config.checkpoint))


if __name__ == "__main__":
    leave(guarded(main))
