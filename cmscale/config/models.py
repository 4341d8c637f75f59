"""Owns what a run may be told: the frozen, strict models of a config, with every default and every bound."""

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cmscale.errors import UserError

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]
_AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Counts = Annotated[tuple[Count, ...], _AsTuple]
Rates = Annotated[tuple[Rate, ...], _AsTuple]
Distance = Literal["l1", "l2", "lpips", "pseudo_huber"]
Convention = Literal["paper", "released_code"]
Solver = Literal["euler", "heun"]


class Section(BaseModel):
    """A part of the config. Frozen; unknown keys and wrong types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def operational(default: Any, **constraints: Any) -> Any:
    """A field that may change between a run and its resumption: it moves no loss (beyond rounding)."""
    return Field(default, json_schema_extra={"operational": True}, **constraints)


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
    teacher_weights: str | None = operational(None)
    num_scales: Annotated[int, Field(ge=2)] = 40
    solver: Solver = "heun"
    target_ema: Rate = 0.95


class CT(_Discrete):
    """Consistency training (algorithm 3)."""

    kind: Literal["ct"]
    s0: Annotated[int, Field(ge=2)] = 2
    s1: Annotated[int, Field(ge=2)] = 150
    mu0: Annotated[float, Field(gt=0, lt=1)] = 0.95
    convention: Convention = "paper"

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
    teacher_weights: str | None = operational(None)
    p_mean: float = -1.1
    p_std: Positive = 2.0
    q: Annotated[float, Field(gt=1)] = 2.0
    k: Positive = 8.0
    b: Positive = 1.0
    num_stages: Count = 8
    huber_c: Positive | None = None


Method = Annotated[EDM | CD | CT | ICT | ECT, Field(discriminator="kind")]


class Model(Section):
    """The ADM UNet (Dhariwal and Nichol 2021, appendix A)."""

    image_size: Count
    channels: Count
    channel_multipliers: Counts
    num_res_blocks: Count
    attention_resolutions: Annotated[tuple[Count, ...], _AsTuple] = ()
    head_channels: Count = 64
    dropout: Rate = 0.0
    resblock_updown: bool = True
    scale_shift_norm: bool = False
    num_classes: Count | None = None
    qkv_layout: Literal["three_heads_dim", "heads_three_dim"] = "three_heads_dim"
    attention: Literal["auto", "xformers", "sdpa", "reference"] = operational("auto")
    activation_checkpointing: bool = operational(False)

    @model_validator(mode="after")
    def _divisible(self) -> "Model":
        levels = len(self.channel_multipliers)
        if levels == 0 or self.image_size % 2 ** (levels - 1):
            raise ValueError(
                f"image_size {self.image_size} can't be halved {levels - 1} times "
                f"(channel_multipliers has {levels} levels)"
            )
        sizes = [self.image_size >> level for level in range(levels)]
        for size in self.attention_resolutions:
            if size not in sizes:
                raise ValueError(f"attention_resolutions: the network has no level of {size} px, only {sizes}")
        if self.channels % 32:
            raise ValueError(f"channels: {self.channels} is no multiple of 32, the groups of the normalisation")
        last = len(sizes) - 1  # the smallest level attends in the middle, whatever attention_resolutions says
        for level, multiplier in enumerate(self.channel_multipliers):
            width = multiplier * self.channels
            if (level == last or sizes[level] in self.attention_resolutions) and width % self.head_channels:
                raise ValueError(f"head_channels {self.head_channels} does not divide {width}, level {level}'s width")
        return self


class Data(Section):
    """Where the shards are, and how they reach the ranks."""

    path: str = operational(...)
    flip: bool = True
    num_canonical_nodes: Count = 8
    shuffle_block: Count = 65536
    workers: NonNegative = operational(4)
    prefetch_batches: Count = operational(4)
    cache_dir: str | None = operational(None)
    cache_gb: Positive = operational(200.0)
    max_bad_samples: NonNegative = operational(0)


class Optimizer(Section):
    """No weight decay, no warm-up, no schedule by default, as the paper."""

    kind: Literal["radam", "adam"] = "radam"
    learning_rate: Positive
    betas: Annotated[tuple[Rate, Rate], _AsTuple] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: NonNegative = 0


class EMA(Section):
    """Averages of the weights, kept for sampling; the first one is the default of every command."""

    rates: Annotated[tuple[Rate, ...], _AsTuple, Field(min_length=1)] = (0.999943,)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"ema_{rate:.10g}" for rate in self.rates)


class Engine(Section):
    """How the network is spread over the ranks."""

    device: Literal["auto", "cpu", "cuda"] = operational("auto")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = operational(2)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_clip: Positive | None = None
    initial_loss_scale_power: Annotated[int, Field(ge=0, le=24)] = 16
    collective_timeout_minutes: Positive = operational(10.0)
    step_timeout_minutes: Positive = operational(30.0)


class Train(Section):
    """How long, how much at a time, and what is said on the way."""

    total_steps: Count
    global_batch_size: Count
    micro_batch_size: Count = operational(...)
    seed: NonNegative = 0
    log_every: Count = operational(50)
    sample_every: NonNegative = operational(0)
    sample_count: Count = operational(64)
    max_nonfinite_steps: Count = operational(3)
    max_rollbacks: NonNegative = operational(2)


class Checkpoint(Section):
    """When checkpoints are written, which are kept, where they are exported to."""

    every_steps: Count = operational(1000)
    keep_last: Count = operational(3)
    keep_every: NonNegative = operational(0)
    stop_on_failure: bool = operational(False)
    export_to: str | None = operational(None)


class Evaluate(Section):
    """What an evaluation measures with, unless its command says otherwise."""

    features: Literal["inception", "efficientnet"] = operational("inception")
    inception_weights: str | None = operational(None)
    reference: str | None = operational(None)
    num_samples: Annotated[int, Field(ge=2)] = operational(50000)
    batch_size: Count = operational(64)


class Wandb(Section):
    """The mirror of metrics.jsonl."""

    mode: Literal["auto", "online", "offline", "off"] = operational("auto")
    project: str = operational("cmscale")
    entity: str | None = operational(None)


class Slurm(Section):
    """What sbatch is told beyond the launcher's flags."""

    account: str | None = operational(None)
    qos: str | None = operational(None)
    constraint: str | None = operational(None)
    cpus_per_task: Count = operational(8)
    mem_gb: NonNegative = operational(0)
    signal_seconds: Count = operational(120)
    max_restarts: NonNegative = operational(10)


