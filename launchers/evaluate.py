"""Evaluates a model on all ranks, on Slurm or here: `evaluate.py [flags] SOURCE [key=value ...]`."""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for a run from any folder

from cmscale.config import Config, leaves, read_config
from cmscale.config.requests import EvaluateRequest
from cmscale.config.site import LaunchSettings, is_launch_key, read_launch_settings, site_layers
from cmscale.errors import UserError
from cmscale.io.durable import explained
from cmscale.runs.folder import RunDir
from cmscale.runs.snapshot import read_code, take_snapshot
from launchers.checks import check_evaluation, check_source, is_remote
from launchers.clusters import CLUSTERS
from launchers.command_line import add_cluster_flags, as_table, describe_placement, guarded, runs_dir
from launchers.jobs import EVALUATE, JobSpec
from launchers.request_flags import add_request_flags, request_values
from launchers.run_folders import new_run
from launchers.where import decide_where, describe_origins


def main(arguments: list[str]) -> int:
    """Submits or runs the evaluation. Returns its exit status, 0 once submitted. Raises UserError."""
    flags = _parser().parse_intermixed_args(arguments)
    launch = [override for override in flags.overrides if is_launch_key(override)]
    flags.overrides = [override for override in flags.overrides if not is_launch_key(override)]
    origins: dict[str, str] = {}
    config, run = where(flags, launch, origins)
    device = flags.device or (config.engine.device if config else "auto")
    if config is None:
        settings = read_launch_settings(launch, origins)
    else:
        settings = LaunchSettings(slurm=config.slurm, restart=config.restart)
    placed = decide_where(flags, settings, origins, device=device)
    placement = placed.placement
    request = make_request(flags, device=device, run=run)
    rows = {name: str(value) for name, value in request.items() if value not in (None, [], False)}
    print(as_table({**describe_placement(placement), **rows}), flush=True)
    code, cluster = read_code(), CLUSTERS[placement.cluster]
    job = JobSpec(EVALUATE, (request,), run, placement, code=run.code / code.name)
    if flags.dry_run:
        values = {key: value for key, value, _ in leaves(settings)}
        file = flags.config or (str(run.config) if config else "")
        print("\n" + describe_origins(placed, origins, values, file=file))
        if preview := cluster.preview(job):
            print("\n" + preview)
        return 0
    check_source(flags.source, key="SOURCE")
    check_evaluation(config, asked=request)
    with explained(run.root):
        run.logs.mkdir(parents=True, exist_ok=True)
    take_snapshot(code, run.code)
    status = cluster.run(job, wait=flags.wait)
    print(f"run: {run.root}", flush=True)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__)
    add_cluster_flags(parser)
    add_request_flags(parser, EvaluateRequest)
    return parser


def where(flags: argparse.Namespace, launch: list[str], origins: dict[str, str]) -> tuple[Config | None, RunDir]:
    """The config of SOURCE (None if it is inside an exported file), and the run in whose folder the job works.

    Args:
        launch: Overrides that say how the job is launched; allowed for every SOURCE.
        origins: Gets the origin of each value that is no default, by dotted key.

    Raises:
        UserError: a name or config is given for a run, or overrides without a config.
    """
    source = Path(flags.source).expanduser()
    if not is_remote(flags.source):
        for root in (source, source.parent.parent):  # a run; RUN/checkpoints/step-…
            inside = root == source or source.parent.name == "checkpoints"
            if inside and (root / "config.yaml").is_file():
                for flag, value in (
                    ("--name", flags.name),
                    ("--config", flags.config),
                    ("key=value", flags.overrides),
                ):
                    if value:
                        raise UserError(
                            f"{flag} {value}: {flags.source} belongs to a run, which has its own; leave it out"
                        )
                config = read_config(root / "config.yaml", launch, resolved=True, origins=origins)
                return _for_evaluation(config, launch), RunDir(root.absolute())
    if flags.overrides and not flags.config:
        raise UserError(
            f"override {flags.overrides[0]!r}: {flags.source} has its own config; overrides go with --config"
        )
    stem = flags.source.rstrip("/").rpartition("/")[2].partition(".")[0] or "source"
    run = new_run(name=flags.name, runs_dir=runs_dir(flags), stem=f"evaluate-{stem}")
    if not flags.config:
        return None, run
    return read_config(flags.config, [*flags.overrides, *launch], beneath=site_layers(), origins=origins), run


def _for_evaluation(config: Config, launch: list[str]) -> Config:
    """A run's config without what was said about the job of its training alone, unless it is said again."""
    said = {override.partition("=")[0] for override in launch}
    alone = [key for key in ("nodes", "nodelist", "dependency") if f"slurm.{key}" not in said]
    return config.model_copy(update={"slurm": config.slurm.model_copy(update=dict.fromkeys(alone))})


def make_request(flags: argparse.Namespace, *, device: str, run: RunDir) -> dict[str, Any]:
    """The job's argument: the JSON of an `EvaluateRequest`."""
    values = request_values(flags, EvaluateRequest)
    request = EvaluateRequest.model_validate({**values, "device": device, "run_dir": str(run.root.absolute())})
    return request.model_dump(mode="json")


if __name__ == "__main__":
    sys.exit(guarded(main))
