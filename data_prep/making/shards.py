"""Makes one shard: converts a range of the source's images and writes them, with the same bytes every time."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cmscale.data.decode import BadImage
from cmscale.data.formats import sample_key, shard_format
from cmscale.io.durable import explained, sync_folder
from cmscale.io.fetch import file_sha256
from cmscale.io.protocol import Storage
from cmscale.runs.manifests import DatasetFormat, Document, Encoding, Preprocess, ShardEntry
from data_prep.making.convert import convert


class DatasetSettings(Document):
    """Everything besides the source that determines the bytes of a data set."""

    format: DatasetFormat
    image_size: int
    preprocess: Preprocess
    encoding: Encoding
    samples_per_shard: int


class ShardRecord(Document):
    """A finished shard, stored until the data set is published so that an interrupted preparation can continue.

    `entry` is None if no image of the range was usable. `spans` is what the format's index needs of the shard.
    """

    entry: ShardEntry | None
    spans: tuple[tuple[int, int], ...] = ()
    bad: tuple[tuple[str, str], ...] = ()


class TooManyBad(Exception):
    """Raised when one shard has more unusable images than all shards together may have; holds (key, reason) pairs."""

    def __init__(self, bad: list[tuple[str, str]]) -> None:
        super().__init__(bad)
        self.bad = bad


def build_shard(
    keys: Iterable[str],
    read: Callable[[str], bytes],
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

    def usable() -> Iterator[tuple[str, bytes]]:
        for key in keys:
            try:
                converted = convert(
                    read(key),
                    size=settings.image_size,
                    preprocess=settings.preprocess,
                    encoding=settings.encoding,
                )
            except BadImage as error:
                bad.append((key, str(error)))
                if len(bad) > max_bad:
                    raise TooManyBad(bad) from None
            else:
                yield sample_key(key), converted
            tick()

    format = shard_format(settings.format)
    path = folder / format.shard_name(number)
    with explained(path):
        folder.mkdir(parents=True, exist_ok=True)
        written = format.write_shard(usable(), path, encoding=settings.encoding)
    if not written.count:
        return ShardRecord(entry=None, bad=tuple(bad)), path
    entry = ShardEntry(name=path.name, size=path.stat().st_size, sha256=file_sha256(path), count=written.count)
    return ShardRecord(entry=entry, spans=written.spans, bad=tuple(bad)), path


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
