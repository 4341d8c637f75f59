"""Decides what follows after a start of a job has ended: nothing, the queue again, a restart, or a stop. No I/O."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

from launchers.judge import FULL_DISK_OF_NODE, OUTAGE, Attempt

MAX_STARTS_WITHOUT_PROGRESS = 3
MAX_OUTAGES_IN_A_ROW = 6
"""Starts without progress that ended as storage did not answer for `storage.patience_minutes`, each after that time."""
LONGEST_BACKOFF_SECONDS = 300
FAULTS_OF_A_BAD_NODE = 2

# What a rank reports of itself: `RuntimeError: after step 500: ...`. A rank that was killed reports nothing.
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*: ")
# Exceptions whose cause lies outside of the program: networks, storage, peers that were lost.
_FROM_OUTSIDE = re.compile(
    r"^\w*(Connection|Timeout|TimedOut|Network|Dist|Storage|Endpoint|Client|Proxy|SSL|OSError|IOError|BrokenPipe)\w*:"
    r"|[Cc]onnection (was )?(closed|reset|refused|aborted)|[Tt]imed? ?out|[Nn]o space left|[Ii]nput/output error"
    r"|[Ss]tale file handle|temporarily unavailable|[Uu]nreachable|NCCL|[Gg]loo"
)
# What CUDA says of a device or driver that fails, and the loader of a library that a node lacks. Left out is what the
# program does wrong on every node: assertions, arguments, code for other devices.
_OF_A_NODE = re.compile(
    r"CUDA error: (?!device-side assert|invalid (?!device ordinal)|misaligned|no kernel image|the provided PTX"
    r"|operation not|CUBLAS_STATUS_(INVALID_VALUE|NOT_SUPPORTED|ARCH_MISMATCH))"
    r"|CUDA (driver|unknown|initialization)|cudaGetDeviceCount|No CUDA GPUs"
    r"|CU(DNN|BLAS)_STATUS_(INTERNAL_ERROR|EXECUTION_FAILED|MAPPING_ERROR|NOT_INITIALIZED|ALLOC_FAILED)"
    r"|cannot open shared object file"
)

Action = Literal["done", "requeue", "restart", "stop"]


@dataclass(frozen=True)
class Decision:
    """What to do next, and why.

    Attributes:
        action: `requeue` is the same job in the queue again, `restart` is a new start after a fault.
        why: One line for events and users.
        delay_seconds: The pause before a restart.
        exclude: Nodes that a restart should avoid.
    """

    action: Action
    why: str
    delay_seconds: int = 0
    exclude: tuple[str, ...] = ()


def in_words(attempt: Attempt, decision: Decision) -> str:
    """How a start ended, and why, for logs; a reason that begins with how it ended says both."""
    ending = attempt.ending.replace("_", " ")
    return decision.why if decision.why.startswith(ending) else f"{ending}: {decision.why}"


def decide(
    history: Sequence[Attempt],
    *,
    max_restarts: int,
    backoff_seconds: int,
    can_requeue: bool,
    go_on: str,
) -> Decision:
    """Decides what follows after the last start in `history`. Preemptions and time limits use up no restart.

    Args:
        history: The starts of one submission, oldest first; at least one.
        max_restarts: The number of restarts after faults.
        backoff_seconds: The pause before the first restart; it doubles while restarts bring no progress.
        can_requeue: Whether the cluster has a queue to return to after a time limit.
        go_on: What a user does to continue after a stop.
    """
    last = history[-1]
    match last.ending:
        case "finished":
            return Decision("done", "finished")
        case "no_space" if can_requeue and _is_disk_of_node(last):
            return _after_full_disk(history, max_restarts=max_restarts, backoff_seconds=backoff_seconds)
        case "user_error" | "no_space" | "not_exported":
            return Decision("stop", last.message)
        case "superseded":
            return Decision("stop", f"{last.message}; this one has ended and is not started again")
        case "cancelled":
            return Decision("stop", f"cancelled; {last.message}; {go_on}")
        case "time_limit":
            return _after_time_limit(history, can_requeue=can_requeue, go_on=go_on)
        case "preempted":
            return Decision("requeue", f"preempted; {last.message or f'step {last.step}'}")
        case "fault":
            if is_outage(last):
                return _after_outage(history, backoff_seconds=backoff_seconds, go_on=go_on)
            faults = _faults(history)
            if can_requeue and _repeats(faults):
                why = f"the same failure twice at step {max(last.step, 0)}, so a third start would fail too"
                return Decision("stop", f"{why}: {last.message}")
            return _after_fault(faults, max_restarts=max_restarts, backoff_seconds=backoff_seconds)
        case _:
            assert_never(last.ending)


def _after_time_limit(history: Sequence[Attempt], *, can_requeue: bool, go_on: str) -> Decision:
    last = history[-1]
    if not can_requeue:
        return Decision("stop", f"time limit reached; {last.message}; {go_on}")
    if _starts_without_progress(history) >= MAX_STARTS_WITHOUT_PROGRESS:
        return Decision("stop", f"no progress before the time limit, three times; {last.message}; ask for more --time")
    return Decision("requeue", f"time limit; {last.message or f'step {last.step}'}")


def is_outage(attempt: Attempt) -> bool:
    """Whether a start ended as storage did not answer: no fault of the program, however often it comes."""
    return attempt.ending == "fault" and bool(OUTAGE.search(attempt.message))


def _faults(history: Sequence[Attempt]) -> list[Attempt]:
    """The starts that another node might have carried further."""
    return [each for each in history if (each.ending == "fault" and not is_outage(each)) or _is_disk_of_node(each)]


def _is_disk_of_node(attempt: Attempt) -> bool:
    """Whether a start ended as the disk of one node was full, such as that of its cache: other nodes have their own."""
    return attempt.ending == "no_space" and bool(FULL_DISK_OF_NODE.search(attempt.message))


def _after_full_disk(history: Sequence[Attempt], *, max_restarts: int, backoff_seconds: int) -> Decision:
    """The next start avoids the node; if it met the same full disk nonetheless, or all nodes share it, it is told."""
    last = history[-1]
    if any(_is_disk_of_node(earlier) and earlier.node == last.node for earlier in history[:-1]):
        return Decision("stop", last.message)
    return _after_fault(_faults(history), max_restarts=max_restarts, backoff_seconds=backoff_seconds)


def _after_outage(history: Sequence[Attempt], *, backoff_seconds: int, go_on: str) -> Decision:
    """An outage uses up no restart; only a storage that stays away for hours, through many starts, is given up."""
    last = history[-1]
    outages = [attempt for attempt in history if is_outage(attempt)]
    in_a_row = _starts_without_progress(outages)
    if in_a_row >= MAX_OUTAGES_IN_A_ROW:
        return Decision(
            "stop", f"storage did not answer in {in_a_row} starts without progress; {last.message}; {go_on}"
        )
    delay = min(backoff_seconds * 2 ** (in_a_row - 1), LONGEST_BACKOFF_SECONDS)
    return Decision("restart", last.message, delay)


def _after_fault(faults: Sequence[Attempt], *, max_restarts: int, backoff_seconds: int) -> Decision:
    last = faults[-1]
    in_a_row = _starts_without_progress(faults)
    if in_a_row >= MAX_STARTS_WITHOUT_PROGRESS:
        since = last.measured or f"step {max(last.step, 0)}"
        return Decision("stop", f"{in_a_row} failures without progress since {since}: {last.message}")
    if len(faults) > max_restarts:
        return Decision("stop", f"failed {len(faults)} times (restart.max_restarts {max_restarts}): {last.message}")
    delay = min(backoff_seconds * 2 ** (in_a_row - 1), LONGEST_BACKOFF_SECONDS)
    return Decision("restart", last.message, delay, _bad_nodes(faults))


def _repeats(faults: Sequence[Attempt]) -> bool:
    """Whether the last two faults are one exception of the program at one place, such as a loss that is not finite.

    A fault that names its node is not, nor one of its devices: another node may do better. Nor is one that comes from
    outside of the program.
    """
    if len(faults) < 2:
        return False
    before, last = faults[-2:]
    is_same = (_without_addresses(before.message), before.step, before.measured) == (
        _without_addresses(last.message),
        last.step,
        last.measured,
    )
    names_node = any(fault.node and fault.node in fault.message for fault in (before, last))
    may_pass = names_node or any(cause.search(last.message) for cause in (_FROM_OUTSIDE, _OF_A_NODE))
    return is_same and bool(_EXCEPTION.match(last.message)) and not may_pass


def _without_addresses(message: str) -> str:
    """A message without what differs between two starts though the fault is the same: addresses in memory."""
    return re.sub(r"0x[0-9a-f]+", "0x", message)


def _starts_without_progress(attempts: Sequence[Attempt]) -> int:
    """How many of the last attempts ended at the same place as the very last one."""
    place = (attempts[-1].step, attempts[-1].measured)
    count = 0
    for attempt in reversed(attempts):
        if (attempt.step, attempt.measured) != place:
            break
        count += 1
    return count


def _bad_nodes(faults: Sequence[Attempt]) -> tuple[str, ...]:
    """Nodes whose disk was full, or on which two starts failed first: one failure does not show whose fault it is."""
    nodes = [fault.node for fault in faults if fault.node]
    full = {fault.node for fault in faults if _is_disk_of_node(fault)}
    return tuple(sorted(full | {node for node in nodes if nodes.count(node) >= FAULTS_OF_A_BAD_NODE}))
