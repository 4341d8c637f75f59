"""Makes one shard: converts a range of the source's images and writes them, with the same bytes every time."""

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from pydantic import Field

from cmscale.data.formats import sample_key, shard_format
from cmscale.io.durable import explained, sync_folder
from cmscale.io.fetch import file_sha256
from cmscale.io.image_files import Exif
from cmscale.io.pictures import BadImage
from cmscale.io.protocol import Storage
from cmscale.io.reading import utf8
from cmscale.runs.manifests import DatasetFormat, Document, Encoding, Preprocess, ShardEntry
from data_prep.making.convert import convert
from data_prep.sources import SourceReader


class DatasetSettings(Document):
    """Everything besides the source that determines the bytes of a data set. Earlier versions ignored EXIF."""

    format: DatasetFormat
    image_size: int
    preprocess: Preprocess
    encoding: Encoding
    exif: Exif = "ignore"
    samples_per_shard: int


class SourceState(Document):
    """The images that a shard was made of.

    Attributes:
        facts: Hash of their sizes and times before they were read; None if the kind of source has none.
        images: Hash of their names and bytes.
    """

    facts: str | None
    images: str


class ShardRecord(Document):
    """A finished shard, stored until the data set is published so that an interrupted preparation can continue.

    `entry` is None if no image of the range was usable. `spans` is what the format's index needs of the shard. `notes`
    counts what was decided about its images. `made_of` is None in records of earlier versions.
    """

    entry: ShardEntry | None
    spans: tuple[tuple[int, int], ...] = ()
    bad: tuple[tuple[str, str], ...] = ()
    notes: dict[str, int] = Field(default={})
    made_of: SourceState | None = None


class TooManyBad(Exception):
    """Raised when one shard has more unusable images than all shards together may have; holds (key, reason) pairs."""

    def __init__(self, bad: list[tuple[str, str]]) -> None:
        super().__init__(bad)
        self.bad = bad


class _ImageHash:
    """Hashes the names and bytes of images."""

    def __init__(self) -> None:
        self.sha = hashlib.sha256()

    def read(self, key: str, read: SourceReader) -> bytes:
        """Reads an image. Raises BadImage if it can't be read."""
        self.sha.update(key.encode("utf-8", "surrogateescape"))
        try:
            data = read(key)
        except OSError as error:
            self.sha.update(b"\0?")
            raise BadImage(f"can't be read ({error.strerror or error})") from None
        except BadImage:
            self.sha.update(b"\0?")
            raise
        self.sha.update(b"\0=" + hashlib.sha256(data).digest())
        return data


def hash_images(keys: Iterable[str], read: SourceReader, *, tick: Callable[[], None] = lambda: None) -> str:
    """The `SourceState.images` of these images as they are now."""
    found = _ImageHash()
    for key in keys:
        with contextlib.suppress(BadImage):
            found.read(key, read)
        tick()
    return found.sha.hexdigest()


def build_shard(
    keys: Sequence[str],
    read: SourceReader,
    *,
    settings: DatasetSettings,
    number: int,
    folder: Path,
    max_bad: int,
    tick: Callable[[], None] = lambda: None,
) -> tuple[ShardRecord, Path]:
    """Makes shard `number` in `folder`.

    Returns:
        The shard's record and the path of its file, which does not count if the record has no entry.

    Raises:
        TooManyBad: more than `max_bad` images are unusable.
        UserError: there is no space left, or the shard is too large for its format.
    """
    bad: list[tuple[str, str]] = []
    notes: Counter[str] = Counter()
    images = _ImageHash()

    def usable() -> Iterator[tuple[str, bytes]]:
        for key in keys:
            decisions: list[str] = []
            try:
                converted = convert(
                    images.read(key, read),
                    size=settings.image_size,
                    preprocess=settings.preprocess,
                    encoding=settings.encoding,
                    exif=settings.exif,
                    note=decisions.append,
                )
            except BadImage as error:
                bad.append((utf8(key), str(error)))
                if len(bad) > max_bad:
                    raise TooManyBad(bad) from None
            else:
                notes.update(decisions)
                yield sample_key(key), converted
            tick()

    format = shard_format(settings.format)
    path = folder / format.shard_name(number)
    facts = read.facts(keys)
    with explained(path):
        folder.mkdir(parents=True, exist_ok=True)
        written = format.write_shard(usable(), path, encoding=settings.encoding)
    record = ShardRecord(
        entry=None,
        bad=tuple(bad),
        notes=dict(sorted(notes.items())),
        made_of=SourceState(facts=facts, images=images.sha.hexdigest()),
    )
    if not written.count:
        return record, path
    entry = ShardEntry(name=path.name, size=path.stat().st_size, sha256=file_sha256(path), count=written.count)
    return record.model_copy(update={"entry": entry, "spans": written.spans}), path


def deliver(path: Path, storage: Storage, name: str) -> None:
    """Moves a finished file to its place in the data set, atomically and durably."""
    target = storage.local_path(name)
    if target is None:
        storage.upload(name, path)
        path.unlink()
        return
    with explained(target):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.replace(target)
        sync_folder(target.parent)
