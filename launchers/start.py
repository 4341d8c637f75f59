"""Owns how a run begins on disk and how its job is handed to a cluster; what both launchers share."""

import datetime
import getpass
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cmscale.config import Config, dump_config
from cmscale.errors import UserError
from cmscale.io.storage import explained, replace_durably
from cmscale.runs.folder import RunDir
from launchers.checks import is_remote
from launchers.local import CHECKOUT, refuse_second_launcher, run_local
from launchers.plan import Plan
from launchers.slurm import refuse_running_job, run_slurm

_PATHS = (
    "data.path",
    "data.cache_dir",
    "method.teacher",
    "method.lpips_weights",
    "checkpoint.export_to",
    "evaluate.inception_weights",
    "evaluate.dinov2_weights",
    "evaluate.reference",
)


def guarded(main: Callable[[list[str]], int]) -> int:
    """Runs a command: a user's mistake is one line and status 2, a failing storage one line and status 1."""
    try:
        return main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, subprocess.SubprocessError) as error:
        print(f"fault: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def run_of(*, name: str | None, runs_dir: Path, stem: str) -> RunDir:
    """The folder that a new run gets: absolute, named after its config and the time unless named by hand.

    Raises:
        UserError: a name that is no plain name.
    """
    name = name or f"{stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise UserError(f"--name {name!r}: letters, digits, dot, dash, underscore and plus only")
    return RunDir(runs_dir.expanduser().absolute() / name)


def existing_run(text: str, *, runs_dir: Path) -> RunDir:
    """The run that `--resume` names: a folder, or a name under `--runs-dir`.

    Raises:
        UserError: no such run.
    """
    for root in (Path(text).expanduser(), runs_dir.expanduser() / text):
        if (root / "config.yaml").is_file():
            return RunDir(root.absolute())
    raise UserError(f"--resume {text}: no run there (no config.yaml), nor in {runs_dir}")


def with_absolute_paths(config: Config) -> Config:
    """The config with local paths made absolute: a resume from elsewhere must find the same files."""
    for key in _PATHS:
        section, leaf = key.split(".")
        value = getattr(getattr(config, section), leaf, None)
        if value and not is_remote(value):
            changed = _with(getattr(config, section), leaf, str(Path(value).expanduser().absolute()))
            config = _with(config, section, changed)
    return config


def _with(model: Any, name: str, value: str | BaseModel) -> Any:
    return model.model_copy(update={name: value})


def create_run(run: RunDir, config: Config) -> None:
    """Makes the folder with config.yaml and provenance.json, or nothing.

    Raises:
        UserError: there is such a run already, or the folder can't be written.
    """
    if run.root.exists():
        raise UserError(f"run {run.root} exists; continue it with --resume {run.name}, or give another --name")
    with explained(run.root):
        run.root.mkdir(parents=True)
    try:
        with explained(run.root):
            run.logs.mkdir()
        replace_durably(run.config, dump_config(config).encode())
        write_provenance(run)
    except BaseException:
        shutil.rmtree(run.root, ignore_errors=True)
        raise


def write_provenance(run: RunDir) -> None:
    """Adds this start to provenance.json: packages, git revision, host, command line."""
    old = json.loads(run.provenance.read_text())["starts"] if run.provenance.exists() else []
    start = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv],
        "folder": str(Path.cwd()),
        "host": socket.gethostname(),
        "user": _user(),
        "python": sys.version.split()[0],
        "git": git_revision(),
        "packages": package_versions(),
    }
    document = json.dumps({"starts": [*old, start]}, indent=1) + "\n"
    replace_durably(run.provenance, document.encode())


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def git_revision() -> str | None:
    """The checkout's commit, with `-dirty` where tracked files differ from it."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def package_versions() -> dict[str, str]:
    """Versions of the packages that pyproject.toml names and are installed."""
    import tomllib

    named = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"]
    versions = {}
    for requirement in named:
        name = re.split(r"[^A-Za-z0-9._-]", requirement)[0]
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def launch(worker: str, args: tuple, *, run: RunDir, plan: Plan, wait: bool) -> int:
    """Hands the job to the cluster, and waits if asked to, or on this machine. Returns the exit status."""
    submission = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    if plan.cluster == "slurm":
        return run_slurm(worker, args, run=run, plan=plan, submission=submission, wait=wait)
    return run_local(worker, args, run=run, plan=plan, submission=submission)


def refuse_if_running(run: RunDir, worker: str) -> None:
    """Raises UserError where a launcher or a Slurm job of this worker is still at work on a run."""
    refuse_second_launcher(run)
    refuse_running_job(run, worker)
