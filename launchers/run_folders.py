"""Creates and finds folders of runs, and holds the lock of a run's launcher."""

import contextlib
import datetime
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cmscale.commands import situation
from cmscale.config import Config, dump_config
from cmscale.config.section import plain_text
from cmscale.errors import UserError
from cmscale.io.durable import explained, replace_durably, sync_folder
from cmscale.io.locks import hold
from cmscale.io.place import Place
from cmscale.io.slurm import MaybeTaken, Refused
from cmscale.runs.folder import RunDir
from cmscale.runs.snapshot import Code, take_snapshot
from launchers.clusters import CLUSTERS
from launchers.heartbeat import beating, sign_from_elsewhere
from launchers.provenance import record_start
from launchers.submission import submissions_of

_PATHS = (
    "data.path",
    "data.cache_dir",
    "method.teacher",
    "method.lpips_weights",
    "train.init_from",
    "train.consistency_error_data",
    "checkpoint.export_to",
    "evaluate.features_weights",
    "evaluate.inception_weights",
    "evaluate.dinov2_weights",
    "evaluate.reference",
    "storage.ca_bundle",
    "prometheus.folder",
)
_LOCAL = {
    "data.cache_dir": "the cache of a node",
    "storage.ca_bundle": "a file of certificates",
    "prometheus.folder": "the collector's folder",
}


def new_run(*, name: str | None, runs_dir: Place, stem: str) -> RunDir:
    """The absolute path of a run's folder. Nothing is created.

    Args:
        name: The run's name; None for `stem` and the time.

    Raises:
        UserError: the name has characters that file names should not have.
    """
    name = name or f"{stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise UserError(f"--name {name!r}: letters, digits, dot, dash, underscore and plus only")
    folder = runs_dir.local("the folder of runs")
    folder = _plain(folder, flag="--runs-dir").absolute()
    if ":" in str(folder):
        raise UserError(f"--runs-dir: {folder}: Python finds no code below a folder with a colon; take another one")
    return RunDir(folder / name)


def _plain(path: Path, *, flag: str) -> Path:
    """A path that may stand in a batch script."""
    try:
        plain_text(str(path))
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from None
    return path


def existing_run(text: str, *, runs_dir: Place) -> RunDir:
    """The run that `--resume` names: a folder, or a name in `--runs-dir`.

    Raises:
        UserError: no such run.
    """
    _plain(Path(text), flag="--resume")
    folder = runs_dir.local("the folder of runs")
    for root in (Place(text).local("a run that is resumed"), folder / text):
        if (root / "config.yaml").is_file():
            return RunDir(root.absolute())
    raise UserError(f"--resume {text}: no run there (no config.yaml), nor in {runs_dir}")


def with_absolute_paths(config: Config) -> Config:
    """The config with absolute local paths, so that a resume from another folder finds the same files.

    Raises:
        UserError: a value is no path or URL that can be opened.
    """
    for key in _PATHS:
        section, leaf = key.split(".")
        value = getattr(getattr(config, section), leaf, None)
        if value:
            changed = _with(getattr(config, section), leaf, str(_absolute(value, key=key)))
            config = _with(config, section, changed)
    return config


def _absolute(value: str, *, key: str) -> Place:
    try:
        place = Place(value)
        if what := _LOCAL.get(key):
            place.local(what)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    return place.absolute()


def run_named(root: Path, runs_dir: Place) -> str:
    """How a run is named beside --runs-dir: see `cmscale.commands.situation`."""
    is_there = root.resolve().parent == runs_dir.local("the folder of runs").resolve()
    return situation.RUN_IN_RUNS_DIR if is_there else situation.RUN_ELSEWHERE


def _with(model: Any, name: str, value: str | BaseModel) -> Any:
    return model.model_copy(update={name: value})


def create_run(run: RunDir, config: Config, code: Code) -> None:
    """Creates the folder with config.yaml, provenance.json and a copy of the code, whole or not at all.

    Raises:
        UserError: the folder exists already, or cannot be written.
    """
    _refuse_existing(run)
    staged = RunDir(run.root.with_name(f".{run.name}.unfinished-{secrets.token_hex(4)}"))
    try:
        with explained(run.root):
            staged.logs.mkdir(parents=True)
        record_start(staged, code, take_snapshot(code, staged.code))
        replace_durably(staged.config, dump_config(config).encode())
        _give_name(staged, run)
    except BaseException:
        shutil.rmtree(staged.root, ignore_errors=True)
        raise


@contextlib.contextmanager
def staged_run(run: RunDir) -> Iterator[RunDir]:
    """Makes the folder of a run that begins with a checkpoint, whole or not at all.

    The block fills a hidden folder, which then gets the run's name: a run that lost its checkpoint would start anew.

    Raises:
        UserError: the folder exists already, another command is making it, or it can't be written.
    """
    _refuse_existing(run)
    staged = RunDir(run.root.with_name(f".{run.name}.unfinished"))
    lock = run.root.with_name(f".{run.name}.lock")
    with hold(lock, timeout=0, what=f"{run.root}: another command is making this run"):
        shutil.rmtree(staged.root, ignore_errors=True)  # of a command that was killed
        try:
            with explained(staged.root):
                staged.logs.mkdir(parents=True)
            yield staged
            _give_name(staged, run)
        except BaseException:
            shutil.rmtree(staged.root, ignore_errors=True)
            raise


def _give_name(staged: RunDir, run: RunDir) -> None:
    """Renames a folder that is whole. One that another command has made meanwhile is not replaced: it is not empty."""
    _refuse_existing(run)
    with explained(run.root):
        staged.root.rename(run.root)
        sync_folder(run.root.parent)


def _refuse_existing(run: RunDir) -> None:
    if run.config.exists():
        raise UserError(f"run {run.root} exists; continue it with --resume {run.name}, or give another --name")
    if run.root.exists():
        raise UserError(f"{run.root} exists and is no run (no config.yaml); move it away, or give another --name")


@contextlib.contextmanager
def removed_if_refused(run: RunDir, submission: str, *, is_new: bool) -> Iterator[None]:
    """Removes the folder of a new run whose job is refused in the block: the corrected command finds no such run.

    One in which anything was started or submitted stays, and so does one whose job Slurm may have taken.

    Args:
        submission: Its name, which the folder may hold.
    """
    try:
        yield
    except MaybeTaken:
        raise
    except Refused:
        others = any(each.name != submission for each in submissions_of(run))
        if is_new and not (others or run.events.exists() or run.generations.exists()):
            shutil.rmtree(run.root, ignore_errors=True)
        raise


@contextlib.contextmanager
def only_launcher(run: RunDir, worker: str, *, take_over: bool = False) -> Iterator[None]:
    """Reserves a run for this launcher during the block.

    Args:
        take_over: Go on although jobs or launchers on other machines may be alive: they end when they meet this start.

    Raises:
        UserError: another launcher is running the run, or a job of this worker that was submitted earlier is.
    """
    with hold(run.logs / ".launcher.lock", timeout=0, what=f"{run.root}: another launcher is running this run"):
        if not take_over:
            if sign := sign_from_elsewhere(run):
                raise UserError(
                    f"{run.root}: another launcher is running this run: process {sign.process} on host {sign.host}, "
                    f"alive {sign.age_seconds:.0f} s ago; end it there, or add --take-over"
                )
            for cluster in CLUSTERS.values():
                cluster.refuse_if_running(run, worker)
        with beating(run):
            yield
