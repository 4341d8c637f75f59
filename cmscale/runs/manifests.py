"""Defines the JSON documents that publish a folder: a data set's manifest, a checkpoint's, the state of training."""

import hashlib
import json
import pkgutil
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from cmscale.errors import UserError
from cmscale.io.image_files import Exif
from cmscale.io.storage import Storage

DATASET_MANIFEST = "manifest.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""The quantities of a checkpoint that belong to the optimizer."""


class Document(BaseModel):
    """A frozen JSON document; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_bytes(self) -> bytes:
        """The canonical text: equal documents give equal bytes."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()


D = TypeVar("D", bound=Document)


NonNegative = Annotated[int, Field(ge=0, lt=2**63)]


class FileEntry(Document):
    """A published file: its name inside the folder, its size in bytes, its SHA-256."""

    name: str
    size: NonNegative
    sha256: str


class ShardEntry(FileEntry):
    """A shard of a data set and how many samples it holds."""

    count: NonNegative


@cache
def dataset_formats() -> tuple[str, ...]:
    """Names of the shard formats: the modules in `cmscale/data/formats`, listed without importing any of them."""
    folder = Path(__file__).resolve().parents[1] / "data" / "formats"
    return tuple(sorted(module.name for module in pkgutil.iter_modules([str(folder)])))


def _known_format(name: str) -> str:
    if name not in dataset_formats():
        formats = ", ".join(dataset_formats())
        raise PydanticCustomError(
            "dataset_format",
            "{name} is not a data set format of this version of cmscale; formats are {formats}",
            {"name": repr(name), "formats": formats},
        )
    return name


DatasetFormat = Annotated[str, AfterValidator(_known_format)]
Preprocess = Literal["adm", "edm"]
Encoding = Literal["jpeg", "png", "webp", "keep"]


class DatasetManifest(Document):
    """Describes a prepared data set. `data_prep/prepare.py` writes it last; a folder without it is not a data set.

    The fingerprint is the SHA-256 of everything that determines what a reader gets: format, preprocessing, encoding
    and the shards' hashes in order.

    Attributes:
        encoding: how the images are stored. With `keep`, an image that needed no resizing is stored as the bytes of
            its source; readers crop its centre to `image_size`.
        exif: what was done with EXIF orientations; earlier versions ignored them.
        source: where the images came from.
        skipped: number of images that could not be used.
    """

    version: Literal[1] = 1
    format: DatasetFormat
    image_size: NonNegative
    preprocess: Preprocess
    encoding: Encoding
    exif: Exif = "ignore"
    source: str
    count: NonNegative
    skipped: NonNegative = 0
    shards: tuple[ShardEntry, ...]
    files: tuple[FileEntry, ...] = ()
    fingerprint: str


def dataset_fingerprint(
    *, format: str, image_size: int, preprocess: str, encoding: str, shards: tuple[ShardEntry, ...]
) -> str:
    """The `fingerprint` of a `DatasetManifest` with these contents."""
    parts = [format, image_size, preprocess, encoding, [(shard.sha256, shard.count) for shard in shards]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class TrainState(Document):
    """The progress of training: the number of applied steps, and of samples consumed (the data cursor).

    A step that was not applied (fp16 overflow, a skipped batch) advances the cursor only.
    """

    step: NonNegative = 0
    cursor: NonNegative = 0

    def advance(self, cursor: int, stepped: bool) -> "TrainState":
        """The state after a step."""
        return TrainState(step=self.step + int(stepped), cursor=cursor)


class Parameter(Document):
    """A parameter's place in the flat fp32 space: its elements lie at [offset, offset + prod(shape))."""

    name: str
    shape: tuple[NonNegative, ...]
    offset: NonNegative


class Segment(Document):
    """Contiguous elements in a rank's file: flat[start : start + length], at position `at` of the file's tensors."""

    start: NonNegative
    length: NonNegative
    at: NonNegative


class RankPart(Document):
    """One rank's file of a checkpoint; in versions 1 and 2 with the segments of the flat space in it."""

    file: FileEntry
    segments: tuple[Segment, ...] | None = Field(default=None, exclude_if=lambda segments: segments is None)


class CheckpointManifest(Document):
    """The manifest of a checkpoint, written last: a folder without it is not a checkpoint.

    Its last key is the hash of its own text without that key, so that no changed bit goes unnoticed. Version 1, of
    earlier releases, has no such hash. Which segments of the flat space a rank's file holds follows from the numbers
    here, see `partition_of`; versions 1 and 2 list the segments instead.

    Each rank's file holds, per quantity, one 1-D float32 tensor of the rank's segments. Quantities are `master`,
    `exp_avg`, `exp_avg_sq`, `target` if the method has a target network, and each EMA by name.

    Attributes:
        generation: the start of the run that wrote the checkpoint.
        config_fingerprint: the hash of `trajectory`. A resume compares `trajectory` itself, to name what differs;
            the hash is for earlier versions of this program, which require it.
        config: the whole config of the run.
        trajectory: the config's values that change the losses.
        part_size: elements of a rank in the padded flat space, which stages 0 to 2 split evenly.
        scalars: numbers that are the same on every rank.
        home: of a copy, the number of the run's home that made it (`cmscale.runs.homes`); 0 in a run's folder.
    """

    version: Literal[1, 2, 3] = 3
    state: TrainState
    generation: int
    num_ranks: Annotated[int, Field(ge=1, lt=2**31)]
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    config_fingerprint: str
    config: dict[str, Any]
    trajectory: dict[str, Any]
    data_fingerprint: str
    teacher_fingerprint: str | None = None
    quantities: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    num_elements: NonNegative
    part_size: Annotated[int, Field(ge=1, lt=2**63)] | None = Field(default=None, exclude_if=lambda size: size is None)
    parts: tuple[RankPart, ...]
    scalars: dict[str, float] = {}
    home: NonNegative = 0

    @model_validator(mode="after")
    def _says_where_elements_are(self) -> Self:
        lists = self.version < 3
        if lists != (self.part_size is None) or any((part.segments is not None) != lists for part in self.parts):
            needed = "segments and no part_size" if lists else "part_size and no segments"
            raise PydanticCustomError(
                "elements", "version {version} has {needed}", {"version": self.version, "needed": needed}
            )
        return self

    @property
    def is_sealed(self) -> bool:
        """Whether the file has a hash of its own."""
        return self.version > 1

    def to_bytes(self) -> bytes:
        """The canonical text, from version 2 on with its hash."""
        text = super().to_bytes()
        return _sealed(text) if self.is_sealed else text


_SEAL = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n}\n\Z')


