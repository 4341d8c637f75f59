"""Defines the sections of a config: every key with its type, default and bounds."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from cmscale.config.added import with_added_values
from cmscale.config.features import known_network
from cmscale.config.methods import Method
from cmscale.config.renamed import with_current_names
from cmscale.config.section import AsTuple, Count, Counts, NonNegative, Positive, Rate, Section, operational
from cmscale.config.slurm import Slurm
from cmscale.errors import UserError

NOISE_EMBEDDING_SCALE = 1000.0
"""`model.noise_embedding_scale` of OpenAI's networks, and of diffusers' pipeline for them."""


class Model(Section):
    """The ADM UNet (Dhariwal and Nichol 2021, appendix A).

    The time embedding gets `noise_embedding_scale` ln(sigma) / 4: 1000 in the code of Consistency Models, 1 in EDM's.
    `dropout_resolutions` are the image sizes in pixels at which residual blocks drop; null: all. `precision_layout`
    says which layers compute in bf16 or fp16: with `uniform` all; with `released`, as in the released code, not the
    time embedding, its layers in the residual blocks, normalisation and the output layer, which stay in float32.
    """

    image_size: Count
    channels: Count
    channel_multipliers: Counts
    num_res_blocks: Count
    attention_resolutions: Annotated[tuple[Count, ...], AsTuple] = ()
    head_channels: Count = 64
    dropout: Rate = 0.0
    dropout_resolutions: Annotated[tuple[Count, ...], AsTuple, Field(min_length=1)] | None = None
    resblock_updown: bool = True
    scale_shift_norm: bool = False
    num_classes: Count | None = None
    qkv_layout: Literal["three_heads_dim", "heads_three_dim"] = "three_heads_dim"
    noise_embedding_scale: Positive = NOISE_EMBEDDING_SCALE
    precision_layout: Literal["released", "uniform"] = "released"
    attention: Literal["auto", "xformers", "sdpa", "reference"] = operational("auto")
    activation_checkpointing: bool = operational(False)

    @model_validator(mode="after")
    def _divisible(self) -> "Model":
        levels = len(self.channel_multipliers)
        if levels == 0:
            raise ValueError("channel_multipliers: is empty; give one multiplier per level, for example [1,2,2]")
        if self.image_size % 2 ** (levels - 1):
            raise ValueError(
                f"image_size: {self.image_size} is not a multiple of {2 ** (levels - 1)}, "
                f"as the {levels} levels of channel_multipliers require; change one of the two"
            )
        sizes = [self.image_size >> level for level in range(levels)]
        for key in ("attention_resolutions", "dropout_resolutions"):
            for size in getattr(self, key) or ():
                if size not in sizes:
                    raise ValueError(f"{key}: no level has {size} px; choose from {sizes}")
        if self.channels % 32:
            raise ValueError(f"channels: {self.channels} is not a multiple of 32, the number of GroupNorm groups")
        last = len(sizes) - 1  # the middle block attends at the smallest level, even if no resolution is listed
        for level, multiplier in enumerate(self.channel_multipliers):
            width = multiplier * self.channels
            if (level == last or sizes[level] in self.attention_resolutions) and width % self.head_channels:
                raise ValueError(
                    f"head_channels: {self.head_channels} does not divide the {width} channels of level {level}; "
                    "choose a divisor"
                )
        return self


class Data(Section):
    """The prepared data set, and how it is shuffled, cached and loaded."""

    path: str = operational(...)
    flip: bool = True
    num_canonical_nodes: Count = 8
    shuffle_block: Count = 65536
    workers: NonNegative = operational(4)
    prefetch_batches: Count = operational(4)
    cache_dir: str | None = operational(None)
    cache_gb: Positive = operational(200.0)
    max_bad_samples: NonNegative = operational(0)
    max_bad_shards: NonNegative = operational(0)


class Optimizer(Section):
    """The optimizer. As in Consistency Models, the default has no weight decay and a constant learning rate.

    `schedule` multiplies the learning rate by a factor that falls with the step k, on top of the warm-up:
    `inverse_square_root` by 1 / sqrt(max(k / decay_reference, 1)) (Karras et al. 2024, ECT, sCM),
    `cosine` by (1 + cos(pi k / train.total_steps)) / 2, `step` by decay_factor at each of `decay_steps`.
    """

    kind: Literal["radam", "adam"] = "radam"
    learning_rate: Positive
    betas: Annotated[tuple[Rate, Rate], AsTuple] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: NonNegative = 0
    schedule: Literal["constant", "inverse_square_root", "cosine", "step"] = "constant"
    decay_reference: Count | None = None
    decay_steps: Counts = ()
    decay_factor: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _schedule_has_its_keys(self) -> "Optimizer":
        used = {"inverse_square_root": ("decay_reference",), "step": ("decay_steps", "decay_factor")}
        for key in ("decay_reference", "decay_steps", "decay_factor"):
            given, needed = bool(getattr(self, key)), key in used.get(self.schedule, ())
            if needed and not given:
                raise ValueError(f"{key}: is not set; schedule {self.schedule} needs it")
            if given and not needed:
                raise ValueError(f"{key}: schedule {self.schedule} does not use it; leave it out")
        if list(self.decay_steps) != sorted(set(self.decay_steps)):
            raise ValueError(f"decay_steps: {list(self.decay_steps)} must ascend")
        return self


class EMA(Section):
    """Exponential moving averages of the weights, for sampling; every command uses the first by default."""

    rates: Annotated[tuple[Rate, ...], AsTuple, Field(min_length=1)] = (0.999943,)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"ema_{rate:.7g}" for rate in self.rates)

    @model_validator(mode="after")
    def _distinct_names(self) -> "EMA":
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"rates: {list(self.rates)} holds two that are equal to seven digits; remove one")
        return self


class Engine(Section):
    """Device, precision, ZeRO stage and timeouts."""

    device: Literal["auto", "cpu", "cuda"] = operational("auto")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = operational(2)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_clip: Positive | None = None
    initial_loss_scale_power: Annotated[int, Field(ge=0, le=24)] = 16
    collective_timeout_minutes: Positive = operational(10.0)
    step_timeout_minutes: Positive = operational(30.0)


class Train(Section):
    """Length, batch sizes, seed, first weights, logging, and what happens after non-finite steps.

    `init_from` names a SOURCE whose weights are the first ones of the network and of all its averages; `init_weights`
    chooses among those of a run, by default its first EMA. A run that is resumed does not read them again.
    """

    total_steps: Count
    global_batch_size: Count
    micro_batch_size: Count = operational(...)
    seed: NonNegative = 0
    init_from: str | None = operational(None)
    init_weights: str | None = operational(None)
    log_every: Count = operational(50)
    sample_every: NonNegative = operational(0)
    sample_count: Count = operational(64)
    consistency_error_every: NonNegative = operational(0)
    consistency_error_data: str | None = operational(None)
    max_nonfinite_steps: Count = operational(3)
    max_rollbacks: NonNegative = operational(2)


class Checkpoint(Section):
    """When checkpoints are written, which are kept, and where they are uploaded to."""

    every_steps: Count = operational(1000)
    keep_last: Count = operational(3)
    keep_every: NonNegative = operational(0)
    stop_on_failure: bool = operational(False)
    export_to: str | None = operational(None)


class Evaluate(Section):
    """What evaluations use; options of their commands replace these values.

    `features` names a feature network. `features_weights` is the weights file of that network; `inception_weights` and
    `dinov2_weights` are the same for one network each, whether or not `features` names it.
    """

    features: Annotated[str, AfterValidator(known_network)] = operational("inception")
    features_weights: str | None = operational(None)
    inception_weights: str | None = operational(None)
    dinov2_weights: str | None = operational(None)
    reference: str | None = operational(None)
    num_samples: Annotated[int, Field(ge=2)] = operational(50000)

    @model_validator(mode="after")
    def _one_weights_file(self) -> "Evaluate":
        key = f"{self.features}_weights"
        if self.features_weights is not None and getattr(self, key, None) is not None:
            raise ValueError(f"features_weights and {key} both name the weights of {self.features}; remove one")
        return self

    def weights(self) -> tuple[str, str | None]:
        """The key that names the weights of `features`, and its value; None for the network's default weights."""
        single = {"inception": self.inception_weights, "dinov2": self.dinov2_weights}
        if self.features_weights is None and self.features in single:
            return f"{self.features}_weights", single[self.features]
        return "features_weights", self.features_weights

    def replaced(self, options: Mapping[str, Any]) -> "Evaluate":
        """The section with the values that a command's options replace.

        Args:
            options: Values by key; None keeps the config's value. Weights among them replace the config's weights of
                the same network under either key.

        Raises:
            UserError: a value that the config would refuse.
        """
        given = {key: value for key, value in options.items() if value is not None}
        kept = self.model_dump()
        features = given.get("features", self.features)
        of_network = {"features_weights", f"{features}_weights"}
        if features != self.features:
            kept["features_weights"] = None
        if of_network & given.keys():
            kept |= dict.fromkeys(of_network & kept.keys())
        try:
            return Evaluate.model_validate(kept | given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(("evaluate", *map(str, first["loc"])))
            raise UserError(f"{key}: {first['msg'].removeprefix('Value error, ')}") from None


class Sampling(Section):
    """How the trained model is sampled, unless a command says otherwise.

    `times` are descending noise levels (sigma), the first of which is usually method.sigma_max: sampling in as many
    steps takes them. They belong to a data set and a method: `cmscale search-times` finds them. null: the times that
    were published for the method, if any.
    """

    times: Annotated[tuple[Positive, ...], AsTuple, Field(min_length=1)] | None = operational(None)

    @model_validator(mode="after")
    def _descending(self) -> "Sampling":
        if self.times is not None and list(self.times) != sorted(set(self.times), reverse=True):
            raise ValueError(f"times: {list(self.times)} must descend")
        return self


class Wandb(Section):
    """Logging to Weights & Biases, in addition to metrics.jsonl."""

    mode: Literal["auto", "online", "offline", "off"] = operational("auto")
    project: str = operational("cmscale")
    entity: str | None = operational(None)


class Restart(Section):
    """When a job is started again after a fault, and how early it is asked to save before a time limit.

    `max_restarts` counts restarts after faults; preemptions and time limits are not counted. `backoff_seconds` is the
    pause before the first restart; it doubles while restarts bring no progress. `signal_seconds` is the time between
    the signal to save and the end of the job.
    """

    max_restarts: NonNegative = operational(10)
    backoff_seconds: NonNegative = operational(10)
    signal_seconds: Count = operational(120)


class Config(Section):
    """The config of a run."""

    method: Method
    model: Model
    data: Data
    optimizer: Optimizer
    train: Train
    ema: EMA = EMA()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    sampling: Sampling = Sampling()
    evaluate: Evaluate = Evaluate()
    wandb: Wandb = Wandb()
    restart: Restart = Restart()
    slurm: Slurm = Slurm()

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, given: Any) -> Any:
        """Every reader passes here: files, manifests of checkpoints, cards of exported weights."""
        return with_current_names(given)[0] if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        kind, facts = self.method.kind, self.method.facts
        if self.train.consistency_error_every and not facts.is_consistency_model:
            raise ValueError(
                f"train.consistency_error_every: method.kind {kind} has no consistency function; set it to 0"
            )
        if self.sampling.times is not None and facts.sampler != "multistep":
            raise ValueError(f"sampling.times: method.kind {kind} is not sampled in chosen steps; leave it out")
        if self.train.init_weights is not None and self.train.init_from is None:
            raise ValueError("train.init_weights: is set, but train.init_from is not; set both or neither")
        if self.train.init_from is not None and self.method.teacher_choice is not None and not facts.follows_teacher:
            raise ValueError(
                f"train.init_from: method.kind {kind} starts with the weights of method.teacher; leave out one of them"
            )
        if self.engine.zero_stage == 3 and self.method.needs_forward_mode:
            raise ValueError(
                f"engine.zero_stage: 3 can't be combined with the forward-mode derivatives of method.kind {kind}; use 2"
            )
        return self

    def fingerprint(self) -> str:
        """Hash of the values that change the losses; a checkpoint resumes only under an equal fingerprint."""
        text = json.dumps(trajectory(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def accumulation_steps(config: Config, *, num_ranks: int) -> int:
    """Micro-batches per rank and step: global_batch_size / (num_ranks x micro_batch_size).

    Raises:
        UserError: global_batch_size is not divisible by num_ranks x micro_batch_size.
    """
    per_pass = num_ranks * config.train.micro_batch_size
    if config.train.global_batch_size % per_pass:
        raise UserError(
            f"train.global_batch_size: {config.train.global_batch_size} is not divisible by {num_ranks} ranks "
            f"x train.micro_batch_size {config.train.micro_batch_size} = {per_pass}; change one of the three"
        )
    return config.train.global_batch_size // per_pass


def leaves(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yields (dotted key, value, whether it is operational) for every leaf of a config."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            extra = field.json_schema_extra
            yield f"{prefix}{name}", value, isinstance(extra, dict) and bool(extra.get("operational"))


def trajectory(config: Config) -> dict[str, Any]:
    """The values that change the losses, by dotted key; train.total_steps only if a schedule uses it."""
    kept = {key: value for key, value, is_operational in leaves(config) if not is_operational}
    if not config.method.facts.depends_on_total_steps and config.optimizer.schedule != "cosine":
        del kept["train.total_steps"]
    return json.loads(json.dumps(kept))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line per key in which two `trajectory` dictionaries differ; `old` may be of an older release."""
    return unequal(with_added_values(old), new)


def unequal(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line per key in which two dictionaries differ."""
    keys = sorted(old.keys() | new.keys())
    return [
        f"{key}: {old.get(key, 'not set')} -> {new.get(key, 'not set')}"
        for key in keys
        if old.get(key, "not set") != new.get(key, "not set")
    ]
