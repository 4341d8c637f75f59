"""Tries what a training reads as its worker will, before a job is queued: `python -m cmscale.training.inputs`.

The launchers import no torch; they start this as a process of its own, with the config on its standard input.
"""

import sys

import torch

from cmscale.commands.ending import guarded
from cmscale.config import Config, parse_config
from cmscale.consistency.distance import build_distance
from cmscale.engine.settings import check_precision, precision_cautions
from cmscale.io.fetch import local_file
from cmscale.source import load_first_weights, load_teacher


def try_inputs(config: Config, *, on_this_cpu: bool) -> None:
    """Reads first weights, teacher and LPIPS's weights, and checks the precision.

    Args:
        on_this_cpu: Whether the training computes on this machine's CPU.

    Raises:
        UserError: what the worker would find.
    """
    if on_this_cpu:
        check_precision(config, torch.device("cpu"))
    distance = config.method.distance_settings
    if distance is not None and distance.name == "lpips" and distance.lpips_weights is not None:
        build_distance(config.method, config.model.image_size, lpips_weights=local_file(distance.lpips_weights))
    if config.method.teacher_choice is not None:
        load_teacher(config)
    if config.train.init_from is not None:
        load_first_weights(config)


def main(arguments: list[str]) -> int:
    """Tries the config on standard input; prints cautions. `cpu` as the argument: it trains on this machine's CPU."""
    config, on_this_cpu = parse_config(sys.stdin.read()), "cpu" in arguments
    try_inputs(config, on_this_cpu=on_this_cpu)
    for caution in precision_cautions(config, torch.device("cpu")) if on_this_cpu else ():
        print(f"caution: {caution}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, label="inputs"))
