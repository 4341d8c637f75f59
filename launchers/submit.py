"""Trains a config on Slurm or on this machine: `submit.py [flags] CONFIG [key=value ...]`."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for a run from any folder

from cmscale.config import Config, differences, dump_config, parse_config, read_config, trajectory
from cmscale.errors import UserError
from cmscale.io.storage import replace_durably
from cmscale.runs.folder import RunDir
from launchers.beside import arguments_of, kept_beside, with_kept_checkpoints
from launchers.checks import check_evaluation, check_export, check_inputs
from launchers.outcome import newest_step
from launchers.plan import add_cluster_flags, describe_training, make_plan
from launchers.slurm import script_text
from launchers.start import (
    create_run,
    existing_run,
    guarded,
    launch,
    refuse_if_running,
    run_of,
    with_absolute_paths,
    write_provenance,
)

WORKER = "cmscale.training.loop:main"


def main(arguments: list[str]) -> int:
    """Submits or runs the training. Returns its exit status, 0 once submitted. Raises UserError."""
    parser = argparse.ArgumentParser(prog="submit.py", description=__doc__)
    add_cluster_flags(parser)
    parser.add_argument("--resume", metavar="RUN", help="continue a run: its folder, or its name in --runs-dir")
    parser.add_argument("--fresh", action="store_true", help="with --resume: start anew if no checkpoint can be loaded")
    parser.add_argument(
        "--evaluate-every",
        type=int,
        metavar="N",
        help="evaluate every N-th step's checkpoint in a job of its own; those checkpoints are kept",
    )
    parser.add_argument("items", nargs="*", metavar="CONFIG [key=value ...]", help="a YAML file; overrides of its keys")
    flags = parser.parse_intermixed_args(arguments)
    file, overrides = split_items(flags.items)
    if flags.fresh and not flags.resume:
        raise UserError("--fresh: a new run is fresh anyway; it goes with --resume")
    if flags.resume:
        if flags.name:
            raise UserError(f"--name {flags.name}: a run that is resumed keeps its name; leave it out")
        run = existing_run(flags.resume, runs_dir=flags.runs_dir)
        config = resumed_config(run, file, overrides)
    else:
        if file is None:
            raise UserError("no config given: submit.py [flags] CONFIG [key=value ...]")
        run = run_of(name=flags.name, runs_dir=flags.runs_dir, stem=Path(file).stem)
        config = with_absolute_paths(read_config(file, overrides))
    plan = make_plan(flags, device=config.engine.device, slurm=config.slurm, restart=config.restart)
    if flags.evaluate_every is not None:
        config = with_kept_checkpoints(config, flags.evaluate_every)
        plan = replace(plan, beside=arguments_of(run, plan, flags.evaluate_every))
    print(describe_training(plan, config, root=run.root), flush=True)
    if flags.dry_run:
        if plan.cluster == "slurm":
            print("\n" + script_text(run, plan, submission="(name)"))
        return 0
    check_inputs(config)
    if flags.evaluate_every is not None:
        check_evaluation(config, asked={})
    if config.checkpoint.export_to is not None:
        check_export(config.checkpoint.export_to, run.name, is_new=not flags.resume)
    if flags.resume:
        refuse_if_running(run, WORKER)
        if newest_step(run) >= config.train.total_steps:
            print(f"run {run.name} is finished: step {newest_step(run)} of {config.train.total_steps}")
            print(f"run: {run.root}")
            return 0
        replace_durably(run.config, dump_config(config).encode())
        write_provenance(run)
    else:
        create_run(run, config)
        refuse_if_running(run, WORKER)
    with kept_beside(plan.beside if plan.cluster == "local" else ()) as finish:
        status = launch(WORKER, (str(run.root), flags.fresh), run=run, plan=plan, wait=flags.wait)
        if status == 0:
            finish()
    print(f"run: {run.root}", flush=True)
    return status


def split_items(items: list[str]) -> tuple[str | None, list[str]]:
    """CONFIG (the one without `=`, if any) and the overrides.

    Raises:
        UserError: two configs.
    """
    files = [item for item in items if "=" not in item or Path(item).is_file()]
    if len(files) > 1:
        raise UserError(f"one config at a time, got {' and '.join(files)}; overrides are written key=value")
    return (files[0] if files else None), [item for item in items if item not in files]


def resumed_config(run: RunDir, file: str | None, overrides: list[str]) -> Config:
    """The config that a run goes on with: its own, or one that moves no loss against it.

    Raises:
        UserError: a value that moves the losses differs; the differences are named.
    """
    old = read_config(run.config)
    new = (
        read_config(file, overrides)
        if file
        else parse_config(run.config.read_text(), overrides, origin=str(run.config))
    )
    if changed := differences(trajectory(old), trajectory(new)):
        raise UserError(
            f"--resume {run.name}: the config differs where losses would change: {'; '.join(changed)}; "
            "start a new run with it"
        )
    return with_absolute_paths(new)


if __name__ == "__main__":
    sys.exit(guarded(main))
