"""Starts processes that prepare batches, and says what can be done if one is killed or has no memory left."""

import multiprocessing.queues
import re
import signal
from typing import Any

import torch

_NO_MEMORY = re.compile("^unable to allocate shared memory")
# The others if the rank notices by the end of the worker's pipe, before it gets the signal of the worker's end.
_KILLED = re.compile(
    r"DataLoader worker (\(pid.*\) (is killed by signal: Killed|exited unexpectedly)|ended before it returned)"
)


def start_worker(_: int) -> None:
    """Sets up a worker. The rank handles preemption, and needs its batches until it has saved."""
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):  # workers end with their parent
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    # Python prints what keeps a batch from being sent, and goes on: the rank would wait for that batch for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_the_error  # pyright: ignore[reportAttributeAccessIssue]


def _send_the_error(queue: Any, error: Exception, unsent: Any) -> None:
    """Sends the error in the place of its batch; only text, so that it needs no shared memory."""
    number, _ = unsent
    queue.put((number, with_advice(error)))


def with_advice(error: Exception) -> Exception:
    """The error with what can be done, if a worker was killed or has no memory to hand its batch over in."""
    text = " ".join(str(error).split())
    if _KILLED.search(text):
        return RuntimeError(
            f"{text.rstrip('.')} (by hand, or memory ran out: see dmesg; fewer data.workers take less, "
            "slurm.mem_gb requests more)"
        )
    if _NO_MEMORY.search(text):
        return RuntimeError(
            f"/dev/shm: a data worker can't hand over its batch ({text}); free some (cmscale doctor shows what killed "
            "workers left), give a container --shm-size=8g, or set data.workers=0"
        )
    return error
