"""Decides which start of a run may commit: its newest, and none whose run was continued in another folder."""

import contextlib
import re
import time
from collections.abc import Callable

from cmscale.distributed.collectives import any_rank, from_main, on_main
from cmscale.distributed.world import World
from cmscale.engine.staged import remove
from cmscale.errors import UserError
from cmscale.runs.checkpoints import leftovers
from cmscale.runs.folder import RunDir, step_name
from cmscale.runs.generations import claim_next, read_generation
from cmscale.runs.log import write_event

LOOK_SECONDS = 10.0  # between two looks for a newer start


class CheckpointFailed(RuntimeError):
    """Raised if a checkpoint could not be written and training must stop for that."""


class FolderGone(OSError):
    """Raised if the run's folder does not show this start: it was moved or removed, or is no longer mounted."""


class Fenced(CheckpointFailed):
    """Raised if a newer start of the run exists: this one commits nothing more and ends."""


def claim_generation(run: RunDir) -> int:
    """Makes this start of the run its newest. Collective.

    From then on no older start commits; unfinished saves of older starts are removed.
    """

    def claim() -> int:
        generation = claim_next(run)
        for step, kind, leftover in leftovers(run):
            final = leftover.with_name(step_name(step))
            if kind == "replaced" and not final.exists():  # killed between the two renames of a commit
                with contextlib.suppress(FileNotFoundError):  # another start did the same
                    leftover.rename(final)
                continue
            if _writer(leftover.name) > generation:  # of a newer start that works already
                continue
            if kind == "save":
                why = f"{leftover.name}: an earlier start ended before this save was complete; removed"
                write_event(run, "unfinished_save", step=step, rank=0, why=why)
            remove(leftover)
        return generation

    return from_main(on_main(claim))


def _writer(leftover: str) -> int:
    """The start that made a hidden folder of checkpoints, such as `.step-000000020.start-1.save-2`; 0 if unknown."""
    found = re.search(r"\.(?:start|replaced|removed)-(\d+)", leftover)
    return int(found[1]) if found else 0


class Fence:
    """What a rank knows of newer starts of its run.

    Attributes:
        generation: This start's number, from `claim_generation`.
        known: The error by which this start ends, once a newer one was seen.

    Args:
        went_elsewhere: Says why the run may not go on here, if it was continued in another folder; else nothing.
    """

    def __init__(self, run: RunDir, world: World, generation: int, went_elsewhere: Callable[[], str]) -> None:
        self.generation = generation
        self._run = run
        self._world = world
        self._went_elsewhere = went_elsewhere
        self._looked = time.monotonic()
        self.known: Fenced | None = None

    def must_be_newest(self) -> None:
        """Raises Fenced if a newer start exists; UserError or OSError if storage does not tell."""
        newest = read_generation(self._run)
        if newest < self.generation:  # a node that has lost the shared folder sees an empty one
            raise FolderGone(
                f"{self._run.root}: shows no start {self.generation}, which is this one; "
                "was it moved or removed, or is it not mounted?"
            )
        if newest > self.generation:
            why = f"start {newest} of the run has taken over from start {self.generation}; nothing committed"
            self.known = Fenced(why)
            raise self.known

    def is_gone(self) -> bool:
        """Whether the run's folder, as this rank sees it, does not show this start; no if storage does not tell."""
        with contextlib.suppress(OSError, UserError):
            return read_generation(self._run) < self.generation
        return False

    def look(self) -> Fenced | None:
        """The error by which this start ends if there is a newer one; None also if storage does not tell."""
        if why := self._went_elsewhere():
            self.known = Fenced(why)
        else:
            with contextlib.suppress(Fenced, OSError, UserError):
                self.must_be_newest()
        return self.known

    def overtaken(self) -> bool:
        """Whether this rank knows of a newer start of the run. Rank 0 looks for one every 10 seconds."""
        if self._world.is_main and time.monotonic() >= self._looked + LOOK_SECONDS:
            self._looked = time.monotonic()
            self.look()
        return self.known is not None

    def end_if_overtaken(self) -> None:
        """Ends this start if any rank knows of a newer one. Collective.

        Raises:
            Fenced: on every rank.
        """
        if any_rank(self.known is not None):
            raise self.known or Fenced("a newer start of the run has taken over")
