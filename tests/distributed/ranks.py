"""Starts gloo ranks in tests: N processes that run one function and connect through a free port."""

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from warm import Forked

ROOT = Path(__file__).parents[2]


class RankFailed(AssertionError):
    """A rank ended with an error; the message holds the end of its stderr."""


@dataclass
class Rank:
    """A started rank; its output goes to files, so that it never blocks on a full pipe."""

    process: subprocess.Popen[bytes] | Forked
    out: IO[bytes]
    err: IO[bytes]

    def output(self) -> str:
        return _text(self.out)

    def errors(self) -> str:
        return _text(self.err)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def run_ranks(num_ranks: int, function: str, *arguments: Any, timeout: float = 240.0) -> list[str]:
    """Runs `module:function(*arguments)` (JSON values) in N processes; returns their stdout by rank.

    Raises:
        RankFailed: a rank failed or took too long. Names it and shows the end of its errors; the others are
        killed.
    """
    ranks = start_ranks(num_ranks, function, *arguments)
    failed = wait(ranks, timeout=timeout)
    if failed:
        ends = "".join(f"\nrank {r}: exit {ranks[r].process.returncode}\n{ranks[r].errors()[-3000:]}" for r in failed)
        raise RankFailed(f"{function} on {num_ranks} ranks failed{ends}")
    return [rank.output() for rank in ranks]


def wait(ranks: list[Rank], *, timeout: float) -> list[int]:
    """Waits until all ranks have succeeded or one has failed, and kills the rest. Returns those that failed."""
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            codes = [rank.process.poll() for rank in ranks]
            failed = [number for number, code in enumerate(codes) if code]
            if failed or None not in codes:
                return failed
            time.sleep(0.02)
        return list(range(len(ranks)))
    finally:
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.kill()
            rank.process.wait()


def start_ranks(
    num_ranks: int,
    function: str,
    *arguments: Any,
    inside: Sequence[Sequence[str]] | None = None,
    more: Mapping[str, str] | None = None,
) -> list[Rank]:
    """Starts the processes of `run_ranks` and leaves them to the caller.

    Args:
        inside: for each rank a command that runs its command (`ip netns exec NAME`).
        more: Additional environment variables.
    """
    port = free_port()
    ranks = []
    for rank in range(num_ranks):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": str(ROOT),
            **(more or {}),
        }
        out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        if inside is None:
            process = Forked(function, arguments, environment, out, err)
        else:
            command = [*inside[rank], sys.executable, str(Path(__file__)), function, json.dumps(arguments)]
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err)
        ranks.append(Rank(process, out, err))
    return ranks


def free_port() -> int:
    """A port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_rank(function: str, arguments: str) -> NoReturn:
    """Runs `module:function` with arguments in JSON as the rank that the environment names. Ends the process."""
    module_name, _, function_name = function.partition(":")
    getattr(importlib.import_module(module_name), function_name)(*json.loads(arguments))
    # real ranks end this way too: an interpreter that exits with gloo's threads alive sometimes aborts
    importlib.import_module("cmscale.distributed.world").disconnect()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    run_rank(*sys.argv[1:])
