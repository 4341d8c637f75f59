"""Owns one shard's making: a range of the source's keys into one MDS file or one tar, the same bytes every
time."""

import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

from webdataset.writer import TarWriter

from cmscale.data.decode import BadImage
from cmscale.data.formats import mds, webdataset
from cmscale.errors import UserError
from cmscale.io.fetch import file_sha256
from cmscale.io.storage import LocalStorage, Storage, explained, sync_folder
from cmscale.runs.manifests import Document, ShardEntry
from data_prep.preprocess import convert
from data_prep.sources import sample_key

_LARGEST = 1 << 32  # MDS offsets are 32 bits wide


class Settings(Document):
    """What decides the bytes of a data set, beside its source."""

    format: Literal["mds", "webdataset"]
    image_size: int
    preprocess: Literal["adm", "edm"]
    encoding: Literal["jpeg", "png", "webp"]
    samples_per_shard: int


class Record(Document):
    """A finished shard, noted beside the data set until it is published: so an interrupted run continues.

    `entry` is None where no image of the range could be used; `spans` is the index of a tar.
    """

    entry: ShardEntry | None
    spans: tuple[tuple[int, int], ...] = ()
    bad: tuple[tuple[str, str], ...] = ()


class TooManyBad(Exception):
    """More unusable images in one shard than are allowed in all; holds (key, why) pairs."""

    def __init__(self, bad: list[tuple[str, str]]) -> None:
        super().__init__(bad)
        self.bad = bad


def shard_name(settings: Settings, number: int) -> str:
    """The file of shard `number`."""
    return f"shard.{number:05d}.mds" if settings.format == "mds" else f"shard-{number:05d}.tar"


def build_shard(
    keys: Iterable[str],
    read: Callable[[str], bytes],
    *,
    settings: Settings,
    number: int,
    folder: Path,
    max_bad: int,
    tick: Callable[[], None] = lambda: None,
) -> tuple[Record, Path]:
    """Makes a shard in `folder`. Returns its record and where the file is (it isn't, where the record has no
    entry).

    Raises:
        TooManyBad: more than `max_bad` images can't be used.
        UserError: no space, or a shard too large.
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

    path = folder / shard_name(settings, number)
    with explained(path):
        folder.mkdir(parents=True, exist_ok=True)
        if settings.format == "mds":
            count, spans = _write_mds(usable(), path), []
        else:
            spans = _write_tar(usable(), path, extension=webdataset.EXTENSIONS[settings.encoding])
            count = len(spans)
    if not count:
        return Record(entry=None, bad=tuple(bad)), path
    entry = ShardEntry(name=path.name, size=path.stat().st_size, sha256=file_sha256(path), count=count)
    return Record(entry=entry, spans=tuple(spans), bad=tuple(bad)), path


def _write_mds(samples: Iterator[tuple[str, bytes]], path: Path) -> int:
    from streaming.base.format.mds import MDSWriter  # slow to import

    folder = path.with_suffix(".writing")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    writer = MDSWriter(columns=mds.COLUMNS, out=str(folder), size_limit=None)
    try:
        count = 0
        for key, image in samples:
            writer.write({"key": key, "image": image})
            count += 1
            if writer.new_shard_size >= _LARGEST:
                raise UserError("--samples-per-shard: a shard would be larger than 4 GiB; use fewer")
        if count:
            # Not `finish`: the index is ours to publish, last, and only when every shard is there.
            writer.flush_shard()
            (folder / writer.shards[0]["raw_data"]["basename"]).replace(path)
        return count
    finally:
        writer.executor.shutdown(wait=True)
        shutil.rmtree(folder, ignore_errors=True)


def _write_tar(samples: Iterator[tuple[str, bytes]], path: Path, *, extension: str) -> list[tuple[int, int]]:
    spans = []
    memory = io.BytesIO()  # a tar stream that breaks in the middle (a full disk) can't be closed in peace
    writer = TarWriter(memory, user="", group="", mtime=0, encoder=False)
    for key, image in samples:
        begin = writer.tarstream.offset
        writer.write({"__key__": webdataset.member_key(key), extension: image})
        spans.append((begin, writer.tarstream.offset))
    writer.close()
    path.write_bytes(memory.getbuffer())
    return spans


def deliver(path: Path, storage: Storage, name: str) -> None:
    """Moves a finished file to its place, durably and at once."""
    if isinstance(storage, LocalStorage):
        with explained(storage.root):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.replace(storage.root / name)
            sync_folder(storage.root)
    else:
        storage.upload(name, path)
        path.unlink()


def index_file(settings: Settings, records: Iterable[Record]) -> tuple[str, bytes]:
    """Name and bytes of the data set's index."""
    records = list(records)
    if settings.format == "mds":
        return mds.INDEX, mds.shard_index([record.entry for record in records if record.entry])
    return webdataset.INDEX, webdataset.index_bytes(span for record in records for span in record.spans)
