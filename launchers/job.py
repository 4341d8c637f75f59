"""Owns what each rank of a job does around its worker: environment, early signals, the end."""

import contextlib
import importlib
import os
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import submitit

from cmscale.errors import UserError
from cmscale.runs.folder import RunDir
from launchers.outcome import RankEnd, attempt_folder, write_rank_end

# Set where SIGTERM or the user signal came before the worker had handlers of its own: it should stop at once.
EARLY_SIGNAL = "CMSCALE_EARLY_SIGNAL"

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """What submitit pickles: a worker by name, `module:function`, and its arguments (plain values).

    The worker returns `finished` or `preempted`. A UserError ends the rank with status 2 and one line,
    anything else that is raised with status 1 and a traceback.
    """

    worker: str
    args: tuple[Any, ...]
    run_dir: str
    master_port: int | None = None

    def __call__(self) -> NoReturn:
        environment = submitit.JobEnvironment()
        self._stop_on_signals()
        if environment.cluster == "local":
            _die_with_parent()
        # A rank killed while submitit wrote a pickle left these, and submitit would fail on them.
        for pickle in (environment.paths.result_pickle, environment.paths.submitted_pickle):
            pickle.with_suffix(f"{pickle.suffix}.save_tmp").unlink(missing_ok=True)
        set_rank_environment(environment, master_port=self.master_port)
        rank, folder = environment.global_rank, attempt_folder(RunDir(Path(self.run_dir)))
        host = socket.gethostname()
        write_rank_end(folder, RankEnd(rank=rank, host=_node_name(), end="running"))
        try:
            module, _, function = self.worker.partition(":")
            end = getattr(importlib.import_module(module), function)(*self.args)
        except UserError as error:
            write_rank_end(folder, RankEnd(rank=rank, host=_node_name(), end="user_error", message=str(error)))
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        except Exception as error:
            message = " ".join(f"{type(error).__name__}: {error}".split())
            write_rank_end(folder, RankEnd(rank=rank, host=_node_name(), end="fault", message=message))
            traceback.print_exc()
            print(f"rank {rank} on {host} failed", file=sys.stderr, flush=True)
            # Not by raising: threads and children that a fault leaves behind must not keep the rank alive.
            sys.stdout.flush()
            os._exit(1)
        assert end in ("finished", "preempted"), f"{self.worker} returned {end!r}"
        write_rank_end(folder, RankEnd(rank=rank, host=_node_name(), end=end))
        # Not by returning: an upload to storage that hangs, or wandb's last words, would keep the rank until the
        # cluster kills it, and with it what follows in the batch script.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def _stop_on_signals(self) -> None:
        """Takes both signals from submitit, which drops SIGTERM and requeues on a count of time limits."""

        def note(number: int, _: FrameType | None) -> None:
            os.environ[EARLY_SIGNAL] = signal.Signals(number).name

        signal.signal(signal.SIGTERM, note)
        signal.signal(signal.SIGUSR2, note)


def set_rank_environment(environment: submitit.JobEnvironment, *, master_port: int | None) -> None:
    """The four variables of a rank, MASTER_ADDR and MASTER_PORT, and OMP_NUM_THREADS unless it is given."""
    local_ranks = environment.num_tasks // environment.num_nodes
    cpus = os.environ.get("SLURM_CPUS_PER_TASK") or str(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    os.environ.update(
        RANK=str(environment.global_rank),
        WORLD_SIZE=str(environment.num_tasks),
        LOCAL_RANK=str(environment.local_rank),
        LOCAL_WORLD_SIZE=str(local_ranks),
        MASTER_ADDR="127.0.0.1" if environment.num_nodes == 1 else _first_address(environment.hostnames[0]),
        MASTER_PORT=str(master_port or slurm_port(environment.job_id, os.environ.get("SLURM_RESTART_COUNT", "0"))),
    )
    os.environ.setdefault("OMP_NUM_THREADS", cpus)


def slurm_port(job_id: str, restart: str) -> int:
    """A port that all ranks derive alike, below the ephemeral ones, another one after each restart."""
    return 10000 + (int(job_id.split("_")[0]) * 37 + int(restart)) % 20000


def _first_address(host: str) -> str:
    """The first node's address: by name, or as srun knows itself (it runs on the first node)."""
    with contextlib.suppress(OSError):
        return socket.gethostbyname(host)
    return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", host)


def _node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _die_with_parent() -> None:
    """No rank outlives its controller, however that one ends."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
