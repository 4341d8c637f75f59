"""Copies checkpoints and snapshots from another run or storage into a local folder: each file's hash is compared."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from cmscale.errors import UserError
from cmscale.io import traffic
from cmscale.io.durable import explained, replace_durably, sync_folder
from cmscale.io.fetch import file_sha256
from cmscale.io.local import LocalStorage
from cmscale.io.protocol import ArrivedChanged, Storage
from cmscale.runs.checkpoints import committed_steps, read_manifest
from cmscale.runs.folder import CHECKPOINT_MANIFEST, RunDir, original_file, rank_file, step_name
from cmscale.runs.manifest_checks import manifest_problems
from cmscale.runs.manifests import CheckpointManifest, FileEntry, read_checkpoint_manifest

_TRIES = 2  # of a file that differs: it may have been changed on the way
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
    with (
        traffic.showing(f"copying {source.url}", sum(part.file.size for part in manifest.parts)) as shown,
        ThreadPoolExecutor(_AT_ONCE, initializer=traffic.adopt, initargs=(shown,)) as pool,
    ):
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


def copy_snapshots(source: Storage, run: RunDir, *, until: int) -> dict[int, str]:
    """Copies a run's snapshots of averages up to a step, but for those that are in the folder already.

    Returns:
        Why some were left out, by step: those that are not what was written.

    Raises:
        UserError: the folder can't be written.
    """
    left_out: dict[int, str] = {}
    for step in committed_steps(source, within="snapshots"):
        there, final = source.sub(f"snapshots/{step_name(step)}"), run.snapshot(step)
        if step > until or _is_same(there, LocalStorage(final)):
            continue
        staged = final.with_name(f".{final.name}.start-0.save-0")
        shutil.rmtree(staged, ignore_errors=True)
        try:
            copy_checkpoint(there, staged)
        except NotIntact as error:
            left_out[step] = str(error)
            shutil.rmtree(staged, ignore_errors=True)
            continue
        if final.exists():
            shutil.rmtree(final)
        staged.rename(final)
        sync_folder(final.parent)
    return left_out


def _is_same(one: Storage, other: Storage) -> bool:
    first, second = one.read_if_present(CHECKPOINT_MANIFEST), other.read_if_present(CHECKPOINT_MANIFEST)
    return first is not None and second is not None and same_contents(first, second)


def same_contents(first: bytes, second: bytes) -> bool:
    """Whether two manifests are of the same state and files, by whatever start or release they were written."""
    if first == second:
        return True
    try:
        one, other = (_contents(read_checkpoint_manifest(raw, origin="manifest")) for raw in (first, second))
    except UserError:
        return False
    return one == other


def _contents(manifest: CheckpointManifest) -> tuple[object, ...]:
    parts = [
        (original_file(part.file.name), part.file.size, part.file.sha256, part.segments) for part in manifest.parts
    ]
    layout = (manifest.parameters, manifest.zero_stage, manifest.part_size)
    return (manifest.state, manifest.quantities, layout, parts, manifest.scalars)


def _copy(source: Storage, folder: Path, entry: FileEntry, name: str) -> FileEntry:
    path = folder / name
    for _ in range(_TRIES):
        try:
            source.download(entry.name, path)
        except FileNotFoundError:
            raise NotIntact(f"{source.join(entry.name)}: is missing") from None
        except ArrivedChanged:
            continue
        if path.stat().st_size == entry.size and file_sha256(path) == entry.sha256:
            return entry.model_copy(update={"name": name})
    raise NotIntact(f"{source.join(entry.name)}: its contents are not what was written (SHA-256 differs)")
