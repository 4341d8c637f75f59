"""Says in which folder an exported run goes on: only the newest of its homes may write to the run's exports.

A run has one home, the folder in which it trains. The first export claims the number 1 for that folder; whoever
continues the run from its exports elsewhere claims the next number, by creating an object that must not exist yet.
From then on the folders before are refused, as earlier starts of a run are in one folder (`cmscale.runs.generations`).
"""

import contextlib
import datetime
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmscale.errors import UserError
from cmscale.io.json_text import parse_json
from cmscale.io.local import LocalStorage
from cmscale.io.process import node_name
from cmscale.io.protocol import Storage
from cmscale.runs.folder import RunDir, exported_home


class WentElsewhere(UserError):
    """Raised in a folder of a run that was continued in another one."""


@dataclass(frozen=True)
class Home:
    """A folder in which an exported run trained.

    Attributes:
        token: What `home.json` in that folder says; no two folders have the same.
        step: That of the checkpoint with which the run went on there.
    """

    number: int
    token: str
    host: str
    folder: str
    step: int
    time: str

    def __str__(self) -> str:
        return f"{self.folder} on {self.host} (from step {self.step}, {self.time})"


def token_of(run: RunDir, *, make: bool = True) -> str:
    """What tells a run's folder apart from all others; empty if it has no such token yet and none is made.

    Raises:
        UserError: the file is damaged.
    """
    storage, name = LocalStorage(run.root), run.home.name
    if make and storage.read_if_present(name) is None:
        storage.write_if_absent(name, json.dumps({"home": secrets.token_hex(16)}).encode())
    raw = storage.read_if_present(name)
    if raw is None:
        return ""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(parse_json(raw)["home"])
    raise UserError(f"{run.home}: damaged; delete it if this folder alone continues the run")


def homes(exported: Storage) -> list[Home]:
    """The homes of an exported run, oldest first; none if a release before this one exported it."""
    return [home for home in _records(exported) if home is not None]


def _records(exported: Storage) -> list[Home | None]:
    """Every record, by number; None for one that can't be read."""
    found: list[Home | None] = []
    while (raw := exported.read_if_present(exported_home(len(found) + 1))) is not None:
        try:
            found.append(Home(**parse_json(raw)))
        except (ValueError, TypeError):
            found.append(None)
    return found


def claim(exported: Storage, run: RunDir, *, step: int, token: str | None = None) -> Home:
    """Makes a run's folder the newest home of its exports.

    Args:
        step: With which the run goes on there.
    """
    record: dict[str, Any] = {
        "token": token or token_of(run),
        "host": node_name(),
        "folder": str(run.root),
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    number = len(_records(exported)) + 1
    while True:
        home = Home(number=number, **record)
        if exported.write_if_absent(exported_home(number), json.dumps(vars(home), indent=1).encode()):
            return home
        number += 1


def must_be_home(exported: Storage, run: RunDir, *, step: int = 0, token: str | None = None) -> int:
    """The number of a run's folder, which is the newest home of its exports; if there is none, it becomes that.

    Args:
        token: That of the folder, if it is known; the folder itself may have been lost since.

    Raises:
        WentElsewhere: the run was continued in another folder, or this one is a copy of its folder.
    """
    token, known = token or token_of(run), homes(exported)
    if not known:
        claim(exported, run, step=step, token=token)
        known = homes(exported)
    if not known:
        return 0  # none of the records can be read
    if known[-1].token != token:
        raise WentElsewhere(
            f"{exported.url}: the run goes on elsewhere, in {known[-1]}; to bring it back here: "
            f"submit.py --resume {exported.url} --runs-dir {run.root.parent}"
        )
    _refuse_copy(exported, run, known[-1])
    return known[-1].number


def _refuse_copy(exported: Storage, run: RunDir, home: Home) -> None:
    """Raises WentElsewhere if a home's folder is still there and is another one: both would export to one place.

    A folder that was moved is its home; it is gone from where it was.
    """
    first, is_other = RunDir(Path(home.folder)), False
    with contextlib.suppress(OSError, UserError):
        is_other = token_of(first, make=False) == home.token and not first.root.samefile(run.root)
    if is_other:
        raise WentElsewhere(
            f"{exported.url}: belongs to {first.root}, of which {run.root} is a copy; give the copy another name or "
            "checkpoint.export_to, or go on there"
        )
