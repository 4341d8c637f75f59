"""Finds out what a job of `submit.py` starts from: a config, a run, its exports, or a checkpoint of another run."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cmscale.commands import situation
from cmscale.commands.use import Given
from cmscale.config import Config, differences, parse_config, read_config, trajectory
from cmscale.config.files import read_yaml_text
from cmscale.config.site import site_layers
from cmscale.errors import UserError
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.folder import RunDir
from cmscale.runs.manifests import DatasetManifest
from cmscale.runs.snapshot import Code
from launchers.branch import branch_config, find_parent, make_branch
from launchers.command_line import runs_dir
from launchers.elsewhere import Exports, bring_back, find_exports, is_home, make_continuation
from launchers.run_folders import create_run, existing_run, new_run, run_named, with_absolute_paths
from launchers.where import Recorded, read_recorded


@dataclass(frozen=True)
class Beginning:
    """What a job starts from: a run that is new, a branch, there already, or continued from its exports.

    Attributes:
        origin: Where the config comes from, for messages.
        recorded: Where the run, or the parent of a branch, ran last; None if that is not known.
        make: Makes the run's folder; None if it is there.
        bring_back: Brings newer checkpoints into a folder that is there; None if it has the newest.
        begins: Whether training starts at step 0, not with a checkpoint.
        exports: The place from which the run is continued.
        exported_step: The newest step there.
    """

    run: RunDir
    config: Config
    origin: str
    recorded: Recorded | None = None
    make: Callable[[Config, Code, DatasetManifest], None] | None = None
    bring_back: Callable[[Config, Code], None] | None = None
    begins: bool = False
    exports: str | None = None
    exported_step: int = -1

    @property
    def is_there(self) -> bool:
        """Whether the run's folder here has its newest checkpoint."""
        return self.make is None and self.bring_back is None

    def exports_anew(self, config: Config) -> bool:
        """Whether nothing of this run can be in `checkpoint.export_to` yet."""
        if self.exports is not None:
            return config.checkpoint.export_to != self.exports
        return not self.is_there


def beginning(flags: argparse.Namespace, given: Given, origins: dict[str, str]) -> Beginning:
    """What the flags name, with the config that it trains with.

    Args:
        origins: Gets the origin of each value that is no default, by dotted key.
    """
    file, overrides = split_items(flags.items)
    if flags.branch:
        if file is not None:
            raise UserError(f"{file}: has no effect beside --branch, which takes the config of RUN; give key=value")
        return _branch(flags, given, overrides, origins)
    if flags.resume:
        exports = find_exports(flags.resume, runs_dir=runs_dir(flags))
        if exports is not None:
            given.refuse_unused(run=situation.EXPORTED_RUN)
        if exports is None or is_home(exports):
            run = existing_run(flags.resume, runs_dir=runs_dir(flags)) if exports is None else exports.run
            if exports is None:
                given.refuse_unused(run=run_named(run.root, runs_dir(flags)))
            config = resumed_config(run, file, overrides, origins)
            begins = not committed_steps(run)
            return Beginning(run, config, file or str(run.config), read_recorded(run), begins=begins)
        return _from_exports(exports, file, overrides, origins)
    if file is None:
        raise UserError("no config given: submit.py [flags] CONFIG [key=value ...]")
    run = new_run(name=flags.name, runs_dir=runs_dir(flags), stem=Path(file).stem)
    config = with_absolute_paths(read_config(file, overrides, beneath=site_layers(), origins=origins))
    return Beginning(run, config, file, begins=True, make=lambda config, code, _: create_run(run, config, code))


def _branch(flags: argparse.Namespace, given: Given, overrides: list[str], origins: dict[str, str]) -> Beginning:
    parent = find_parent(flags.branch, runs_dir=runs_dir(flags))
    given.refuse_unused(run=situation.NEW_RUN)
    run = new_run(name=flags.name, runs_dir=runs_dir(flags), stem=parent.name)
    config = branch_config(parent, overrides, origins)
    recorded = None if parent.run is None else read_recorded(parent.run)
    return Beginning(
        run,
        config,
        f"config of {parent.named}",
        recorded,
        make=lambda config, code, data: make_branch(run, config, code, parent=parent, data=data),
    )


def _from_exports(exports: Exports, file: str | None, overrides: list[str], origins: dict[str, str]) -> Beginning:
    """A run whose newest checkpoint is in its exports; it goes on exporting there unless an override says otherwise."""
    origin = f"config of {exports.storage.url}"
    if not any(override.startswith("checkpoint.export_to=") for override in overrides):
        overrides = [*overrides, f"checkpoint.export_to={exports.place}"]
    config = continued_config(exports.text, file, overrides, origins, named=str(exports.place), origin=origin)
    is_there = exports.run.root.exists()
    return Beginning(
        exports.run,
        config,
        file or origin,
        read_recorded(exports.run) if is_there else None,
        make=None if is_there else lambda config, code, _: make_continuation(exports, config, code),
        bring_back=(lambda config, code: bring_back(exports, config, code)) if is_there else None,
        exports=exports.place,
        exported_step=exports.steps[0],
    )


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
    text = read_yaml_text(run.config, what="config")
    return continued_config(text, file, overrides, origins, named=str(run.root), origin=str(run.config))


def continued_config(
    text: str, file: str | None, overrides: list[str], origins: dict[str, str] | None, *, named: str, origin: str
) -> Config:
    """As `resumed_config`, of a run whose config is `text`; `named` is what `--branch` finds it by."""
    old = parse_config(text, origin=origin, resolved=True)
    written_by_older_release = parse_config(text, origin=origin) != old  # its YAML lacks the same keys as the run's
    new = (
        read_config(file, overrides, resolved=written_by_older_release, beneath=site_layers(), origins=origins)
        if file
        else parse_config(text, overrides, origin=origin, resolved=True, origins=origins)
    )
    if changed := differences(trajectory(old), trajectory(new)):
        keep = ""
        if old.train.total_steps != new.train.total_steps and "schedule_steps" in type(new.method).model_fields:
            length = old.method.schedule_length(old.train.total_steps)
            keep = f"keep its schedules with method.schedule_steps={length}, or "
        raise UserError(
            f"--resume {named}: the config differs where losses would change: {'; '.join(changed)}; {keep}"
            f"go on in a new run: --branch {named} --name NEW"
        )
    return with_absolute_paths(new)
