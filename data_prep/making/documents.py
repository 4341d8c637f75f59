"""Defines what a preparation stores: its plan while it is unfinished, and with the data set how it was made."""

import hashlib
from collections import Counter
from collections.abc import Sequence

from pydantic import Field

from cmscale.io.storage import Storage
from cmscale.runs.manifests import (
    DATASET_MANIFEST,
    DatasetManifest,
    Document,
    FileEntry,
    ShardEntry,
    dataset_fingerprint,
    read_document,
)
from data_prep.making.convert import ENCODINGS, RECIPES
from data_prep.making.shards import DatasetSettings, ShardRecord, SourceState
from data_prep.sources import ImageSource, LeftOut, as_listed_before

PREPARATION = "preparation.json"
PROGRESS = ".progress"
PLAN = f"{PROGRESS}/plan.json"


class PreparationPlan(Document):
    """What is made of what; an interrupted preparation is continued by one with the same plan.

    `source` is where the images were; the same images may have moved since.
    """

    settings: DatasetSettings
    source: str
    keys: int
    keys_sha256: str

    def difference(self, wanted: "PreparationPlan") -> str | None:
        """How `wanted` would make another data set, in words; None if it would make the same one."""
        for name, mine in self.settings:
            if mine != (theirs := getattr(wanted.settings, name)):
                return f"made with --{name.replace('_', '-')} {mine}, not {theirs}"
        if self.keys != wanted.keys:
            return f"made of {self.keys} images, not {wanted.keys}"
        if self.keys_sha256 != wanted.keys_sha256:
            return "made of images with other names"
        return None


class PreparationDocument(Document):
    """Published with the shards: how they were made, enough to make any of them again.

    Attributes:
        skipped: Key and reason of every image that could not be used.
        notes: What was decided about the images, and about how many of them; see `cmscale.io.pictures`.
        left_out: What the source contains besides images: number of files and the first of their names, by reason.
        shards: The images that each shard was made of, by the numbers of the plan; empty from earlier versions.
    """

    plan: PreparationPlan
    recipe: str
    encoding: str
    skipped: tuple[tuple[str, str], ...]
    notes: dict[str, int] = Field(default={})
    left_out: dict[str, tuple[int, tuple[str, ...]]] = Field(default={})
    shards: tuple[SourceState, ...] = ()


def document_of(plan: PreparationPlan, records: Sequence[ShardRecord], left_out: LeftOut) -> PreparationDocument:
    """The account of a preparation whose shards have these records, in order."""
    notes: Counter[str] = Counter()
    for record in records:
        notes.update(record.notes)
    made_of = tuple(record.made_of for record in records if record.made_of is not None)
    return PreparationDocument(
        plan=plan,
        recipe=RECIPES[plan.settings.preprocess],
        encoding=ENCODINGS[plan.settings.encoding],
        skipped=tuple(pair for record in records for pair in record.bad),
        notes=dict(notes),
        left_out={reason: (count, tuple(left_out.names[reason])) for reason, count in sorted(left_out.counts.items())},
        shards=made_of if len(made_of) == len(records) else (),  # else an earlier version made some of them
    )


def manifest_of(
    document: PreparationDocument, shards: tuple[ShardEntry, ...], files: Sequence[tuple[str, bytes]]
) -> DatasetManifest:
    """The manifest of a data set.

    Args:
        files: Names and contents of its files besides the shards.
    """
    settings = document.plan.settings
    described = {key: getattr(settings, key) for key in ("format", "image_size", "preprocess", "encoding")}
    return DatasetManifest(
        **described,
        exif=settings.exif,
        source=document.plan.source,
        count=sum(shard.count for shard in shards),
        skipped=len(document.skipped),
        shards=shards,
        files=tuple(
            FileEntry(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files
        ),
        fingerprint=dataset_fingerprint(**described, shards=shards),
    )


def as_begun(source: ImageSource, begun: PreparationPlan | None) -> ImageSource:
    """The source as the release that began a data set listed it: earlier ones took fewer formats."""
    if begun is None or "exif" in begun.settings.model_fields_set:  # which these releases did not write
        return source
    return as_listed_before(source, begun.keys_sha256)


def begun_plan(storage: Storage) -> PreparationPlan | None:
    """The plan of the data set, finished or not, at `storage`; None if there is none.

    Raises:
        UserError: a document there is damaged.
    """
    if storage.read_if_present(DATASET_MANIFEST) is not None:
        raw = storage.read_if_present(PREPARATION)
        return read_document(PreparationDocument, raw, origin=storage.join(PREPARATION)).plan if raw else None
    raw = storage.read_if_present(PLAN)
    return read_document(PreparationPlan, raw, origin=storage.join(PLAN)) if raw else None
