"""Decides which checkpoints of a run are committed: those that have a manifest, which is written last."""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from cmscale.errors import UserError
from cmscale.io.local import LocalStorage
from cmscale.io.storage import Storage, has_object, open_storage
from cmscale.runs.folder import CHECKPOINT_MANIFEST, RunDir
from cmscale.runs.manifests import CheckpointManifest, is_plain_name, read_checkpoint_manifest

_STEP_FOLDER = re.compile(r"step-(\d{9})")
_LEFTOVER = re.compile(r"\.step-(\d{9})\.(start-\d+\.save|replaced|removed)-\d+")


def committed_steps(run: RunDir | Storage | str | Path, *, within: str = "checkpoints") -> list[int]:
    """The steps of a run's committed checkpoints, ascending; within `snapshots`, of its snapshots.

    Files and folders that are not checkpoints (links, copies under other names, unfinished saves) are ignored.

    Args:
        run: The run: its folder, a URL, or the storage of either.
    """
    if isinstance(run, RunDir):
        run = LocalStorage(run.root)
    elif isinstance(run, str | Path):
        run = open_storage(run)
    checkpoints = run.sub(within)
    folder = checkpoints.local_path("")
    if folder is not None:  # a launcher asks every few seconds: nothing but the manifests is looked at
        names = [manifest.parent.name for manifest in folder.glob(f"step-*/{CHECKPOINT_MANIFEST}")]
    else:
        names = [
            name for name in checkpoints.folders("step-") if has_object(checkpoints, f"{name}/{CHECKPOINT_MANIFEST}")
        ]
    return _steps(names)


def read_manifest(storage: Storage) -> CheckpointManifest:
    """The manifest of the checkpoint at `storage`.

    Raises:
        UserError: there is no manifest, it is damaged, or it names files outside its folder.
    """
    raw = storage.read_if_present(CHECKPOINT_MANIFEST)
    if raw is None:
        raise UserError(f"{storage.url}: no complete checkpoint there (no {CHECKPOINT_MANIFEST})")
    manifest = read_checkpoint_manifest(raw, origin=storage.join(CHECKPOINT_MANIFEST))
    for part in manifest.parts:
        if not is_plain_name(part.file.name):
            raise UserError(f"{storage.join(CHECKPOINT_MANIFEST)}: {part.file.name!r} leaves the checkpoint; refused")
    return manifest


def kept_steps(steps: Collection[int], *, last: int, every: int) -> set[int]:
    """The steps whose checkpoints stay: the `last` newest and the multiples of `every`, but not of the untrained 0."""
    newest = sorted(steps)[-last:]
    return {step for step in steps if step in newest or (step > 0 and every > 0 and step % every == 0)}


def named_steps(run: RunDir) -> list[int]:
    """The steps of all folders that are named as checkpoints are, ascending; a manifest may be missing.

    Only a resume needs this: it reports a checkpoint that lost its manifest instead of passing it over.
    """
    return _steps(folder.name for folder in run.checkpoints.glob("step-*") if folder.is_dir())


def leftovers(run: RunDir) -> list[tuple[int, str, Path]]:
    """(step, `save`, `replaced` or `removed`, folder) of each folder that a start which was killed left behind.

    Of checkpoints and of snapshots.

    Names of other forms are somebody else's and stay.
    """
    found = [(path, _LEFTOVER.fullmatch(path.name)) for path in _hidden(run)]
    return [(int(match[1]), match[2].rpartition(".")[2], path) for path, match in found if match]


def _hidden(run: RunDir) -> list[Path]:
    return sorted(path for folder in (run.checkpoints, run.snapshots) for path in folder.glob(".step-*"))


def _steps(names: Iterable[str]) -> list[int]:
    return sorted(int(match[1]) for name in names if (match := _STEP_FOLDER.fullmatch(name)))
