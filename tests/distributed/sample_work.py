"""Draws sets of samples on several ranks; one of them may die in the middle."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from cmscale.generation import draw_job
from cmscale.generation.parts import Parts


def draw(request: dict[str, Any]) -> None:
    """Draws as a rank of a job."""
    print(draw_job.main(request))


def draw_noting_parts(request: dict[str, Any], notes: str) -> None:
    """Draws, and notes the parts that this rank draws."""
    _before_commit(lambda part: Path(notes).joinpath(f"{part.start}-{os.environ['RANK']}").touch())
    draw(request)


def die_at(request: dict[str, Any], start: int) -> None:
    """Draws until this rank is to store the part that begins with a sample, and is killed there."""

    def maybe_die(part: range) -> None:
        if part.start == start:
            os.kill(os.getpid(), signal.SIGKILL)

    _before_commit(maybe_die)
    draw(request)


def interrupted(request: dict[str, Any]) -> None:
    """Draws; after its first part rank 1 is asked to stop."""
    commit = Parts.commit

    def commit_and_signal(self: Parts, part: range, images: Any) -> None:
        commit(self, part, images)
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    Parts.commit = commit_and_signal
    draw(request)


def _before_commit(action: Any) -> None:
    commit = Parts.commit

    def acting(self: Parts, part: range, images: Any) -> None:
        action(part)
        commit(self, part, images)

    Parts.commit = acting
