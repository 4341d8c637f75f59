"""Copies to `checkpoint.export_to` what earlier starts of a run left, for the command `cmscale export`."""

from collections.abc import Callable, Iterable
from pathlib import Path

from cmscale.config.sections import Checkpoint
from cmscale.engine.copying import DamagedUpload, export_checkpoint
from cmscale.errors import NotExported, UserError
from cmscale.io import traffic
from cmscale.runs.copies import Copied, exported_run, pending_copies
from cmscale.runs.folder import RunDir
from cmscale.runs.homes import WentElsewhere, must_be_home

_NAMED = 5


def export_pending(
    run: RunDir,
    export_to: str,
    settings: Checkpoint | None = None,
    *,
    copied: Callable[[Copied], None] = lambda _: None,
) -> list[Copied]:
    """Copies what earlier starts left. Returns what it copied.

    Args:
        copied: Is called with each.

    Raises:
        ConnectionError: the storage does not answer.
        WentElsewhere: the run was continued in another folder.
        NotExported: some could not be copied; the others are.
    """
    storage = exported_run(run, export_to)
    done: list[Copied] = []
    failed: dict[Copied, str] = {}
    must_be_home(storage, run)
    for each in pending_copies(run, export_to, settings):
        folder = run.root / each.key
        try:
            with traffic.showing(f"uploading {folder.name} and reading it back", 2 * _size_of(folder)):
                is_there = export_checkpoint(folder, storage.sub(each.key), home=lambda: must_be_home(storage, run))
            if is_there:
                done.append(each)
                copied(each)
            else:
                failed[each] = "another of this step is there already; it was not changed"
        except (ConnectionError, WentElsewhere):
            raise
        except (UserError, DamagedUpload, OSError) as error:
            failed[each] = str(error)
    if failed:
        raise NotExported(f"step {named(failed)} is not in {export_to}: {next(iter(failed.values()))}")
    return done


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def named(copies: Iterable[Copied]) -> str:
    """`1, 2, 3, 4, 5 and 7 more`, for messages."""
    ordered = sorted(copies)
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return ", ".join(map(str, ordered[:_NAMED])) + more
