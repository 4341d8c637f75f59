"""Copies a checkpoint from another run or storage into a local folder: every file is compared with its hash."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from cmscale.errors import UserError
from cmscale.io.durable import explained, replace_durably
from cmscale.io.fetch import file_sha256
from cmscale.io.protocol import Storage
from cmscale.runs.checkpoints import read_manifest
from cmscale.runs.folder import CHECKPOINT_MANIFEST, rank_file
from cmscale.runs.manifest_checks import manifest_problems
from cmscale.runs.manifests import CheckpointManifest, FileEntry

_AT_ONCE = 8  # files; one alone does not fill a parallel file system's or an object store's bandwidth


class NotIntact(UserError):
    """Raised if a checkpoint is not complete, or not what was written."""


def intact_manifest(source: Storage) -> CheckpointManifest:
    """The manifest of a checkpoint that agrees with itself.

    Raises:
        NotIntact: there is none, or it is damaged.
    """
    try:
        manifest = read_manifest(source)
    except UserError as error:
        raise NotIntact(str(error)) from None
    if problems := manifest_problems(manifest, origin=source.url):
        raise NotIntact(problems[0])
    return manifest


def copy_files(source: Storage, folder: Path, manifest: CheckpointManifest) -> CheckpointManifest:
    """Copies the files that a checkpoint's manifest lists. They get the names that they have in a run.

    Returns:
        The manifest with these names.

    Raises:
        NotIntact: a file is missing or differs from its hash.
        UserError: `folder` can't be written.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    names = [rank_file(rank, manifest.num_ranks) for rank in range(manifest.num_ranks)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        files = list(pool.map(partial(_copy, source, folder), (part.file for part in manifest.parts), names))
    parts = (part.model_copy(update={"file": file}) for part, file in zip(manifest.parts, files, strict=True))
    return manifest.model_copy(update={"parts": tuple(parts), "home": 0})


def copy_checkpoint(source: Storage, folder: Path) -> CheckpointManifest:
    """Copies a checkpoint, its manifest last.

    Raises:
        NotIntact: it is not complete, or not what was written.
        UserError: `folder` can't be written.
    """
    manifest = copy_files(source, folder, intact_manifest(source))
    replace_durably(folder / CHECKPOINT_MANIFEST, manifest.to_bytes())
    return manifest


def _copy(source: Storage, folder: Path, entry: FileEntry, name: str) -> FileEntry:
    path = folder / name
    try:
        source.download(entry.name, path)
    except FileNotFoundError:
        raise NotIntact(f"{source.join(entry.name)}: is missing") from None
    if path.stat().st_size != entry.size or file_sha256(path) != entry.sha256:
        raise NotIntact(f"{source.join(entry.name)}: its contents are not what was written (SHA-256 differs)")
    return entry.model_copy(update={"name": name})
