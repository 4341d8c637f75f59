"""Copies one checkpoint to another storage: data first, read back and compared, the manifest last.

The files of a copy have their hash in their name, and the manifest there lists them so. Whatever an older start of the
run still uploads, it replaces nothing that a manifest lists. Copies of earlier releases have files without hashes.

A run that went elsewhere commits no copy any more: its folder looks for a newer home after the files, just before the
manifest. What comes in between is replaced by the newer home's own copy, as a copy names the home that made it.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

from cmscale.engine.checkpoint_reader import read_manifest
from cmscale.errors import UserError
from cmscale.io.fetch import file_sha256
from cmscale.io.local import LocalStorage
from cmscale.io.protocol import ArrivedChanged
from cmscale.io.storage import Storage, local_copy
from cmscale.runs.checkpoint_copy import same_contents
from cmscale.runs.folder import CHECKPOINT_MANIFEST, copied_file
from cmscale.runs.manifests import CheckpointManifest, FileEntry, read_checkpoint_manifest

TRIES = 3  # uploads of one file before its checkpoint waits for the next round


class DamagedUpload(RuntimeError):
    """Raised if what was read back is not what was uploaded."""


class DamagedHere(UserError):
    """Raised for a checkpoint that can't be copied because it is damaged in the run's folder."""


def export_checkpoint(folder: Path, target: Storage, *, home: Callable[[], int] = lambda: 0) -> bool:
    """Copies a complete local checkpoint to `target`. Returns whether `target` now holds this checkpoint.

    A target that has a manifest already is not changed, unless a former home of the run made it.

    Args:
        home: The number of the run's home, which this folder must be (`must_be_home`); 0 if the run has none.

    Raises:
        WentElsewhere: the run was continued in another folder; no manifest was written.
        DamagedHere: the local checkpoint is not what was written.
        DamagedUpload: a file differed after `TRIES` uploads.
        UserError, ConnectionError, OSError: from the storage.
    """
    try:
        manifest = read_manifest(LocalStorage(folder))
    except UserError as error:
        raise DamagedHere(str(error)) from None
    copied = copy_manifest(manifest)
    present = target.read_if_present(CHECKPOINT_MANIFEST)
    if present is not None and same_contents(present, copied.to_bytes()):
        return True
    if present is not None and not _is_of_former_home(present, home()):
        return False
    there = {entry.key: entry.size for entry in target.list()}
    for part in manifest.parts:
        _upload_checked(folder / part.file.name, target, part.file, there.get(copied_name(part.file)))
    number = home()
    raw = copied.model_copy(update={"home": number}).to_bytes()
    if target.write_if_absent(CHECKPOINT_MANIFEST, raw):
        return True
    present = target.read_if_present(CHECKPOINT_MANIFEST)
    if present is not None and _is_of_former_home(present, number) and not same_contents(present, raw):
        target.write(CHECKPOINT_MANIFEST, raw)
        return True
    return present is not None and same_contents(present, raw)


def _is_of_former_home(raw: bytes, home: int) -> bool:
    """Whether a manifest was written by a home of the run before this one."""
    with contextlib.suppress(UserError):
        return 0 < read_checkpoint_manifest(raw, origin="manifest").home < home
    return False


def copied_name(entry: FileEntry) -> str:
    """The name of a checkpoint's file in a copy."""
    return copied_file(entry.name, entry.sha256)


def copy_manifest(manifest: CheckpointManifest) -> CheckpointManifest:
    """The manifest of a checkpoint's copy: the same with the names that the files have there."""
    parts = tuple(
        part.model_copy(update={"file": part.file.model_copy(update={"name": copied_name(part.file)})})
        for part in manifest.parts
    )
    return manifest.model_copy(update={"parts": parts})


def _upload_checked(path: Path, target: Storage, entry: FileEntry, present: int | None) -> None:
    """Uploads a file unless it is there already, as an earlier try may have left it.

    Args:
        present: The size of the object that has its name in `target`.
    """
    name = copied_name(entry)
    if present == entry.size and _is_there(target, name, entry):
        return
    if path.stat().st_size != entry.size or file_sha256(path) != entry.sha256:
        raise DamagedHere(f"{path}: its contents are not what was written (SHA-256 differs)")
    for _ in range(TRIES):
        target.upload(name, path)
        if _is_there(target, name, entry):
            return
        with contextlib.suppress(UserError, ConnectionError):  # deleting may not be allowed, and need not be
            target.delete(name)
    raise DamagedUpload(f"{target.join(name)}: came back changed, {TRIES} times")


def _is_there(target: Storage, name: str, entry: FileEntry) -> bool:
    with contextlib.suppress(ArrivedChanged, FileNotFoundError), local_copy(target, name) as copy:
        return copy.stat().st_size == entry.size and file_sha256(copy) == entry.sha256
    return False


def remove_copy(target: Storage) -> None:
    """Removes a copy: its manifest first, so that nobody takes the rest for a checkpoint.

    The files are those that are listed and those of the manifest: some stores list a file only a while after it came.
    """
    names = set()
    with contextlib.suppress(UserError):  # it may be damaged
        names = {part.file.name for part in read_manifest(target).parts}
    target.delete(CHECKPOINT_MANIFEST)
    target.delete_all(sorted(names | {entry.key for entry in target.list()}))
