"""Has a process try what a training reads, where only its worker's own code, which imports torch, can tell."""

import subprocess
import sys
from pathlib import Path

from cmscale.config import Config, dump_config
from cmscale.config.sources import names_file
from cmscale.errors import UserError
from cmscale.io.place import Place

_LABEL = "inputs: "
_UNKNOWN = "note: teacher, first weights and LPIPS's weights were not tried here: "


def try_inputs(config: Config, *, on_this_cpu: bool) -> None:
    """Reads weights without a config of their own, and LPIPS's, as the worker will.

    Args:
        on_this_cpu: Whether the training computes on this machine's CPU.

    Raises:
        UserError: what the worker would find; one line for each mistake.
    """
    if not _must_be_tried(config, on_this_cpu=on_this_cpu):
        return
    command = [sys.executable, "-m", "cmscale.training.inputs", *(["cpu"] if on_this_cpu else [])]
    ran = subprocess.run(command, input=dump_config(config), capture_output=True, text=True, check=False)
    lines = [line.removeprefix(_LABEL) for line in ran.stderr.splitlines() if line.startswith(_LABEL)]
    if ran.returncode == 2 and lines:
        raise UserError(*lines)
    if ran.returncode:  # no torch on a login node, for example: the worker will tell
        last = (ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1]
        print(f"{_UNKNOWN}{last}", file=sys.stderr, flush=True)


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
