"""Copies the program's code into a folder, so that every start of a job runs what was submitted."""

import hashlib
import importlib.util
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmscale.errors import UserError
from cmscale.io.durable import explained, replace_durably, sync_folder
from cmscale.io.json_text import parse_json
from cmscale.io.process import CHECKOUT
from cmscale.io.reading import read_regular

ORIGIN = "origin.json"
"""In a copy: where the code came from, as `Code.origin` has it."""
CHANGES = "changes.diff"
"""In a copy: how its tracked files differ from their revision."""

_PACKAGES = ("cmscale", "launchers", "data_prep")
_FILES = ("pyproject.toml",)
_LARGEST = 64 * 2**20  # bytes; the code itself has one


@dataclass(frozen=True)
class Code:
    """The code of the program at one moment.

    Attributes:
        files: Contents by path relative to the checkout.
        revision: The commit, with `-dirty` if files differ from it; None if the code is in no git checkout.
        diff: `git diff` of the tracked files.
        untracked: Files that git does not know.
    """

    checkout: Path
    files: dict[str, bytes] = field(repr=False)
    revision: str | None
    diff: str = field(repr=False)
    untracked: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of all names and contents."""
        digest = hashlib.sha256()
        for name, data in sorted(self.files.items()):
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
        return digest.hexdigest()

    @property
    def name(self) -> str:
        """Differs for other contents and for other revisions."""
        return f"{(self.revision or 'no-git')[:8]}-{self.sha256[:12]}"

    @property
    def origin(self) -> dict[str, Any]:
        """What provenance records about the code, without its diff."""
        return {"git": self.revision, "sha256": self.sha256, "untracked": list(self.untracked)}


def read_code(checkout: Path = CHECKOUT) -> Code:
    """The code in a checkout, in an unpacked archive, in site-packages, or in a copy that `take_snapshot` made.

    Raises:
        UserError: a file can't be read, or the packages hold much more than code.
    """
    files = {}
    with explained(checkout):
        for path in _paths(checkout):
            files[path.relative_to(checkout).as_posix()] = path.read_bytes()
    try:
        origin = parse_json(read_regular(checkout / ORIGIN))
        changes = (checkout / CHANGES).read_text()
        code = Code(checkout, files, origin["git"], changes, tuple(origin["untracked"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Code(checkout, files, *_ask_git(checkout, files))
    if code.sha256 == origin["sha256"]:
        return code
    return Code(checkout, files, f"{code.revision or 'no-git'}-edited", code.diff, code.untracked)


def _paths(checkout: Path) -> Iterator[Path]:
    """The files of the packages but caches and hidden ones; of folders that are linked twice, the first."""
    total, seen = 0, set()
    for package in _PACKAGES:
        for folder, names, files in os.walk(checkout / package, followlinks=True):
            names[:] = sorted(name for name in names if name != "__pycache__" and not name.startswith("."))
            if (real := os.path.realpath(folder)) in seen:
                names.clear()
                continue
            seen.add(real)
            for path in (Path(folder, name) for name in sorted(files)):
                if path.name.startswith(".") or path.suffix == ".pyc" or not path.is_file():
                    continue
                total += path.stat().st_size
                if total > _LARGEST:
                    raise UserError(
                        f"{path}: the packages hold more than {_LARGEST >> 20} MiB, which every run would copy; "
                        "move what is no code out of them"
                    )
                yield path
    yield from (checkout / name for name in _FILES if (checkout / name).is_file())


def take_snapshot(code: Code, parent: Path) -> Path:
    """Copies code to `parent / code.name`; a copy that is there already is used. Returns its folder.

    Raises:
        UserError: the folder can't be written, or the copy there was changed.
    """
    folder = parent / code.name
    if folder.exists():
        if read_code(folder).sha256 != code.sha256:
            raise UserError(f"{folder}: was changed since the code was copied there; delete it, and submit again")
        return folder
    staged = parent / f".{code.name}.{secrets.token_hex(4)}"
    with explained(staged):
        try:
            for name, data in code.files.items():
                path = staged / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                _take_bytecode(code.checkout / name, path)
            (staged / CHANGES).write_text(code.diff)
            replace_durably(staged / ORIGIN, (json.dumps(code.origin, indent=1) + "\n").encode())
            staged.rename(folder)
            sync_folder(parent)
        except OSError:
            if not folder.exists():  # another submission was faster
                raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return folder


def _take_bytecode(source: Path, copy: Path) -> None:
    """Gives a copied module the compiled form of its source if that is up to date, which saves each rank a second."""
    if source.suffix != ".py":
        return
    try:
        compiled = Path(importlib.util.cache_from_source(str(source)))
        data, stat = compiled.read_bytes(), source.stat()
    except (OSError, NotImplementedError):
        return
    expected = int(stat.st_mtime) & 0xFFFFFFFF, stat.st_size & 0xFFFFFFFF
    recorded = int.from_bytes(data[8:12], "little"), int.from_bytes(data[12:16], "little")
    if data[4:8] == bytes(4) and recorded == expected == (recorded[0], copy.stat().st_size):
        os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        target = Path(importlib.util.cache_from_source(str(copy)))
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(data)


def _ask_git(checkout: Path, files: Collection[str]) -> tuple[str | None, str, tuple[str, ...]]:
    """Revision, diff and the untracked of `files`; None and nothing where the code is no git checkout of its own."""
    if shutil.which("git") is None or _git(checkout, "ls-files", "--error-unmatch", "cmscale/errors.py") is None:
        return None, "", ()  # also in site-packages inside of another project's checkout
    revision = _git(checkout, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    if revision is None:
        return None, "", ()
    places = ["--", *_PACKAGES, *_FILES]
    listed = _git(checkout, "ls-files", "-z", "--others", "--exclude-standard", *places) or ""
    untracked = tuple(sorted(set(listed.split("\0")) & set(files)))
    revision = revision.strip()
    if untracked and not revision.endswith("-dirty"):
        revision += "-dirty"
    diff = _git(checkout, "diff", "HEAD", "--no-color", "--no-ext-diff", "--binary", *places) or ""
    return revision, diff, untracked


def _git(checkout: Path, *arguments: str) -> str | None:
    """What a git command prints; None if it fails. Whose checkout it is does not matter, and nothing is written."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-c", "safe.directory=*", "-C", str(checkout), *arguments]
    ran = subprocess.run(
        command, capture_output=True, check=False, env={**environment, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    )
    return None if ran.returncode else ran.stdout.decode(errors="replace")
