"""Owns what a run may be told about its method: one section a `method.kind`, with every default and every bound."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cmscale.config.section import Count, NonNegative, Positive, Rate, Section, operational

Distance = Literal["l1", "l2", "lpips", "pseudo_huber"]
Convention = Literal["paper", "released_code"]
Solver = Literal["euler", "heun"]


class Diffusion(Section):
    """What every method shares: the noise range and the Karras grid (PAPER.md; EDM, equation 5)."""

    sigma_data: Positive = 0.5
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    rho: Positive = 7.0

    @model_validator(mode="after")
    def _ordered(self) -> "Diffusion":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        return self


def _check_scales(s0: int, s1: int) -> None:
    if s0 > s1:
        raise ValueError(f"s0 {s0} must not be above s1 {s1}: the grid grows from s0 to s1 + 1")


class EDM(Diffusion):
    """A diffusion model after Karras et al. 2022: the teacher of CD, the start of ECT."""

    kind: Literal["edm"]
    p_mean: float = -1.2
    p_std: Positive = 1.2
    sampler_steps: Annotated[int, Field(ge=2)] = Field(40, json_schema_extra={"operational": True})


class _Discrete(Diffusion):
    """What CD and CT share: a distance between neighbours on the grid."""

    distance: Distance = "lpips"
    lpips_pooling: Literal["average", "max"] = "average"
    lpips_weights: str | None = operational(None)
    huber_c: Positive | None = None


class CD(_Discrete):
    """Consistency distillation (algorithm 2)."""

    kind: Literal["cd"]
    teacher: str = operational(...)
    teacher_weights: str | None = None
    num_scales: Annotated[int, Field(ge=2)] = 40
    solver: Solver = "heun"
    target_ema: Rate = 0.95


class CT(_Discrete):
    """Consistency training (algorithm 3)."""

    kind: Literal["ct"]
    s0: Annotated[int, Field(ge=2)] = 2
    s1: Annotated[int, Field(ge=2)] = 150
    mu0: Annotated[float, Field(ge=0, lt=1)] = 0.95
    convention: Convention = "paper"
    weighting: Literal["uniform", "inverse_gap"] = "uniform"

    @model_validator(mode="after")
    def _growing(self) -> "CT":
        _check_scales(self.s0, self.s1)
        return self


class ICT(Diffusion):
    """Improved consistency training (Song and Dhariwal 2023)."""

    kind: Literal["ict"]
    s0: Annotated[int, Field(ge=2)] = 10
    s1: Annotated[int, Field(ge=2)] = 1280
    p_mean: float = -1.1
    p_std: Positive = 2.0
    huber_c: Positive | None = None

    @model_validator(mode="after")
    def _growing(self) -> "ICT":
        _check_scales(self.s0, self.s1)
        return self


class ECT(Diffusion):
    """Easy consistency tuning (Geng et al. 2024), from a diffusion model."""

    kind: Literal["ect"]
    teacher: str = operational(...)
    teacher_weights: str | None = None
    p_mean: float = -1.1
    p_std: Positive = 2.0
    q: Annotated[float, Field(gt=1)] = 2.0
    k: Positive = 8.0
    b: Positive = 1.0
    num_stages: Count = 8
    huber_c: Positive | None = None


class _Continuous(Diffusion):
    """What sCT and sCD share (Lu and Song 2024): TrigFlow times, tangent warm-up and normalisation."""

    p_mean: float = -1.0
    p_std: Positive = 1.4
    tangent_warmup_steps: NonNegative = 10000
    tangent_norm_c: Positive = 0.1


class SCT(_Continuous):
    """Continuous-time consistency training (sCT); from a diffusion model's weights where it is given one."""

    kind: Literal["sct"]
    teacher: str | None = operational(None)
    teacher_weights: str | None = None
    start: Literal["random", "teacher"] = "random"

    @model_validator(mode="after")
    def _named(self) -> "SCT":
        if self.start == "teacher" and self.teacher is None:
            raise ValueError("start: teacher needs a diffusion model in method.teacher")
        return self


class SCD(_Continuous):
    """Continuous-time consistency distillation (sCD) of a diffusion model."""

    kind: Literal["scd"]
    teacher: str = operational(...)
    teacher_weights: str | None = None


class PD(_Discrete):
    """Progressive distillation (Salimans and Ho 2022), by Euler steps on the Karras grid."""

    kind: Literal["pd"]
    teacher: str = operational(...)
    teacher_weights: str | None = None
    distance: Distance = "l2"
    start_scales: Annotated[int, Field(ge=2)] = 64
    weighting: Literal["truncated_snr", "uniform"] = "truncated_snr"

    @model_validator(mode="after")
    def _halves(self) -> "PD":
        if self.start_scales & (self.start_scales - 1):
            raise ValueError(f"start_scales {self.start_scales} can't be halved down to 1; give a power of two")
        return self


Method = Annotated[EDM | CD | CT | ICT | ECT | SCT | SCD | PD, Field(discriminator="kind")]
