"""Writes the folder of a checkpoint: hidden, hashed, durable, the manifest last, and then under its own name."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from cmscale.distributed.noticeboard import NoticeBoard
from cmscale.distributed.world import World
from cmscale.io.durable import explained, follow_umask, replace_durably, sync_file, sync_folder
from cmscale.io.fetch import file_sha256
from cmscale.runs.folder import CHECKPOINT_MANIFEST, rank_file
from cmscale.runs.manifests import CheckpointManifest, FileEntry, RankPart


@dataclass(frozen=True)
class Staged:
    """A folder that is being written under a hidden name: a checkpoint, or a snapshot of its averages.

    Attributes:
        tensors: This rank's elements of each quantity.
    """

    folder: Path
    final: Path
    manifest: CheckpointManifest
    tensors: dict[str, torch.Tensor]

    def commit(self, parts: tuple[RankPart, ...], *, fence: Callable[[], None]) -> None:
        """Renames the folder to its final name; it replaces an earlier one of the same step.

        Args:
            fence: Is called once all but the renames is done; raises if this start may not commit.
        """
        write_manifest(self.folder, self.manifest.model_copy(update={"parts": parts}))
        replaced = self.final.with_name(f".{self.final.name}.replaced-{self.manifest.generation}")
        fence()
        if os.path.lexists(self.final):
            self.final.rename(replaced)
        self.folder.rename(self.final)
        sync_folder(self.final.parent)
        remove(replaced)


def write_part(staged: Path, world: World, tensors: dict[str, torch.Tensor]) -> FileEntry:
    """Writes a rank's file durably, with its name."""
    with explained(staged):
        staged.mkdir(parents=True, exist_ok=True)
        path = staged / rank_file(world.rank, world.num_ranks)
        try:
            save_file(tensors, path)
        except SafetensorError as error:
            raise as_os_error(error) from error
        follow_umask(path)
        sync_file(path)
    return FileEntry(name=path.name, size=path.stat().st_size, sha256=file_sha256(path))


def as_os_error(error: SafetensorError) -> Exception:
    """The error of the file system in an error of safetensors, which has it as text alone; else the error itself."""
    number = re.search(r"os error (\d+)", str(error))
    return error if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


def remove(folder: Path) -> None:
    """Removes a checkpoint's folder; of a link to one, the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def record(board: NoticeBoard, staged: Path, rank: int, file: FileEntry) -> None:
    """Tells rank 0 that a rank's part is written."""
    board.post(str(staged), rank, file.model_dump_json())


def write_manifest(staged: Path, manifest: CheckpointManifest) -> None:
    """Writes the manifest, which completes a staged checkpoint."""
    replace_durably(staged / CHECKPOINT_MANIFEST, manifest.to_bytes())
