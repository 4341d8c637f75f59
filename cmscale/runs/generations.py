"""Numbers the starts of a run: each claims the next number, and only the start with the highest may commit.

A number is claimed by creating a file that must not exist yet, which every shared file system does atomically, with or
without locks. The file says which job's start it was. `generation.json` repeats the highest number: opening a file
shows its newest content on NFS, where a listing may be some seconds old.
"""

import contextlib
import json
import os
import time

from cmscale.errors import UserError
from cmscale.io.durable import explained, replace_durably, sync_folder
from cmscale.io.json_text import parse_json
from cmscale.io.process import START, node_name
from cmscale.runs.folder import RunDir


def claim_next(run: RunDir) -> int:
    """Claims the next number for this start. No two starts get the same.

    Raises:
        UserError: `generation.json` is damaged and no number was claimed, or the folder cannot be written.
    """
    number = read_generation(run) + 1
    claim = {"start": os.environ.get(START, ""), "host": node_name(), "process": os.getpid(), "time": time.time()}
    with explained(run.generations):
        run.generations.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                descriptor = os.open(run.claimed_generation(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
                break
            except FileExistsError:
                number += 1
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(claim) + "\n")
            file.flush()
            os.fsync(descriptor)
        sync_folder(run.generations)
    # Of several starts that claim at once, the last to come here writes the highest number.
    while (highest := highest_claimed(run)) > _recorded(run, damaged=0):
        replace_durably(run.generation, json.dumps({"generation": highest}).encode())
    return number


def read_generation(run: RunDir) -> int:
    """The number of the newest start of the run; 0 before the first.

    Raises:
        UserError: `generation.json` is damaged, and no number was claimed.
    """
    highest = highest_claimed(run)
    return max(highest, _recorded(run, damaged=0 if highest else None))


def claimed_by(run: RunDir, number: int) -> str | None:
    """The start with a number as its job named it, `SUBMISSION/START`, empty outside a job; None if unknown."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(parse_json(run.claimed_generation(number).read_text())["start"])
    return None


def _recorded(run: RunDir, *, damaged: int | None) -> int:
    """The number in `generation.json`; `damaged` if that can't be read, unless it is None."""
    try:
        return int(parse_json(run.generation.read_text())["generation"])
    except FileNotFoundError:
        return 0
    except (ValueError, KeyError, TypeError, OverflowError):  # OverflowError: 1e999 is infinite
        if damaged is not None:
            return damaged
        raise UserError(f"{run.generation}: damaged; delete it once no job of this run is alive") from None


def highest_claimed(run: RunDir) -> int:
    """The highest claimed number; runs of releases that claimed none have only the recorded one."""
    with contextlib.suppress(FileNotFoundError):
        return max((int(name) for name in os.listdir(run.generations) if name.isdecimal()), default=0)  # noqa: PTH208
    return 0
