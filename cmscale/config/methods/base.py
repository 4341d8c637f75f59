"""Defines what every training method states about itself.

A method is a section of the config (`method: {kind: ...}`). Besides its keys it states facts: `facts`, which hold for
every config of the method, and properties, which depend on its keys. All other code uses these facts; no code outside
`config/methods` and `consistency/losses` tests which method it has. Nothing in `config` imports torch.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from cmscale.config.section import Count, Positive, Section, key

DistanceName = Literal["l1", "l2", "lpips", "pseudo_huber"]
Preconditioning = Literal["edm", "consistency", "trigflow"]
SamplerFamily = Literal["ode", "euler", "multistep"]
MOST_STEPS = 10_000
"""Of sampling. Each evaluates the network once or twice for every image; published samplers take 1,000 at most."""
TimeEmbedding = Literal["log_sigma", "angle"]
"""The input of the network's time embedding: 250 ln(sigma), or the angle t = atan(sigma / sigma_data)."""


@dataclass(frozen=True, kw_only=True)
class MethodFacts:
    """What holds for every config of a method. Each fact must be stated; there are no defaults.

    Attributes:
        title: Short name for tables and headings.
        description: What the trained model is, with its source, for model cards.
        paper: The URL of that source.
        is_consistency_model: Whether the network learns a consistency function f(x, t), which one step can sample.
        can_teach: Whether the trained model can be the teacher of a distillation.
        has_target: Whether training keeps a target network, an average of the student's weights.
        follows_teacher: Whether every training step evaluates the teacher.
        learns_weighting: Whether a weighting w(t) of the loss is trained with the network.
        preconditioning: How the raw network becomes a denoiser.
        sampler: `ode` solves the probability flow, `euler` takes the Euler steps the model was distilled for,
            `multistep` is algorithm 1 of Consistency Models.
        boundary_at_zero: Whether f is the identity at time 0; otherwise at sigma_min.
        depends_on_total_steps: Whether the number of steps changes the losses, through a schedule: see `Scheduled`.
    """

    title: str
    description: str
    paper: str
    is_consistency_model: bool
    can_teach: bool
    has_target: bool
    follows_teacher: bool
    learns_weighting: bool
    preconditioning: Preconditioning
    sampler: SamplerFamily
    boundary_at_zero: bool
    depends_on_total_steps: bool


@dataclass(frozen=True, kw_only=True)
class MethodSchedule:
    """What a method schedules at one step; None for a quantity that it does not have.

    Attributes:
        num_scales: N(k), the size of the time grid.
        target_ema: mu(k), the decay rate of the target network.
        stage: Stage of a curriculum, from 0.
        learning_rate_factor: Multiplies the optimizer's learning rate.
        ends_stage: Whether optimizer and averages start again after this step.
        sampling_steps: Steps in which the model is sampled at this step, if not in its default number.
    """

    num_scales: int | None = None
    target_ema: float | None = None
    stage: int | None = None
    learning_rate_factor: float = 1.0
    ends_stage: bool = False
    sampling_steps: int | None = None


@dataclass(frozen=True)
class TeacherChoice:
    """The SOURCE of a diffusion model, and the name of its weights; None selects its first EMA."""

    source: str
    weights_name: str | None


@dataclass(frozen=True, kw_only=True)
class DistanceSettings:
    """The distance of a loss; with `huber_c` None, c follows from the image size (iCT, section 3.3).

    With `huber_c` 0 the pseudo-Huber distance is the Euclidean one.
    """

    name: DistanceName
    huber_c: float | None = None
    lpips_pooling: Literal["average", "max"] = "average"
    lpips_precision: Literal["fp32", "fp16"] = "fp32"
    lpips_weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class SecondTime:
    """The second time of two-step sampling, and where a search for it begins.

    Attributes:
        index, last: The published index on the descending Karras grid 0..last, or its middle if none is published.
        sigma: A published time that lies on no such grid; used in place of the index.
    """

    index: int
    last: int
    sigma: float | None = None


UNPUBLISHED_SECOND_TIME = SecondTime(index=75, last=150)


