"""The zero-shot tasks of a consistency model and their settings. Nothing here needs torch."""

from dataclasses import dataclass
from typing import Literal

from cmscale.config import Config
from cmscale.config.methods.base import MOST_STEPS
from cmscale.config.sampling_times import check_range
from cmscale.errors import UserError
from cmscale.runs.choices import refuse_other_models

Task = Literal["inpaint", "colorize", "superres", "stroke", "interpolate", "denoise"]


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """The settings of a task; each task uses those that it needs.

    Attributes:
        factor: The patch size of `superres`, in pixels.
        sigma: The standard deviation of the noise of `denoise`, for images in [-1, 1].
        steps: Sampling steps of algorithm 4.
        count: Number of images of `interpolate`.
        seed: The noise of image i depends on (seed, i).
    """

    task: Task
    factor: int = 8
    sigma: float = 0.5
    steps: int = 40
    count: int = 8
    seed: int = 0


def check_task(config: Config, settings: TaskSettings, *, origin: str) -> None:
    """Checks that a model of this config can do a task.

    Args:
        origin: Where the model comes from, for messages.

    Raises:
        UserError: it is no unconditional consistency model, or a setting is outside of its range.
    """
    refuse_other_models(config, origin=origin, what="edit")
    size = config.model.image_size
    if settings.steps > MOST_STEPS:
        raise UserError(f"--steps: got {settings.steps}; give at most {MOST_STEPS}, as each evaluates the network")
    if settings.task == "denoise":
        check_range((settings.sigma,), config.method, label=f"--sigma {settings.sigma}")
    if settings.task == "superres" and (settings.factor < 2 or size % settings.factor):
        raise UserError(f"--factor: {settings.factor} does not divide the image size {size}; choose a divisor")
