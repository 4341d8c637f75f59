"""Owns provenance.json, the record of a run's starts: read whole, changed under a lock, never half written."""

import json
from collections.abc import Callable
from typing import Any

from cmscale.io.durable import replace_durably
from cmscale.io.json_text import parse_json
from cmscale.io.locks import hold
from cmscale.io.reading import read_regular
from cmscale.runs.folder import RunDir

Document = dict[str, Any]


def read_starts(run: RunDir) -> list[dict[str, Any]]:
    """The recorded starts, oldest first. A damaged file is kept under another name, and counts as none."""
    return [start for start in _read(run).get("starts", ()) if isinstance(start, dict)]


def change_record(run: RunDir, change: Callable[[Document], Document]) -> None:
    """Replaces the record by what `change` makes of it; an empty one has no `starts`.

    Raises:
        OSError: the record can't be written.
        UserError: another process holds its lock.
    """
    with hold(run.logs / ".provenance.lock", timeout=60, what=f"{run.provenance}"):
        document = change(_read(run))
        replace_durably(run.provenance, (json.dumps(document, indent=1) + "\n").encode())


def add_to_newest_start(run: RunDir, **facts: Any) -> None:
    """Adds what is known once a start trains. A run that records no starts gets no record.

    Raises:
        OSError, UserError: as `change_record`.
    """

    def added(document: Document) -> Document:
        starts = list(document["starts"])
        newest = max(place for place, start in enumerate(starts) if isinstance(start, dict))
        starts[newest] = starts[newest] | facts
        return document | {"starts": starts}

    if read_starts(run):
        change_record(run, added)


def _read(run: RunDir) -> Document:
    try:
        document = parse_json(read_regular(run.provenance))
        return {**document, "starts": list(document["starts"])}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        run.provenance.replace(run.provenance.with_suffix(".damaged.json"))
        return {}
