"""Opens the runs that a command shows together."""

from collections.abc import Sequence
from pathlib import Path

from cmscale.errors import UserError
from cmscale.io.place import Place
from cmscale.runs.folder import RunDir
from cmscale.runs.meant import no_run


def runs_at(places: Sequence[Place], what: str) -> list[RunDir]:
    """The folders of runs that are shown together.

    Raises:
        UserError: one is not local, is no run, or is named twice.
    """
    folders = [RunDir(place.local(what)) for place in places]
    seen: dict[Path, Place] = {}
    for each, place in zip(folders, places, strict=True):
        if not each.config.is_file():
            raise no_run(each.root)
        if (first := seen.setdefault(each.root.resolve(), place)) is not place:
            raise UserError(f"{place}: is the same run as {first}; name each run once")
    return folders
