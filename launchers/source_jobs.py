"""Places jobs that use a trained model: whose config and folder they take, what is launched."""

import argparse
from pathlib import Path

from cmscale.commands import situation
from cmscale.commands.use import Given
from cmscale.config import Config, leaves, read_config
from cmscale.config.site import LaunchSettings, is_launch_key, read_launch_settings, site_layers
from cmscale.config.source_request import SourceRequest
from cmscale.errors import UserError
from cmscale.io.durable import explained
from cmscale.io.place import Place
from cmscale.runs.folder import RunDir
from cmscale.runs.snapshot import read_code, take_snapshot
from cmscale.runs.source_kind import kind_of_source
from launchers.clusters import CLUSTERS
from launchers.command_line import as_table, describe_placement, runs_dir
from launchers.jobs import JobSpec
from launchers.placement import Device
from launchers.run_folders import new_run, removed_if_refused, run_named
from launchers.where import Where, decide_where, describe_origins


class SourceJob:
    """A job on a SOURCE, from its command line to its end.

    Attributes:
        config: The config of SOURCE; None if it is inside an exported file.
        run: The run in whose folder the job works.
        device: Where the job computes: auto, cpu or cuda.

    Raises:
        UserError: SOURCE is none, or an option is given that has no effect on it.
    """

    def __init__(self, flags: argparse.Namespace, given: Given, *, verb: str) -> None:
        launch = [override for override in flags.overrides if is_launch_key(override)]
        flags.overrides = [override for override in flags.overrides if not is_launch_key(override)]
        self._flags = flags
        self._origins: dict[str, str] = {}
        self.config, self.run = _where(flags, given, launch, self._origins, verb=verb)
        self.device: Device = flags.device or (self.config.engine.device if self.config else "auto")
        if self.config is None:
            self._settings = read_launch_settings(launch, self._origins)
        else:
            self._settings = LaunchSettings(slurm=self.config.slurm, restart=self.config.restart)
        self._placed: Where = decide_where(
            flags, given, self._settings, self._origins, device=self.device, device_option="--device "
        )

    def plan(self, worker: str, request: SourceRequest) -> JobSpec:
        """The job that does what is asked for. Nothing is created or printed: what is refused has no plan."""
        asked = request.model_dump(mode="json", exclude_unset=True)
        rows = {name: str(value) for name, value in asked.items() if value not in (None, [], False)}
        placement = self._placed.placement
        self._plan = as_table({**describe_placement(placement), **rows})
        self._code = read_code()
        code = self.run.code / self._code.name
        return JobSpec(worker, (asked,), self.run, placement, code=code, taken=self._print_plan)

    def _print_plan(self) -> None:
        print(self._plan, flush=True)

    def show(self, job: JobSpec) -> int:
        """Prints what `--dry-run` shows. Returns the exit status."""
        self._print_plan()
        values = {key: value for key, value, _ in leaves(self._settings)}
        file = self._flags.config or (str(self.run.config) if self.config else "")
        print("\n" + describe_origins(self._placed, self._origins, values, file=file))
        if preview := CLUSTERS[job.placement.cluster].preview(job):
            print("\n" + preview)
        return 0

    def start(self, job: JobSpec) -> int:
        """Submits or runs a job, and prints the plan as it is taken. Returns its exit status, 0 once submitted."""
        is_new = not self.run.root.exists()
        with explained(self.run.root):
            self.run.logs.mkdir(parents=True, exist_ok=True)
        take_snapshot(self._code, self.run.code)
        with removed_if_refused(self.run, job.submission, is_new=is_new):
            status = CLUSTERS[job.placement.cluster].run(job, wait=self._flags.wait)
        print(f"run: {self.run.root}", flush=True)
        return status


def _where(
    flags: argparse.Namespace, given: Given, launch: list[str], origins: dict[str, str], *, verb: str
) -> tuple[Config | None, RunDir]:
    """The config of SOURCE, and the run in whose folder the job works.

    Args:
        launch: Overrides that say how the job is launched; allowed for every SOURCE.
        origins: Gets the origin of each value that is no default, by dotted key.
        verb: What a new run's name begins with.
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
        return _without_nodes_of_training(config, launch), RunDir(root.absolute())
    stem = flags.source.rstrip("/").rpartition("/")[2].partition(".")[0] or "source"
    run = new_run(name=flags.name, runs_dir=runs_dir(flags), stem=f"{verb}-{stem}")
    if not flags.config:
        if kind in situation.WITHOUT_ANY_CONFIG:
            raise UserError(f"{flags.source}: holds weights without a config; give --config CONFIG [key=value ...]")
        return None, run
    return read_config(flags.config, [*flags.overrides, *launch], beneath=site_layers(), origins=origins), run


def _without_nodes_of_training(config: Config, launch: list[str]) -> Config:
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