class MethodSection(Section, ABC):
    """The keys that every method has: the noise range and the Karras grid (EDM, equation 5).

    A method is a subclass with a `kind`. It defines `facts` and every abstract member; one that is missing is an error
    when the class is created.
    """

    facts: ClassVar[MethodFacts]

    sigma_data: Positive = key(
        0.5, "Standard deviation of the images' values, for images in [-1, 1]; it scales the network.", source="EDM"
    )
    sigma_min: Positive = key(0.002, "Smallest noise level, epsilon of Consistency Models.", source="EDM, table 1")
    sigma_max: Positive = key(80.0, "Largest noise level, at which sampling starts.", source="EDM, table 1")
    rho: Positive = key(
        7.0, "How strongly the Karras grid is denser at low noise levels (EDM, equation 5).", source="EDM, table 1"
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if "kind" not in cls.model_fields:
            return  # an intermediate class that methods share
        missing = sorted(cls.__abstractmethods__)
        if not hasattr(cls, "facts"):
            missing.insert(0, "facts")
        if missing:
            raise TypeError(f"method {cls.__name__}: does not define {', '.join(missing)}; see ops/adding_a_method.md")

    @model_validator(mode="after")
    def _check_order(self) -> "MethodSection":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min: {self.sigma_min} must be below sigma_max, {self.sigma_max}")
        return self

    @property
    @abstractmethod
    def teacher_choice(self) -> TeacherChoice | None:
        """The diffusion model that a new student's weights come from; None if they are random."""

    def may_follow(self, teacher: "MethodSection") -> bool:
        """Whether a model of another method can be `method.teacher`."""
        return teacher.facts.can_teach

    @property
    def teacher_wanted(self) -> str:
        """What `method.teacher` must be, for messages."""
        return "a diffusion model (edm)"

    @property
    def needs_first_weights(self) -> bool:
        """Whether a new student must have trained weights, its teacher's or those of `train.init_from`."""
        return False

    @property
    @abstractmethod
    def distance_settings(self) -> DistanceSettings | None:
        """The distance that the loss uses; None if it uses none of `consistency/distance.py`."""

    @property
    @abstractmethod
    def embeds_angle(self) -> bool:
        """Whether the time embedding gets TrigFlow's angle t; otherwise it gets c_noise = 250 ln(sigma)."""

    @property
    @abstractmethod
    def needs_forward_mode(self) -> bool:
        """Whether the loss takes forward-mode derivatives of the network."""

    @property
    def restarts_averages(self) -> bool:
        """Whether the schedule ends stages, after which optimizer and averages start again."""
        return False

    @property
    @abstractmethod
    def forward_passes(self) -> float:
        """Cost of one training image in forward passes; a backward pass counts as two."""

    @property
    @abstractmethod
    def final_num_scales(self) -> int | None:
        """Size of the time grid at the end of training; None for a method without a grid."""

    @property
    @abstractmethod
    def default_sampling_steps(self) -> int:
        """Sampling steps if a command gives none."""

    @property
    def only_sampling_steps(self) -> int | None:
        """The one number of sampling steps that the model was trained for; None if it takes any."""
        return None

    @property
    @abstractmethod
    def second_time(self) -> SecondTime:
        """The second time of two-step sampling."""

    @abstractmethod
    def schedule(self, step: int, *, total_steps: int) -> MethodSchedule:
        """What the method schedules at `step` (0 is the first) of `total_steps`, which is `schedule_length`."""

    def schedule_length(self, total_steps: int) -> int:
        """K, the number of steps over which `schedule` runs: that of the run if the method has no key for it."""
        return total_steps

    @property
    def smallest_gap(self) -> float | None:
        """The smallest ln(t / s) of two times t > s at which one step evaluates the network, at the end of training.

        None if a step compares no two times. On the Karras grid it is that of the two largest times.
        """
        if self.final_num_scales is None:
            return None
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return -self.rho * math.log1p((low - high) / high / (self.final_num_scales - 1))

    def cautions(self, *, image_size: int, batch_size: int) -> list[str]:
        """What in the method's keys its user may not expect, one line each; it stops nothing."""
        del image_size, batch_size
        return []

    @property
    def boundary(self) -> float:
        """The smallest time, at which a consistency function is the identity."""
        return 0.0 if self.facts.boundary_at_zero else self.sigma_min


class Scheduled(MethodSection):
    """A method with a schedule over K steps: `schedule_steps`, or null for train.total_steps.

    Later steps keep the schedule's last values, so that a run can be longer than its schedule.
    """

    schedule_steps: Count | None = key(
        None,
        "K, the number of steps over which the method's schedules run: N(k), mu(k), stages. Later steps keep the last "
        "values. null: train.total_steps.",
        unit="steps",
        source="the papers' K is the length of training",
    )

    def schedule_length(self, total_steps: int) -> int:
        return self.schedule_steps or total_steps
