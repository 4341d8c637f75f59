"""Imports DeepSpeed and wraps networks in its engines."""

import logging
import os
import warnings
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from cmscale.config import Config
from cmscale.distributed.collectives import bound_collectives
from cmscale.distributed.world import World
from cmscale.engine import settings
from cmscale.engine.flat_space import count_elements, number_parameters
from cmscale.errors import UserError
from cmscale.io.packages import TESTED, check_tested, private
from cmscale.model.blocks import Block


def import_deepspeed(config: Config, world: World) -> Any:
    """The package, set up for the rank's device: it logs errors only and compiles nothing.

    Raises:
        UserError: fp16 at stage 0 with another version than the tested one.
    """
    if world.is_main:
        check_tested("deepspeed")
        check_tested("torch")
    found, tested = version("deepspeed"), TESTED["deepspeed"]
    if config.engine.precision == "fp16" and config.engine.zero_stage == 0 and found != tested:
        # `Engine.step` scales the loss because that version does not; a version that does would scale it twice.
        raise UserError(
            f"engine.zero_stage: fp16 at stage 0 needs deepspeed=={tested}, installed is {found}; use zero_stage=1"
        )
    os.environ.setdefault("LOCAL_RANK", str(world.rank_of_node))
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # It still calls two collectives by the names that torch 2.14 renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On CPUs it would compile a shared-memory collective at its first start, which takes a minute; gloo serves.
    private(deepspeed.ops, "__compatible_ops__", package="deepspeed")["deepspeed_shm_comm"] = False
    # Its Muon optimizer, which is not used here, is decorated with torch.compile: that would import 590 modules of the
    # compiler into each rank, seconds of each start.
    compiler = private(deepspeed.runtime, "compiler", package="deepspeed")
    uncompiled = private(compiler, "dummy_decorator", package="deepspeed")
    compiler.compile = lambda *_, **__: uncompiled
    return deepspeed


def wrap(
    deepspeed: Any, module: nn.Module, config: Config, world: World, *, optimizer: torch.optim.Optimizer | None
) -> Any:
    """A DeepSpeed engine around a network. Collective.

    Args:
        optimizer: None for a network that is evaluated only.
    """
    size: dict[str, Any] = {"num_elements": count_elements(number_parameters(module)), "device": world.device}
    if config.model.compile != "off" and config.engine.zero_stage == 3:
        # Weights are gathered once for each block, before its compiled code, not by hooks on the layers within it.
        private(deepspeed.utils, "set_z3_leaf_modules", package="deepspeed")(module, [Block], raise_if_not_found=False)
    if optimizer is None:
        options = settings.frozen_settings(config, **size)
    else:
        options = settings.deepspeed_settings(config, num_ranks=world.num_ranks, **size)
    wrapped, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=options, dist_init_required=False)
    bound_collectives(timeout_minutes=config.engine.collective_timeout_minutes)  # it made groups of its own
    return wrapped
