"""Names what in a config its user may not expect. None of it stops a run."""

import math
from collections.abc import Iterator

from cmscale.config.models import Config

_ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 0.0}
"""The largest relative rounding error of a number."""
_SLOW_EMBEDDING = 10.0
"""Of model.noise_embedding_scale: up to it, the sinusoids turn less than 2.5 times as fast as ln(sigma)."""
_TOLERATED = 0.25
"""Of the difference between two times, relative to them: more rounding hides what the loss measures."""


def cautions(config: Config) -> list[str]:
    """One line for each surprise: keys, values, and what to set instead."""
    found = config.method.cautions(image_size=config.model.image_size, batch_size=config.train.global_batch_size)
    fast = config.model.noise_embedding_scale > _SLOW_EMBEDDING and not config.method.embeds_angle
    if config.method.needs_forward_mode and fast:
        found.append(
            "method.tangent: jvp differentiates a time embedding of 250 ln(sigma), whose ripple dominates the "
            "derivative, so that the network does not learn; set method.tangent=auto, or train the teacher with "
            "method.time_embedding=angle"
        )
    gap, rounding = config.method.smallest_gap, _ROUNDING[config.engine.precision]
    if gap is not None and rounding > _TOLERATED * gap:
        found.append(
            f"engine.precision: {config.engine.precision} rounds by up to {rounding:.1%}, and at the end of training "
            f"neighbouring times differ by {gap:.2%}: rounding hides much of the difference that method.kind "
            f"{config.method.kind} learns from (for iCT at N = 1281, 50 to 73 %); set engine.precision=fp16 or fp32"
        )
    return [*found, *_unused(config), *_rarely_kept(config)]


def _unused(config: Config) -> Iterator[str]:
    """Keys that have a value and no effect, as another key switches off what they belong to.

    Not `prometheus.folder`: a site names it once for all runs, whether or not they write to it.
    """
    for key, value, works, remedy in (
        ("checkpoint.export_keep_last", config.checkpoint.export_keep_last, config.checkpoint.export_to, "export_to"),
        (
            "train.consistency_error_data",
            config.train.consistency_error_data,
            config.train.consistency_error_every,
            "consistency_error_every",
        ),
    ):
        if value is not None and not works:
            section = key.partition(".")[0]
            yield f"{key}: {value} has no effect; set {section}.{remedy} too, or leave it out"


def _rarely_kept(config: Config) -> Iterator[str]:
    """Steps at which checkpoints would be kept, were any written then."""
    saved = config.checkpoint.every_steps
    for name in ("keep_every", "export_keep_every"):
        every = getattr(config.checkpoint, name)
        if every and (met := math.lcm(every, saved)) > max(every, saved):
            yield (
                f"checkpoint.{name}: {every} is no multiple of checkpoint.every_steps, {saved}, so that of the regular "
                f"checkpoints one is kept every {met} steps; set checkpoint.{name} to a multiple of {saved}"
            )
