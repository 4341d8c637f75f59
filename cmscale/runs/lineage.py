"""Reads and writes where a run came from: the checkpoint of another run that it branched from, in provenance.json."""

import contextlib
import json
from typing import Any

from cmscale.io.json_text import parse_json
from cmscale.io.reading import read_regular
from cmscale.runs.folder import RunDir
from cmscale.runs.manifests import Document, NonNegative

BRANCH = "branch"
"""The key in provenance.json."""


class Lineage(Document):
    """The checkpoint that a run began with, and what it does otherwise than the run that wrote it.

    Attributes:
        parent: The folder or URL of the other run.
        samples: The cursor.
        generation: The start of that run which wrote the checkpoint.
        manifest_sha256: The hash of the checkpoint's manifest, which has those of all its files.
        changed: The keys of the config with another value: the parent's and the branch's.
        averages: The averages that the parent did not have, and those of the parent that they began with.
    """

    parent: str
    step: NonNegative
    samples: NonNegative
    generation: NonNegative
    manifest_sha256: str
    changed: dict[str, tuple[Any, Any]]
    averages: dict[str, str]

    def __str__(self) -> str:
        return f"{self.parent.rstrip('/').rpartition('/')[2]}@{self.step}"


def read_lineage(run: RunDir) -> Lineage | None:
    """Where a run branched off; None if it is no branch, or if that can't be read."""
    with contextlib.suppress(OSError, ValueError):
        document = parse_json(read_regular(run.provenance))
        if isinstance(document, dict) and document.get(BRANCH) is not None:
            return Lineage.model_validate_json(json.dumps(document[BRANCH]))
    return None
