"""Records in a run's provenance.json who started it, from where, and with which code and packages."""

import datetime
import getpass
import importlib.metadata
import os
import re
import socket
import sys
import tomllib
from pathlib import Path
from typing import Any

from cmscale.io.process import CHECKOUT, node_name
from cmscale.runs.folder import RunDir
from cmscale.runs.lineage import BRANCH, Lineage
from cmscale.runs.snapshot import CHANGES, Code
from cmscale.runs.starts import change_record, read_starts


def record_start(run: RunDir, code: Code, folder: Path, *, lineage: Lineage | None = None, **more: Any) -> None:
    """Adds a start to provenance.json: the code, package versions, host, command line.

    Args:
        folder: Where the start's code is.
        lineage: Where the run branched off, for the first start of a branch.
        more: Facts of this kind of start.
    """
    inside = folder.is_relative_to(run.root)
    start = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **more,
        "command": [sys.executable, *sys.argv],
        "folder": str(Path.cwd()),
        "host": socket.gethostname(),
        "node": node_name(),
        "user": _user(),
        "python": sys.version.split()[0],
        **code.origin,
        "code": str(folder.relative_to(run.root) if inside else folder),
        "diff": str((folder / CHANGES).relative_to(run.root)) if inside and code.diff else None,
        "packages": package_versions(),
    }
    branch = {} if lineage is None else {BRANCH: lineage.model_dump(mode="json")}
    change_record(run, lambda document: document | branch | {"starts": [*document.get("starts", ()), start]})


def newest_code(run: RunDir) -> str | None:
    """The code of the newest start, as `record_start` names it; None if it is not known."""
    return next((start["code"] for start in reversed(read_starts(run)) if "code" in start), None)


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that cmscale requires."""
    project = CHECKOUT / "pyproject.toml"
    if project.is_file():
        named = tomllib.loads(project.read_text())["project"]["dependencies"]
    else:
        named = _required()
    versions = {}
    for requirement in named:
        name = re.split(r"[^A-Za-z0-9._-]", requirement)[0]
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _required() -> list[str]:
    """The requirements of the installed cmscale."""
    try:
        return importlib.metadata.requires("cmscale") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
