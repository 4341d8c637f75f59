"""Tries the services around a machine, for `cmscale doctor`: Slurm and wandb."""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from cmscale.cli.finding import Finding

_ANSWER_SECONDS = 5.0  # of a command of Slurm, or of a server


def slurm() -> Iterator[Finding]:
    """Whether Slurm answers, and how it treats jobs that are preempted or whose node fails."""
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        yield Finding("Slurm", "warning", "no sbatch on the PATH", "jobs run on this machine; else use a login node")
        return
    answer = _said("scontrol", "ping")
    if answer is None or "UP" not in answer:
        found = f"{sbatch}, but its controller does not answer: {' '.join((answer or 'no answer').split())}"
        yield Finding("Slurm", "failure", found, "ask the site's administrators; jobs can't be submitted")
        return
    yield Finding("Slurm", "ok", f"{sbatch}; its controller answers")
    settings = {}
    for line in (_said("scontrol", "show", "config") or "").splitlines():
        name, equals, value = line.partition("=")
        if equals:
            settings[name.strip()] = value.strip()
    if settings.get("JobRequeue") == "0":
        yield Finding("requeue", "warning", "JobRequeue = 0", "nothing: a preempted run goes on as a new job")
    else:
        yield Finding("requeue", "ok", f"JobRequeue = {settings.get('JobRequeue', 'not told')}")
    mode = settings.get("PreemptMode", "not told")
    is_safe = "CANCEL" not in mode.upper()
    remedy = "" if is_safe else "use a partition or QOS that requeues; else continue with submit.py --resume"
    yield Finding("preemption", "ok" if is_safe else "warning", f"PreemptMode = {mode}", remedy)


def _said(*command: str) -> str | None:
    """What a command prints; None if it does not answer."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_ANSWER_SECONDS)
        return ran.stdout + ran.stderr
    return None


def wandb() -> Iterator[Finding]:
    """Whether there is a key, and a server that answers."""
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].partition("/")[0]
    name, _, port = host.partition(":")
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and name in netrc.read_text(errors="replace"))
    if not has_key:
        yield Finding("wandb", "ok", "no key: runs log offline; `wandb login` makes one")
        return
    try:
        socket.create_connection((name, int(port or 443)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        yield Finding("wandb", "warning", f"a key, but {host} does not answer ({error})", "set wandb.mode=offline")
        return
    yield Finding("wandb", "ok", f"a key, and {host} answers")
