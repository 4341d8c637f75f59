"""Runs `cmscale doctor` on the nodes of a Slurm job, and shows in what they differ."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cmscale.cli.finding import Finding
from cmscale.config.site import read_launch_settings
from cmscale.errors import UserError
from cmscale.io.json_text import parse_json
from cmscale.io.slurm import outside_of_jobs

_SIGN = "doctor-of-node "


def report_node(found: Sequence[Finding]) -> None:
    """Prints what a node found, for `doctor_of_nodes`."""
    import socket

    print(_SIGN + json.dumps({"node": socket.gethostname(), "findings": [vars(each) for each in found]}), flush=True)


def doctor_of_nodes(count: int, *, runs_dir: str, place: str | None = None) -> dict[str, list[Finding]]:
    """The findings of each of several nodes.

    Raises:
        UserError: there is no srun, or it refuses the job.
    """
    settings = read_launch_settings([]).slurm
    options = [f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.options().items()]
    if settings.partition:
        options.append(f"--partition={settings.partition}")
    if settings.gpus_per_node:
        options.append(f"--gpus-per-node={settings.gpus_per_node}")
    own = [sys.executable, "-m", "cmscale.cli", "doctor", "--of-node", "--runs-dir", runs_dir]
    own += [] if place is None else [place]
    command = [
        "srun",
        f"--nodes={count}",
        f"--ntasks={count}",
        "--ntasks-per-node=1",
        *options,
        *settings.srun_args,
        *own,
    ]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, env=outside_of_jobs())
    except FileNotFoundError:
        raise UserError("--nodes: no srun on the PATH; run this on a login node of the cluster") from None
    found = {}
    for line in ran.stdout.splitlines():
        if line.startswith(_SIGN):
            told: dict[str, Any] = parse_json(line.removeprefix(_SIGN))
            found[told["node"]] = [Finding(**each) for each in told["findings"]]
    if len(found) < count:
        last = (ran.stderr.strip().splitlines() or ["srun said nothing"])[-1]
        raise UserError(f"--nodes {count}: {len(found)} of {count} nodes answered: {last}")
    return found


def differing(nodes: Mapping[str, Sequence[Finding]]) -> list[str]:
    """The things that were not found alike on all nodes, but for room and names, which always differ."""
    found: dict[str, set[tuple[str, str]]] = {}
    for node, each_found in nodes.items():
        for each in each_found:
            same = each.found.replace(node, "NODE") if "free" not in each.found else ""
            found.setdefault(each.what, set()).add((each.state, same))
    counts = {
        what: sum(any(each.what == what for each in each_found) for each_found in nodes.values()) for what in found
    }
    return [what for what, states in found.items() if len(states) > 1 or counts[what] < len(nodes)]
