"""Has a process try what a training reads, where only its worker's own code, which imports torch, can tell."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cmscale.config import Config, dump_config
from cmscale.config.sources import names_file
from cmscale.errors import UserError
from cmscale.io.place import Place

_LONG_SECONDS: float | None = 10.0
_LABEL, _CAUTION = "inputs: ", "caution: "
_UNKNOWN = "note: teacher, first weights and LPIPS's weights were not tried here: "


def try_inputs(config: Config, *, on_this_cpu: bool) -> None:
    """Reads weights without a config of their own, and LPIPS's, as the worker will; prints its cautions.

    Args:
        on_this_cpu: Whether the training computes on this machine's CPU.

    Raises:
        UserError: what the worker would find; one line for each mistake.
    """
    if not _must_be_tried(config, on_this_cpu=on_this_cpu):
        return
    command = [sys.executable, "-m", "cmscale.training.inputs", *(["cpu"] if on_this_cpu else [])]
    status, output, errors = _ran(command, dump_config(config))
    lines = [line.removeprefix(_LABEL) for line in errors.splitlines() if line.startswith(_LABEL)]
    if status == 2 and lines:
        raise UserError(*lines)
    if status:  # no torch on a login node, for example: the worker will tell
        last = (errors.strip().splitlines() or [f"exit status {status}"])[-1]
        print(f"{_UNKNOWN}{last}", file=sys.stderr, flush=True)
    for line in output.splitlines():
        if line.startswith(_CAUTION):  # libraries print other lines
            print(line, file=sys.stderr, flush=True)


def _ran(command: Sequence[str], given: str) -> tuple[int, str, str]:
    """The exit status, the output and the errors of a command; what takes long is said."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            output, errors = process.communicate(given, timeout=_LONG_SECONDS)
        except subprocess.TimeoutExpired:
            print("reading the teacher, first weights and LPIPS's weights", file=sys.stderr, flush=True)
            output, errors = process.communicate()
    return process.returncode, output, errors


def _must_be_tried(config: Config, *, on_this_cpu: bool) -> bool:
    choice, first = config.method.teacher_choice, config.train.init_from
    distance = config.method.distance_settings
    files = [choice.source if choice is not None else None, first]
    lpips = distance.lpips_weights if distance is not None and distance.name == "lpips" else None
    is_new_precision = on_this_cpu and config.engine.precision != "fp32"
    return is_new_precision or any(map(_is_local_file, files)) or _is_local_file(lpips, of_any_kind=True)


def _is_local_file(place: str | None, *, of_any_kind: bool = False) -> bool:
    """Whether it is a file on this machine; gigabytes in a storage are not fetched for a check."""
    if place is None or Place(plain := place.partition("#sha256=")[0]).is_remote:
        return False
    return Path(plain).is_file() and (of_any_kind or names_file(plain))
