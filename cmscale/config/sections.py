"""Defines the config sections of a training besides method, network and evaluation."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cmscale.config.section import AsTuple, Count, Counts, NonNegative, Positive, Rate, Section, operational


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
