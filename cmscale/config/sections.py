"""Defines the config sections of a training besides method, network and evaluation."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cmscale.config.section import AsTuple, Count, Counts, NonNegative, Positive, Rate, Section, key, operational


class Data(Section):
    """The prepared data set, and how it is shuffled, cached and loaded."""

    path: str = operational(
        ...,
        "The data set, made by data_prep/prepare.py: a local folder or an s3:// URL. A resumed run checks its hash.",
    )
    flip: bool = key(True, "Whether half of the images, chosen at random, are mirrored.", source="Consistency Models")
    num_canonical_nodes: Count = key(
        8,
        "Number of streams that the order of samples is made of. It fixes the order for any number of nodes; a number "
        "that the nodes divide lets each node read its own shards only.",
        source="the LSUN runs on 8 nodes",
    )
    shuffle_block: Count = key(
        65536,
        "Neighbouring samples of a stream that are shuffled among each other, after the shards have been shuffled. "
        "More mixes better and needs more shards in the cache.",
        unit="samples",
        source="several shards of 256 px images",
    )
    workers: NonNegative = operational(4, "Processes of each rank that load images; 0: the rank loads them itself.")
    prefetch_batches: Count = operational(
        4, "Batches that each worker prepares ahead. More hides slow storage and needs more memory.", unit="batches"
    )
    cache_dir: str | None = operational(
        None,
        "Folder on a local disk of each node where shards are kept; null: in TMPDIR, and local data are read in place.",
    )
    cache_gb: Positive = operational(
        200.0, "Limit of that cache on each node; the shards that were used longest ago are removed.", unit="GB"
    )
    max_bad_samples: NonNegative = operational(
        0,
        "Images per rank that can't be decoded before the run stops. Another sample takes the place of each, and the "
        "log names both.",
        unit="images",
    )
    max_bad_shards: NonNegative = operational(
        0,
        "Damaged shards per rank before the run stops. A damaged shard is fetched again first; samples of another one "
        "take the place of those of a shard that stays damaged.",
        unit="shards",
    )


class Optimizer(Section):
    """The optimizer. As in Consistency Models, the default has no weight decay and a constant learning rate."""

    kind: Literal["radam", "adam"] = key(
        "radam", "RAdam, whose first steps are short by themselves, or Adam.", source="Consistency Models, appendix C"
    )
    learning_rate: Positive = key(
        ..., "Learning rate after the warm-up and before its schedule. LSUN 256: 1e-5; EDM: 1e-4."
    )
    betas: Annotated[tuple[Rate, Rate], AsTuple] = key(
        (0.9, 0.999),
        "Decay rates of the averages of the gradient and of its square.",
        source="PyTorch and released code",
    )
    eps: Positive = key(1e-8, "Added to the root of the second average.", source="PyTorch and released code")
    weight_decay: Annotated[float, Field(ge=0)] = key(
        0.0, "Factor of the weights that is added to the gradient.", source="Consistency Models, appendix C"
    )
    warmup_steps: NonNegative = key(
        0, "Steps over which the learning rate grows linearly.", unit="steps", source="Consistency Models, appendix C"
    )
    schedule: Literal["constant", "inverse_square_root", "cosine", "step"] = key(
        "constant",
        "Multiplies the learning rate by a factor that falls with the step k: `inverse_square_root` by 1 / sqrt(max(k "
        "/ decay_reference, 1)), as EDM2, ECT and sCM do, `cosine` by (1 + cos(pi k / K)) / 2, where K is "
        "decay_reference or train.total_steps, `step` by decay_factor at each of `decay_steps`.",
        source="Consistency Models, appendix C",
    )
    decay_reference: Count | None = key(
        None,
        "The step from which `inverse_square_root` falls, or at which `cosine` ends (null: train.total_steps).",
        unit="steps",
        source="papers give one for each data set",
    )
    decay_steps: Counts = key(
        (),
        "Ascending steps at which `step` falls; only with this schedule.",
        unit="steps",
        source="a choice of each run",
    )
    decay_factor: Annotated[float, Field(gt=0, lt=1)] | None = key(
        None, "The factor of each fall of `step`; only with this schedule.", source="a choice of each run"
    )

    @model_validator(mode="after")
    def _schedule_has_its_keys(self) -> "Optimizer":
        needs = {"inverse_square_root": ("decay_reference",), "step": ("decay_steps", "decay_factor")}
        may_have = {"cosine": ("decay_reference",)}
        for name in ("decay_reference", "decay_steps", "decay_factor"):
            given, needed = bool(getattr(self, name)), name in needs.get(self.schedule, ())
            if needed and not given:
                raise ValueError(f"{name}: is not set; schedule {self.schedule} needs it")
            if given and not needed and name not in may_have.get(self.schedule, ()):
                raise ValueError(f"{name}: schedule {self.schedule} does not use it; leave it out")
        if list(self.decay_steps) != sorted(set(self.decay_steps)):
            raise ValueError(f"decay_steps: {list(self.decay_steps)} must ascend")
        return self


class Engine(Section):
    """Device, precision, ZeRO stage and timeouts."""

    device: Literal["auto", "cpu", "cuda"] = operational("auto", "auto: CUDA if there is a device, else the CPU.")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = operational(
        2,
        "What DeepSpeed ZeRO divides among the ranks: 1 the optimizer's state, 2 also gradients, 3 also weights. "
        "Losses differ by rounding alone; a run may be resumed at another stage.",
    )
    parameters: Literal["separate", "joined"] = operational(
        "separate",
        "How DeepSpeed sees the weights: `separate`, as the layers have them; `joined`, as one tensor, whose gradient "
        "it handles once, which shortens the step of a small network. Then all gradients are in memory at once and are "
        "reduced after the backward pass, not during it; not with stage 3. Losses are the same, but at stage 0 the "
        "norm of gradients, and what is clipped by it, differ by rounding.",
    )
    precision: Literal["fp32", "bf16", "fp16"] = key(
        "fp32",
        "Number format in which the network computes; weights, averages and the optimizer stay in fp32.",
        source="caution: it runs everywhere. Consistency Models: fp16",
    )
    gradient_clip: Positive | None = key(
        None,
        "Largest norm of the gradient of all weights; a longer one is scaled down to it. null: no limit.",
        source="Consistency Models, which does not clip",
    )
    initial_loss_scale_power: Annotated[int, Field(ge=0, le=24)] = key(
        16, "fp16: the loss is first multiplied by 2 to this power, which overflows lower.", source="DeepSpeed"
    )
    collective_timeout_minutes: Positive = operational(
        10.0, "How long ranks wait for each other before the start of a job counts as failed.", unit="minutes"
    )
    step_timeout_minutes: Positive = operational(
        30.0,
        "Longest time between two steps. A rank that takes longer writes the stacks of its threads into logs/ and is "
        "killed, and the job is started again.",
        unit="minutes",
    )
    peak_tflops: Positive | None = operational(
        None,
        "Dense peak rate of one device in this precision. The log's mfu is the share of it that training reaches. "
        "null: it is measured at the start on CUDA, and a CPU has no mfu.",
        unit="TFLOP/s",
    )


class Train(Section):
    """Length, batch sizes, seed, first weights, logging, and what happens after non-finite steps."""

    total_steps: Count = key(
        ...,
        "Steps of the training. It is the length of a method's or learning rate's schedule, unless "
        "method.schedule_steps or optimizer.decay_reference sets one. LSUN Bedroom: 600,000 (EDM, CD), 1,000,000 (CT).",
        unit="steps",
    )
    global_batch_size: Count = key(
        ...,
        "Images of one step over all ranks: micro_batch_size x ranks x accumulated passes. LSUN 256: 2048 in the "
        "paper, 256 in its code.",
        unit="images",
    )
    micro_batch_size: Count = operational(
        ..., "Images of one pass of one rank. It is limited by memory and does not change the losses.", unit="images"
    )
    seed: NonNegative = key(0, "Seed of weights, order of the data, noise, times and dropout.", source="arbitrary")
    random_numbers: Literal["philox", "torch"] = key(
        "philox",
        "What draws noise, times and dropout: `philox`, for all images of a batch at once and with the same numbers on "
        "a CPU and on CUDA; `torch`, as in runs of earlier releases, one of PyTorch's generators for each image and "
        "layer, whose noise and dropout differ between a CPU and CUDA.",
        source="fewer and larger kernels",
    )
    init_from: str | None = operational(
        None,
        "A SOURCE whose weights are the first ones of the network and of all its averages: a run, a checkpoint, an "
        "exported file, or weights of another project. null: the teacher's or random ones, as the method says. It is "
        "read at step 0 alone.",
    )
    init_weights: str | None = operational(
        None, "Which weights of the run `init_from`: an EMA's name, or master. null: its first EMA."
    )
    log_every: Count = operational(50, "Steps between two lines of metrics.jsonl.", unit="steps")
    sample_every: NonNegative = operational(
        0, "Steps between two grids of samples of the first EMA in samples/; 0: none.", unit="steps"
    )
    sample_count: Count = operational(64, "Samples of each of these grids.", unit="samples")
    consistency_error_every: NonNegative = operational(
        0, "Steps between two measurements of the consistency error on 16 images; 0: none.", unit="steps"
    )
    consistency_error_data: str | None = operational(
        None, "Data set of these images, preferably held out: a local folder or s3:// URL. null: the training data."
    )
    max_nonfinite_steps: Count = operational(
        3,
        "Consecutive steps without finite loss and gradient before training rolls back to a checkpoint.",
        unit="steps",
    )
    max_rollbacks: NonNegative = operational(2, "Rollbacks before the run stops with a fault.", unit="rollbacks")
    profile_steps: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}:[1-9][0-9]{0,8}$")] | None = operational(
        None,
        "Steps to profile, such as 10:15 (both included): a trace and the dearest operators of rank 0 in logs/. "
        "null: none.",
    )

    @model_validator(mode="after")
    def _profile_steps_ascend(self) -> "Train":
        if self.profiled is not None and self.profiled[0] > self.profiled[1]:
            raise ValueError(f"profile_steps: {self.profile_steps} must ascend, such as 10:15")
        return self

    @property
    def profiled(self) -> tuple[int, int] | None:
        """The first and the last step to profile."""
        if self.profile_steps is None:
            return None
        first, last = map(int, self.profile_steps.split(":"))
        return first, last


class Checkpoint(Section):
    """When checkpoints are written, which are kept, and where they are uploaded to."""

    every_steps: Count = operational(
        1000, "Steps between two checkpoints; there is always one before a preemption and at the end.", unit="steps"
    )
    keep_last: Count = operational(3, "Newest checkpoints that are kept.", unit="checkpoints")
    keep_every: NonNegative = operational(
        0, "Checkpoints at multiples of this step are kept for good, except step 0; 0: none.", unit="steps"
    )
    stop_on_failure: bool = operational(
        False, "Whether a checkpoint that can't be written stops the run; otherwise training goes on, and says so."
    )
    export_to: str | None = operational(
        None,
        "s3:// URL or folder to which every checkpoint is copied, in a folder of the run's name. null: nowhere. A run "
        "whose copies are not all there in the end is `finished, not exported`.",
    )
    export_keep_last: Count | None = operational(
        None, "Newest copies that stay in `export_to`; older ones are removed there. null: all stay.", unit="copies"
    )
    export_keep_every: NonNegative = operational(
        0, "With `export_keep_last`: copies at multiples of this step stay, too, except step 0; 0: none.", unit="steps"
    )

    @model_validator(mode="after")
    def _pruned_exports(self) -> "Checkpoint":
        if self.export_keep_every and self.export_keep_last is None:
            raise ValueError("export_keep_every: all copies stay unless export_keep_last is set; set both or neither")
        return self


class Sampling(Section):
    """How the trained model is sampled, unless a command says otherwise."""

    times: Annotated[tuple[Positive, ...], AsTuple, Field(min_length=1)] | None = operational(
        None,
        "Descending noise levels (sigma), the first of which is usually method.sigma_max: sampling in as many steps "
        "takes them. They belong to a data set and a method; `cmscale search-times` finds them. null: the times that "
        "were published for the method, if any.",
    )

    @model_validator(mode="after")
    def _descending(self) -> "Sampling":
        if self.times is not None and list(self.times) != sorted(set(self.times), reverse=True):
            raise ValueError(f"times: {list(self.times)} must descend")
        return self


class Restart(Section):
    """When a job is started again after a fault, and how early it is asked to save before a time limit."""

    max_restarts: NonNegative = operational(
        10, "Restarts after faults; preemptions and time limits are not counted.", unit="restarts"
    )
    backoff_seconds: NonNegative = operational(
        10, "Pause before the first restart; it doubles while restarts bring no progress.", unit="seconds"
    )
    signal_seconds: Count = operational(
        120, "Time between the signal to save and the end of the job. A checkpoint must fit into it.", unit="seconds"
    )