class Config(Section):
    """One run, entirely."""

    method: Method
    model: Model
    data: Data
    optimizer: Optimizer
    train: Train
    ema: EMA = EMA()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    wandb: Wandb = Wandb()
    slurm: Slurm = Slurm()

    def fingerprint(self) -> str:
        """Hash of every value that moves the losses; equal fingerprints may resume each other's checkpoints."""
        text = json.dumps(trajectory(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def accumulation_steps(config: Config, *, num_ranks: int) -> int:
    """Micro-batches of one rank per step: global_batch_size / (num_ranks x micro_batch_size).

    Raises:
        UserError: the global batch is not divisible.
    """
    per_pass = num_ranks * config.train.micro_batch_size
    if config.train.global_batch_size % per_pass:
        raise UserError(
            f"train.global_batch_size: {config.train.global_batch_size} is not divisible by {num_ranks} ranks "
            f"x train.micro_batch_size {config.train.micro_batch_size} = {per_pass}; change one of the three"
        )
    return config.train.global_batch_size // per_pass


def leaves(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """(dotted key, value, operational) of every leaf of a config."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            extra = field.json_schema_extra
            yield f"{prefix}{name}", value, isinstance(extra, dict) and bool(extra.get("operational"))


def trajectory(config: Config) -> dict[str, Any]:
    """The leaves that move the losses. How long EDM and CD train moves none of theirs; CT's schedules do."""
    kept = {key: value for key, value, is_operational in leaves(config) if not is_operational}
    if config.method.kind in ("edm", "cd"):
        del kept["train.total_steps"]
    return json.loads(json.dumps(kept))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line a key in which two `trajectory` dictionaries differ."""
    keys = sorted(old.keys() | new.keys())
    return [
        f"{key}: {old.get(key, 'not set')} -> {new.get(key, 'not set')}"
        for key in keys
        if old.get(key, "not set") != new.get(key, "not set")
    ]