def _sealed(text: bytes) -> bytes:
    digest = hashlib.sha256(text).hexdigest()
    return text.removesuffix(b"\n}\n") + f',\n "sha256": "{digest}"\n}}\n'.encode()


def read_checkpoint_manifest(raw: bytes, *, origin: str) -> CheckpointManifest:
    """Parses the manifest of a checkpoint.

    Raises:
        UserError: it is not such a manifest, or not what was written; the message begins with `origin`.
    """
    seal = _SEAL.search(raw)
    text = raw if seal is None else raw[: seal.start()] + b"\n}\n"
    if seal is not None and hashlib.sha256(text).hexdigest().encode() != seal[1]:
        raise UserError(f"{origin}: its contents are not what was written (SHA-256 differs)")
    manifest = read_document(CheckpointManifest, text, origin=origin)
    if manifest.is_sealed != (seal is not None):
        raise UserError(f"{origin}: its contents are not what was written (its own SHA-256 is damaged)")
    return manifest


def read_document(kind: type[D], raw: bytes, *, origin: str) -> D:
    """Parses a document.

    Raises:
        UserError: it is not such a document; the message begins with `origin`.
    """
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        said = f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")
        raise UserError(f"{origin}: not a valid {kind.__name__}: {said}") from None


def read_dataset_manifest(storage: Storage) -> DatasetManifest:
    """The manifest of the data set at `storage`.

    Raises:
        UserError: there is none, it is damaged, or empty, or its counts and fingerprint do not match its own shards.
    """
    raw = storage.read_if_present(DATASET_MANIFEST)
    if raw is None:
        raise UserError(
            f"{storage.url}: no prepared data set there (no {DATASET_MANIFEST}); make one with data_prep/prepare.py"
        )
    manifest = read_document(DatasetManifest, raw, origin=storage.join(DATASET_MANIFEST))
    expected = dataset_fingerprint(
        format=manifest.format,
        image_size=manifest.image_size,
        preprocess=manifest.preprocess,
        encoding=manifest.encoding,
        shards=manifest.shards,
    )
    if expected != manifest.fingerprint or manifest.count != sum(shard.count for shard in manifest.shards):
        raise UserError(
            f"{storage.join(DATASET_MANIFEST)}: does not match its own shards; run data_prep/verify.py on it"
        )
    for entry in (*manifest.shards, *manifest.files):
        if not is_plain_name(entry.name):
            raise UserError(f"{storage.join(DATASET_MANIFEST)}: file name {entry.name!r} leaves the data set; refused")
    if manifest.count == 0:
        raise UserError(f"{storage.url}: the data set is empty")
    return manifest


def is_plain_name(name: str) -> bool:
    """Whether a file name stays inside its folder and is no URL: no `..`, no leading slash, no colon, no backslash."""
    parts = name.split("/")
    return bool(name) and not any(part in ("", ".", "..") for part in parts) and not set(name) & set(":\\|\0")
