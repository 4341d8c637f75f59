"""Evaluates a model on all ranks, on Slurm or here: `evaluate.py [flags] SOURCE [key=value ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for a run from any folder

if __name__ == "__main__":
    from cmscale.commands.ending import end_early_interrupts

    end_early_interrupts()

import argparse

from cmscale.commands import situation
from cmscale.commands.ending import leave
from cmscale.commands.parser import CommandParser
from cmscale.commands.use import Given
from cmscale.config import Config, leaves, read_config
from cmscale.config.requests import EvaluateRequest
from cmscale.config.site import LaunchSettings, is_launch_key, read_launch_settings, site_layers
from cmscale.errors import UserError
from cmscale.io.durable import explained
from cmscale.io.place import Place
from cmscale.runs.choices import check_request
from cmscale.runs.folder import RunDir
from cmscale.runs.snapshot import read_code, take_snapshot
from cmscale.runs.source_kind import kind_of_source
from launchers.checks import check_evaluation, check_source
from launchers.clusters import CLUSTERS
from launchers.command_line import add_cluster_flags, as_table, describe_placement, guarded, runs_dir
from launchers.jobs import EVALUATE, JobSpec
from launchers.request_flags import add_request_flags, read_request
from launchers.run_folders import new_run, run_named
from launchers.where import decide_where, describe_origins


def main(arguments: list[str]) -> int:
    """Submits or runs the evaluation. Returns its exit status, 0 once submitted. Raises UserError."""
    flags, given = command_parser().read(arguments)
    launch = [override for override in flags.overrides if is_launch_key(override)]
    flags.overrides = [override for override in flags.overrides if not is_launch_key(override)]
    origins: dict[str, str] = {}
    config, run = where(flags, given, launch, origins)
    device = flags.device or (config.engine.device if config else "auto")
    if config is None:
        settings = read_launch_settings(launch, origins)
    else:
        settings = LaunchSettings(slurm=config.slurm, restart=config.restart)
    placed = decide_where(flags, given, settings, origins, device=device, device_option="--device ")
    placement = placed.placement
    request = read_request(flags, given, EvaluateRequest, device=device, run_dir=str(run.root.absolute()))
    if config is not None:
        request.settings(config.evaluate)
        request.check_fits(config)
    request.refuse_several_in_one_file()
    asked = request.model_dump(mode="json", exclude_unset=True)
    rows = {name: str(value) for name, value in asked.items() if value not in (None, [], False)}
    print(as_table({**describe_placement(placement), **rows}), flush=True)
    code, cluster = read_code(), CLUSTERS[placement.cluster]
    job = JobSpec(EVALUATE, (asked,), run, placement, code=run.code / code.name)
    if flags.dry_run:
        values = {key: value for key, value, _ in leaves(settings)}
        file = flags.config or (str(run.config) if config else "")
        print("\n" + describe_origins(placed, origins, values, file=file))
        if preview := cluster.preview(job):
            print("\n" + preview)
        return 0
    check_source(flags.source, key="SOURCE")
    check_request(request)
    check_evaluation(config, asked=asked)
    with explained(run.root):
        run.logs.mkdir(parents=True, exist_ok=True)
    take_snapshot(code, run.code)
    status = cluster.run(job, wait=flags.wait)
    print(f"run: {run.root}", flush=True)
    return status


def command_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="evaluate.py", description=__doc__)
    add_cluster_flags(parser)
    add_request_flags(parser, EvaluateRequest)
    return parser


def where(
    flags: argparse.Namespace, given: Given, launch: list[str], origins: dict[str, str]
) -> tuple[Config | None, RunDir]:
    """The config of SOURCE (None if it is inside an exported file), and the run in whose folder the job works.

    Args:
        launch: Overrides that say how the job is launched; allowed for every SOURCE.
        origins: Gets the origin of each value that is no default, by dotted key.

    Raises:
        UserError: SOURCE is none, or is finished samples; or an option is given that has no effect on it.
    """
    kind = None if flags.source.is_remote else kind_of_source(flags.source)  # of a URL only the job reads
    if kind == situation.SAMPLES:
        raise UserError(f"{flags.source}: finished samples need no cluster; measure them with cmscale evaluate")
    root = _root_of_run(flags.source, kind)
    known = {} if kind is None else {"source": kind}
    if flags.overrides:
        known["overriding"] = situation.overriding(flags.config, flags.overrides)
    given.refuse_unused(**known, run=situation.NEW_RUN if root is None else run_named(root, runs_dir(flags)))
    if root is not None:
        config = read_config(root / "config.yaml", launch, resolved=True, origins=origins)
        return _for_evaluation(config, launch), RunDir(root.absolute())
    stem = flags.source.rstrip("/").rpartition("/")[2].partition(".")[0] or "source"
    run = new_run(name=flags.name, runs_dir=runs_dir(flags), stem=f"evaluate-{stem}")
    if not flags.config:
        if kind in (situation.OPENAI, situation.NVLABS, situation.BARE):
            raise UserError(f"{flags.source}: holds weights without a config; give --config CONFIG [key=value ...]")
        return None, run
    return read_config(flags.config, [*flags.overrides, *launch], beneath=site_layers(), origins=origins), run


def _for_evaluation(config: Config, launch: list[str]) -> Config:
    """A run's config without what was said about the job of its training alone, unless it is said again."""
    said = {override.partition("=")[0] for override in launch}
    alone = [key for key in ("nodes", "nodelist", "dependency") if f"slurm.{key}" not in said]
    return config.model_copy(update={"slurm": config.slurm.model_copy(update=dict.fromkeys(alone))})


def _root_of_run(source: Place, kind: str | None) -> Path | None:
    """The folder of the run that SOURCE is or belongs to; None if it belongs to none."""
    path = Path(source).absolute()
    root = path if kind == situation.RUN else path.parent.parent
    inside = kind == situation.RUN or (kind == situation.CHECKPOINT and path.parent.name == "checkpoints")
    return root if inside and (root / "config.yaml").is_file() else None


if __name__ == "__main__":
    leave(guarded(main))
