"""Defines what a preparation stores: its plan while it is unfinished, and with the data set how it was made."""

from pydantic import Field

from cmscale.io.storage import Storage
from cmscale.runs.manifests import DATASET_MANIFEST, Document, read_document
from data_prep.making.shards import DatasetSettings, SourceState
from data_prep.sources import ImageSource, as_listed_before

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
