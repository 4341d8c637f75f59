"""Names the places of sets of samples and of their parts, and describes a finished set.

A set is one array in an `.npz`, or a folder of PNG files or of tars of them. While it is drawn its parts lie beside it,
in PLACE.parts; the record that describes it is written last: PLACE/samples.json, or FILE.npz.json.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from cmscale.config.draw_request import Format
from cmscale.errors import UserError
from cmscale.io.durable import explained
from cmscale.io.place import Place
from cmscale.io.protocol import Storage
from cmscale.io.storage import open_parent, open_storage
from cmscale.runs.manifests import D, Document, read_document

RECORD = "samples.json"
BEGUN = "begun.json"
OWNERS = "owners"
_OF_FILES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pdf", ".npy", ".tar", ".gz", ".tgz")
_OF_FILES += (".zip", ".json", ".pt", ".pth", ".pkl", ".safetensors", ".mp4")
TAR_SAMPLES = 512
"""Samples in a tar: at 256 px some 50 MB, which are made in memory."""


class SampleSet(Document):
    """A finished set of samples.

    Attributes:
        count, image_size: Number of samples, and their height and width in pixels.
        sha256: Of the pixels in order, whatever the format: as `cmscale evaluate` records it of finished samples.
        key: Hash of all that determines the samples; two sets with one key are equal up to rounding.
        protocol: What a repetition needs: source, weights, sampler, times, seed.
        machine: Torch and the device, by which pixels differ in their rounding, and the number of ranks.
        date: When the record was written, UTC.
        file_version: The version that a storage gives the `.npz`; a local one holds the key itself.
    """

    version: int = 1
    format: Format
    count: int
    image_size: int
    sha256: str
    key: str
    protocol: dict[str, Any] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    date: str
    file_version: str | None = None


class Begun(Document):
    """What the parts of an unfinished set are of.

    Attributes:
        key: As in `SampleSet`.
        machine: Torch and the device.
    """

    key: str
    machine: dict[str, Any]


@dataclass(frozen=True)
class SetPlace:
    """Where a set of samples is, and in which format."""

    place: Place
    format: Format

    @property
    def is_file(self) -> bool:
        """Whether it is one file, and not a folder."""
        return self.format == "npz"

    @property
    def folder(self) -> Storage:
        """The folder of a set of files."""
        assert not self.is_file
        return open_storage(self.place)

    @property
    def parts(self) -> Storage:
        """The folder of the parts of the set while it is drawn."""
        return open_storage(f"{self.place}.parts")

    @property
    def record(self) -> Place:
        """Where the set's record is."""
        return Place(f"{self.place}.json" if self.is_file else f"{self.place}/{RECORD}")

    def check(self, option: str) -> None:
        """Checks, before any work is done, that the set can be written. Leaves nothing behind.

        Args:
            option: What names the place, for messages.

        Raises:
            UserError: a file is where a folder is needed, or the reverse, or it may not be written.
        """
        try:
            if self.is_file:
                self.place.check_output(".npz")
                self.record.check_output()  # its name is longer
                return
            storage, name = open_parent(self.place)
            if name.lower().endswith(_OF_FILES):
                raise UserError(f"{self.place}: the file's name must end in .npz, or name a folder for PNG files")
            path = storage.local_path(name)
            if path is not None:
                with explained(path):
                    if path.exists() and not path.is_dir():
                        raise UserError(f"{self.place}: is a file; name a folder, or a file that ends in .npz")
            self.folder.check_writable(RECORD)
        except UserError as error:
            raise UserError(f"{option} {error}") from None


def set_place(place: Place, format: Format) -> SetPlace:
    """The place of a set; a folder's name may end with a slash, or be `.`."""
    if format == "npz":
        return SetPlace(place, format)
    named = Place(place.rstrip("/") or "/")
    if not named.is_remote and named.rpartition("/")[2] in (".", ".."):
        named = Place(Path(named).resolve())  # its parts lie beside it, under its own name
    return SetPlace(named, format)


def place_of_seed(place: Place, seed: int, seeds: int) -> Place:
    """The place of the set or grid of one seed: `x-seed3.npz` for `x.npz`, if there are several seeds."""
    if seeds == 1:
        return place
    head, dot, ending = place.rpartition(".")
    if dot and "/" not in ending and ending.lower() in ("npz", "png"):
        return Place(f"{head}-seed{seed}.{ending}")
    return Place(f"{place.rstrip('/')}/seed{seed}")


def read_record(raw: bytes, *, origin: str) -> SampleSet:
    """The record of a set.

    Raises:
        UserError: it is damaged, or of another program.
    """
    return _read(SampleSet, raw, origin, what="the record of a set of samples")


def read_begun(raw: bytes, *, origin: str) -> Begun:
    """What the parts of an unfinished set are of.

    Raises:
        UserError: it is damaged, or of another program.
    """
    return _read(Begun, raw, origin, what="what parts of samples are of")


def _read(kind: type[D], raw: bytes, origin: str, *, what: str) -> D:
    try:
        return read_document(kind, raw, origin=origin)
    except UserError as error:
        raise UserError(f"{error}; it should say {what}: if it is damaged or of another program, remove it") from None


def part_name(start: int) -> str:
    """The name of the part that begins with this sample."""
    return f"part-{start:09d}.npy"


def stored_parts(places: Iterable[SetPlace]) -> int:
    """How many parts of unfinished sets are stored."""
    return sum(1 for place in places for _ in place.parts.list("part-"))
