"""Tries the services around a machine, for `cmscale doctor`: Slurm, storage and wandb."""

import contextlib
import io
import os
import re
import shutil
import subprocess
from collections.abc import Iterator

from cmscale.cli.finding import Finding
from cmscale.config.site import read_site
from cmscale.errors import UserError
from cmscale.io.place import Place
from cmscale.io.probe import probe
from cmscale.io.storage import open_storage
from cmscale.io.wandb_login import find_login

_ANSWER_SECONDS = 5.0  # of a command of Slurm
_REFUSED = re.compile(r"\b40[13]\b|invalid|unauthorized|forbidden|permission|not logged in")  # said of a wrong key


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
    """Whether there is a key, and a server that takes it."""
    try:
        login = find_login()
    except UserError as error:
        yield Finding("wandb", "failure", str(error))
        return
    host = login.host
    if login.mode in ("offline", "disabled"):
        yield Finding("wandb", "ok", f"{login.mode}, as {login.mode_from} says")
        return
    if not login.has_key:
        yield Finding("wandb", "ok", "no key: runs log offline; `wandb login` makes one")
        return
    if why := login.why_silent():
        yield Finding("wandb", "warning", f"a key, but {host} does not answer ({why})", "set wandb.mode=offline")
    else:
        yield _key(host)


def _key(host: str) -> Finding:
    """Whether the server takes the key, as wandb says when it asks."""
    import wandb

    with contextlib.redirect_stderr(io.StringIO()):  # where it says which key it found
        try:
            is_taken = wandb.login(verify=True, prompt=False)
        except wandb.Error as error:  # of whatever kind, so its text must tell
            why = " ".join(str(error).split())
            if _REFUSED.search(why.replace(host, "").lower()):  # also a port may be 403
                return Finding(
                    "wandb", "failure", why, "make another key with `wandb login --relogin`, or in WANDB_API_KEY"
                )
            return Finding("wandb", "warning", f"a key, which could not be tried: {why}", "set wandb.mode=offline")
    if not is_taken:
        return Finding("wandb", "warning", f"wandb does not use the key for {host}", "wandb login --relogin")
    return Finding("wandb", "ok", f"a key, which {host} takes")


def storage(place: Place | None) -> Iterator[Finding]:
    """Credentials, and what runs ask of a storage, on a small object of its own.

    Args:
        place: The storage; None for the site's `checkpoint.export_to`. Without either only credentials are looked for.
    """
    url = place or read_site().tree.get("checkpoint", {}).get("export_to")
    yield _credentials(is_needed=url is not None and Place(url).is_remote)
    if url is None:
        return
    try:
        for each in probe(open_storage(url)):
            what = f"{url}: {each.what}"
            if each.problem:
                yield Finding(what, "failure", each.problem, "the message says what to set")
            else:
                yield Finding(what, "ok", "works")
    except (UserError, ConnectionError) as error:
        found = " ".join(str(error).split())
        yield Finding(str(url), "failure", found, "check AWS_ENDPOINT_URL, the bucket and the network")


def _credentials(*, is_needed: bool) -> Finding:
    from boto3.session import Session
    from botocore.exceptions import BotoCoreError

    remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "Amazon's")
    try:
        found = Session().get_credentials()
    except BotoCoreError as error:  # a dead profile, or one whose command fails
        return Finding("S3 credentials", "failure", str(error), "check AWS_PROFILE and ~/.aws/config")
    if found is None:
        return Finding("S3 credentials", "failure" if is_needed else "ok", "none", remedy if is_needed else "")
    return Finding("S3 credentials", "ok", f"found ({found.method}); endpoint: {endpoint}")
