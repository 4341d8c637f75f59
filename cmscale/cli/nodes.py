"""Runs `cmscale doctor` on the nodes of a Slurm job, and shows in what they differ."""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmscale.cli.finding import Finding
from cmscale.cli.machine import nearest
from cmscale.config.site import read_launch_settings
from cmscale.errors import UserError
from cmscale.io.counting import Counting
from cmscale.io.job_environment import outside_of_jobs
from cmscale.io.json_text import parse_json
from cmscale.io.process import node_name

_SIGN = "doctor-of-node "
_SHARED = "sharing of the folder of runs"
_END_SECONDS = 30.0  # for srun to end its job
_MEASURED = re.compile(r"[\d.]+ (?:ms\b|[KMGT]i?B free)|probe-[0-9a-f]{32}")


def report_node(found: Sequence[Finding]) -> None:
    """Prints what a node found, for `doctor_of_nodes`."""
    print(_SIGN + json.dumps({"node": node_name(), "findings": [vars(each) for each in found]}), flush=True)


def shared(sign: str | None) -> Iterator[Finding]:
    """Whether a node sees the file that the asking machine has written in the folder of runs; None if it could not."""
    if sign is None:
        return
    folder = Path(sign).parent
    if Path(sign).exists():
        yield Finding(_SHARED, "ok", f"{folder}: the same folder as on the machine that asks")
    else:
        found = f"{folder}: another folder than on the machine that asks"
        yield Finding(_SHARED, "failure", found, "give a --runs-dir that all nodes mount")


def doctor_of_nodes(count: int, *, runs_dir: Path, place: str | None = None) -> dict[str, list[Finding]]:
    """The findings of each of several nodes. What srun says, such as that its job waits, is shown at once.

    Raises:
        UserError: there is no srun, or it refuses the job.
    """
    settings = read_launch_settings([]).slurm
    options = [f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.options().items()]
    if settings.partition:
        options.append(f"--partition={settings.partition}")
    if settings.gpus_per_node:
        options.append(f"--gpus-per-node={settings.gpus_per_node}")
    own = [sys.executable, "-m", "cmscale", "doctor", "--of-node", "--runs-dir", str(runs_dir)]
    own += [] if place is None else [place]
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # this machine may not write there, but nodes may
            sign = stack.enter_context(tempfile.NamedTemporaryFile(dir=nearest(runs_dir), prefix=".cmscale-doctor-"))
            own += ["--sign", sign.name]
        return _answers(count, [*options, *settings.srun_args, *own])


def _answers(count: int, job: Sequence[str]) -> dict[str, list[Finding]]:
    """What each node of srun's job prints."""
    command = [
        "srun",
        f"--nodes={count}",
        f"--ntasks={count}",
        "--ntasks-per-node=1",
        *job,
    ]
    found: dict[str, list[Finding]] = {}

    print(f"trying {count} nodes as soon as the job starts", file=sys.stderr, flush=True)
    with Counting("trying nodes", total=count, unit="nodes") as counting:

        def take(line: str) -> None:
            if line.startswith(_SIGN):
                told: dict[str, Any] = parse_json(line.removeprefix(_SIGN))
                found[told["node"]] = [Finding(**each) for each in told["findings"]]
                counting.set(len(found))

        errors = _said(command, take)
    if len(found) < count:
        names = f" ({', '.join(sorted(found))})" if found else ""
        last = (errors or ["srun said nothing"])[-1]
        raise UserError(f"--nodes {count}: {len(found)} of {count} nodes answered{names}: {last}")
    return found


def _said(command: Sequence[str], take: Callable[[str], None]) -> list[str]:
    """The lines of a command's stderr, which are also printed as they come.

    Args:
        take: Gets each line of its stdout as it comes.

    Raises:
        UserError: there is no such program.
    """
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=outside_of_jobs()
        )
    except FileNotFoundError:
        raise UserError("--nodes: no srun on the PATH; run this on a login node of the cluster") from None
    errors: list[str] = []

    def show(lines: Iterable[str]) -> None:
        for line in filter(None, map(str.rstrip, lines)):
            errors.append(line)
            print(line, file=sys.stderr, flush=True)

    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        showing = threading.Thread(target=show, args=(process.stderr,), daemon=True)
        showing.start()
        try:
            for line in process.stdout:
                take(line.rstrip("\n"))
        except BaseException:  # Ctrl-C alone does not end a job that runs already
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
            raise
        showing.join()
    return errors


def differing(nodes: Mapping[str, Sequence[Finding]]) -> list[str]:
    """The things that were not found alike on all nodes, but for room, times and names, which always differ."""
    found: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for node, each_found in nodes.items():
        for each in each_found:
            found.setdefault(each.what, {}).setdefault(node, []).append((each.state, unmeasured(each.found, node)))
    return [
        what for what, of_nodes in found.items() if len({*map(tuple, (of_nodes.get(node, ()) for node in nodes))}) > 1
    ]


def unmeasured(found: str, node: str) -> str:
    """What was found without the node's name and what is never measured twice alike."""
    return _MEASURED.sub("", found.replace(node, "NODE"))
