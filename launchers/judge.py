"""Judges how one start of a job ended, from what its ranks reported and what the cluster saw. No I/O."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cmscale.io.durable import NO_SPACE

Ending = Literal[
    "finished", "not_exported", "preempted", "time_limit", "cancelled", "superseded", "user_error", "no_space", "fault"
]
SUPERSEDED = "another job has started this run since and has taken over"
RankState = Literal["running", "finished", "not_exported", "preempted", "superseded", "user_error", "no_space", "fault"]


FULL_DISK_OF_NODE = re.compile(rf" on (?P<node>[^\s:]+): {NO_SPACE}")
"""In the message of a rank about a full disk that is a node's own, such as that of its cache."""
OUTAGE = re.compile(r"\bStorageAway: ")
"""In the message of a rank that has waited for storage in vain."""


@dataclass(frozen=True)
class RankEnd:
    """The last report of one rank in one start. A rank that was killed stays `running`."""

    rank: int
    host: str
    end: RankState
    message: str = ""


@dataclass(frozen=True)
class RankFailure:
    """The rank that failed first, as the cluster saw it: `how` is a signal or an exit status, in words.

    `rank` is None where the cluster could not even start the ranks of the node.
    """

    rank: int | None
    node: str
    how: str


@dataclass(frozen=True)
class Attempt:
    """One start of a job that has ended.

    Attributes:
        ending: How it ended; `not_exported` is finished, but without some copies of its results.
        message: Why.
        step: The step of the newest checkpoint; -1 if there is none.
        rank: The rank that `message` is about.
        node: The node of that rank; empty if no rank is to blame.
        measured: For an evaluation, what all evaluations of its run had stored by then; for samples, what is drawn. Two
            starts with equal values made no progress between them.
    """

    ending: Ending
    message: str
    step: int
    rank: int = 0
    node: str = ""
    measured: str = ""


def judge(
    ends: Sequence[RankEnd],
    *,
    status: int,
    first_failure: RankFailure | None,
    step: int,
    leaving: Ending | None,
) -> Attempt:
    """Decides how a start ended.

    Args:
        ends: The reports of its ranks, earliest first.
        status: The exit status of the whole start: srun's, or the worst rank's.
        first_failure: The rank that failed first; None if the cluster saw no rank fail.
        step: The step of the newest checkpoint; -1 if there is none.
        leaving: `preempted`, `time_limit` or `cancelled` if the cluster was ending the job; None otherwise.
    """
    if blamed := _first(ends, "user_error"):  # no other start would mend it
        return _blamed("user_error", blamed, step)
    if (full := _first(ends, "no_space")) and leaving != "cancelled":
        found = FULL_DISK_OF_NODE.search(full.message)  # ranks may hear it from the one on the node
        return Attempt("no_space", full.message, step, full.rank, found["node"] if found else full.host)
    if _first(ends, "superseded"):  # ranks that it takes by surprise may fail
        return Attempt("superseded", SUPERSEDED, step)
    if status == 0 and ends and all(end.end == "finished" for end in ends):
        return Attempt("finished", "", step)
    not_exported = _first(ends, "not_exported")
    if not_exported and status == 0 and all(end.end in ("finished", "not_exported") for end in ends):
        return _blamed("not_exported", not_exported, step)
    if leaving:  # checked before faults: ranks of which some were ended already report errors that mean nothing
        return Attempt(leaving, f"newest checkpoint: step {step}" if step >= 0 else "no checkpoint yet", step)
    outage = next((end for end in ends if end.end == "fault" and OUTAGE.search(end.message)), None)
    if outage:  # other ranks that lose it report errors that mean nothing
        return _blamed("fault", outage, step)
    if first_failure:
        if first_failure.rank is None:
            message = f"{first_failure.node}: no rank could be started there: {first_failure.how}"
            return Attempt("fault", message, step, node=first_failure.node)
        report = next((end for end in ends if end.rank == first_failure.rank), None)
        if report is not None and report.end == "fault":
            return _blamed("fault", report, step)
        # It was killed before it could report anything; errors of other ranks are consequences.
        message = f"rank {first_failure.rank} on {first_failure.node}: {first_failure.how}"
        is_one = not re.search(r"[\[,]", first_failure.node)  # srun names ranks that end alike together: n[1,3-5]
        return Attempt("fault", message, step, first_failure.rank, first_failure.node if is_one else "")
    fault = _first(ends, "fault")
    if fault:
        return _blamed("fault", fault, step)
    if status == 0 and ends and all(end.end in ("finished", "preempted") for end in ends):
        return Attempt("preempted", "", step)
    return Attempt("fault", f"the processes ended with status {status} and no rank reported a reason", step)


def _first(ends: Sequence[RankEnd], state: RankState) -> RankEnd | None:
    return next((end for end in ends if end.end == state), None)


def _blamed(ending: Ending, report: RankEnd, step: int) -> Attempt:
    return Attempt(ending, report.message, step, report.rank, report.host)
