"""Lists, verifies and reads checkpoints on any storage, without DeepSpeed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cmscale.errors import UserError
from cmscale.io import traffic
from cmscale.io.fetch import file_sha256, local_file
from cmscale.io.reading import reading, reason
from cmscale.io.storage import Storage, local_copy, open_storage
from cmscale.runs.checkpoints import committed_steps, read_manifest
from cmscale.runs.folder import step_name
from cmscale.runs.manifest_checks import manifest_problems
from cmscale.runs.manifests import CheckpointManifest, RankPart
from cmscale.runs.partition import partition_of


@dataclass(frozen=True)
class Listed:
    """A committed checkpoint."""

    step: int
    url: str


def list_checkpoints(run_url: str | Path, *, within: str = "checkpoints") -> list[Listed]:
    """The committed checkpoints of a run (a folder or URL that has `checkpoints/` in it), oldest first.

    Args:
        within: `snapshots` for those of the averages by a power function.
    """
    storage = open_storage(run_url)
    checkpoints = storage.sub(within)
    return [Listed(step, checkpoints.join(step_name(step))) for step in committed_steps(storage, within=within)]


def is_sealed(url: str | Path) -> bool:
    """Whether a checkpoint's manifest has a hash of its own; those of earlier versions have none."""
    return read_manifest(open_storage(url)).is_sealed


def size_of(url: str | Path) -> int:
    """The bytes of a checkpoint's files; 0 if its manifest can't be read."""
    try:
        return _size(read_manifest(open_storage(url)))
    except UserError:
        return 0


def _size(manifest: CheckpointManifest) -> int:
    return sum(part.file.size for part in manifest.parts)


def verify_checkpoint(url: str | Path) -> list[str]:
    """What is wrong with a checkpoint: one line per problem, with the file; an empty list if it is intact."""
    storage = open_storage(url)
    try:
        manifest = read_manifest(storage)
    except UserError as error:
        return [str(error)]
    problems = manifest_problems(manifest, origin=storage.url)
    with traffic.showing(f"checking {storage.url}", _size(manifest)):
        return problems + parts_problems(storage, manifest, range(len(manifest.parts)))


def parts_problems(storage: Storage, manifest: CheckpointManifest, ranks: Iterable[int]) -> list[str]:
    """What is wrong with the files of these ranks: missing, altered, or without the tensors that the manifest lists."""
    partition = partition_of(manifest)
    return [
        problem
        for rank in ranks
        for problem in _part_problems(storage, manifest, manifest.parts[rank], partition.length(rank))
    ]


def _part_problems(storage: Storage, manifest: CheckpointManifest, part: RankPart, length: int) -> list[str]:
    where = storage.join(part.file.name)
    try:
        with local_copy(storage, part.file.name) as path:
            if path.stat().st_size != part.file.size:
                return [f"{where}: has {path.stat().st_size} bytes, the manifest says {part.file.size}"]
            if file_sha256(path, shown=storage.local_path("") is not None) != part.file.sha256:
                return [f"{where}: its contents are not what was written (SHA-256 differs)"]
            with safe_open(path, framework="pt") as file:
                held = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                for quantity in manifest.quantities:
                    if quantity not in held:
                        return [f"{where}: holds no {quantity}"]
                    if held[quantity].get_dtype() != "F32" or held[quantity].get_shape() != [length]:
                        return [f"{where}: {quantity} is not {length} float32 values"]
    except FileNotFoundError:
        return [f"{where}: is missing"]
    except PermissionError as error:
        return [f"{where}: can't be read ({error.strerror}); its owner can allow it with chmod"]
    except (SafetensorError, ValueError, OSError) as error:
        return [f"{where}: not a safetensors file ({reason(error)})"]
    return []


def read_weights(url: str | Path, quantity: str) -> dict[str, torch.Tensor]:
    """The named fp32 parameters of one quantity of a checkpoint (`master`, an average's name, `target`).

    Raises:
        UserError: as `read_flat`.
    """
    return by_name(read_flat(url, quantity), read_manifest(open_storage(url)).parameters)


def read_flat(url: str | Path, quantity: str) -> torch.Tensor:
    """One quantity of a checkpoint, in the flat space of the network, float32.

    Every file is checked against its hash first; from a remote storage each is fetched once per node, into the cache.

    Raises:
        UserError: there is no complete checkpoint, no such quantity in it, or a file is damaged.
    """
    storage = open_storage(url)
    manifest = read_manifest(storage)
    if quantity not in manifest.quantities:
        raise UserError(f"{storage.url}: holds no {quantity!r}, only {', '.join(manifest.quantities)}")
    with traffic.showing(f"reading {storage.url}", _size(manifest)):
        is_local = storage.local_path("") is not None
        problems = verify_checkpoint(url) if is_local else manifest_problems(manifest, origin=storage.url)
        if problems:
            raise UserError(problems[0])
        return _read_flat(storage, manifest, quantity)


def _read_flat(storage: Storage, manifest: CheckpointManifest, quantity: str) -> torch.Tensor:
    flat = torch.empty(manifest.num_elements)
    for part, segments in zip(manifest.parts, partition_of(manifest), strict=True):
        path = storage.local_path(part.file.name)
        if path is None:
            path = local_file(f"{storage.join(part.file.name)}#sha256={part.file.sha256}")
        with (
            reading(storage.join(part.file.name), f"a file of {quantity}"),
            safe_open(path, framework="pt") as file,
        ):
            values = file.get_tensor(quantity)
        for segment in segments:
            flat[segment.start : segment.start + segment.length] = values[segment.at : segment.at + segment.length]
    return flat


class FlatReader:
    """Reads parts of a local checkpoint's flat space, whatever world size and ZeRO stage wrote it."""

    def __init__(self, folder: Path, manifest: CheckpointManifest) -> None:
        self._folder = folder
        self._partition = partition_of(manifest)
        self._names = [part.file.name for part in manifest.parts]
        self._files: dict[str, Any] = {}

    def __call__(self, quantity: str, start: int, length: int) -> torch.Tensor:
        """flat[start : start + length] of a quantity, float32."""
        found = [
            self._open(self._names[rank]).get_slice(quantity)[at : at + count]
            for rank, at, count in self._partition.find(start, length)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _open(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self._folder / name, framework="pt")
        return self._files[name]


def by_name(flat: torch.Tensor, parameters: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Views of a flat tensor by parameter name and in the parameters' shapes (`manifests.Parameter`)."""
    found = {}
    for parameter in parameters:
        numel = torch.Size(parameter.shape).numel()
        found[parameter.name] = flat[parameter.offset : parameter.offset + numel].view(parameter.shape)
    return found
