"""Arranges the estimate of a run in tables."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from cmscale.config import Config, accumulation_steps
from cmscale.training.estimate import counts
from cmscale.training.estimate.duration import Rates, Scale, at_scale, kept_checkpoints
from cmscale.training.estimate.gpus import GPU, GPUS
from cmscale.training.estimate.memory import GIB, Memory, num_averages

SUSTAINED = 0.35  # of the peak rate, where no rate is given
COPY_RATE = 4e9  # bytes per second from a GPU to the host's memory, where no time of a save is given
SCALES = (8, 16, 32, 64, 128, 256, 512)
ALIKE = 8  # ranks at which bytes per parameter are compared


@dataclass(frozen=True)
class Request:
    """What an estimate is asked for; None stands for an assumption that the tables name.

    Attributes:
        tflops: TFLOP/s that a GPU sustains on the network.
        network: GB/s that a GPU sends to others.
        price: Of a GPU-hour.
        images_per_core: Images that a processor decodes per second (`ops/bench/data.py`).
    """

    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str = "h100-80g"
    tflops: float | None = None
    network: float | None = None
    price: float | None = None
    images_per_core: float = 300.0
    interruption_hours: float = 50_000.0
    save_seconds: float | None = None
    restart_seconds: float = 300.0

    @property
    def num_ranks(self) -> int:
        """The number of ranks, one per GPU."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        name: What it is called in JSON, whatever was asked.
        of: What the title has besides.
    """

    name: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    of: str = ""

    @property
    def title(self) -> str:
        """What is printed above it."""
        return f"{self.name}{self.of}"

    def by_row(self) -> dict[str, dict[str, str]]:
        """The rows by their first column, for JSON."""
        return {row[0]: dict(zip(self.columns[1:], row[1:], strict=True)) for row in self.rows}


def tables(config: Config, request: Request) -> Iterator[Table]:
    """The estimate: the run, the memory of a rank, micro-batches by GPU, time and storage, many GPUs.

    Raises:
        UserError: the global batch does not divide among the ranks.
    """
    accumulation = accumulation_steps(config, num_ranks=request.num_ranks)
    gpu, memory = GPUS[request.gpu], Memory(config, request.num_ranks)
    passes = counts.forward_flop(config)
    size = config.train.micro_batch_size
    image_flop = counts.image_flop(config, activation_checkpointing=config.model.activation_checkpointing)
    count = counts.num_parameters(config)
    images = config.train.total_steps * config.train.global_batch_size
    yield Table(
        "run",
        ("what", "estimate"),
        [
            ("parameters", f"{count / 1e6:.1f} M"),
            ("ranks, micro-batch, accumulation", f"{request.num_ranks}, {size}, {accumulation}"),
            ("forward pass", f"{passes / 1e12:.3g} TFLOP per image"),
            ("training", f"{image_flop / 1e12:.3g} TFLOP per image, {images:,} images"),
        ],
    )
    yield _memory(config, memory, gpu)
    yield _micro_batches(config, memory)
    rates, notes = _rates(config, request, gpu, count=count)
    scale = at_scale(config, rates, num_ranks=request.num_ranks, image_flop=image_flop, count=count)
    assert scale is not None
    yield _time(config, request, rates, notes, scale, count=count)
    yield _scales(config, request, memory, rates, image_flop=image_flop, count=count)


def _memory(config: Config, memory: Memory, gpu: GPU) -> Table:
    """The terms of a rank, and whether they fit."""
    checkpointing = config.model.activation_checkpointing
    size = config.train.micro_batch_size
    terms = memory.terms(size, activation_checkpointing=checkpointing)
    table = Table("memory per rank", ("term", "GiB", "what it is"), of=f", ZeRO-{config.engine.zero_stage}")
    for term in terms:
        table.rows.append((term.name, _gib(term.size), term.remark))
    total = sum(term.size for term in terms)
    if config.engine.precision == "bf16" and not gpu.has_bf16:
        verdict = f"{gpu.title} has no bf16"
    elif total <= gpu.gib * GIB:
        verdict = f"fits in the {gpu.gib} GiB of {gpu.title}"
    else:
        verdict = f"DOES NOT FIT in the {gpu.gib} GiB of {gpu.title}"
    table.rows.append(("total", _gib(total), verdict))
    for moment in memory.moments(size, activation_checkpointing=checkpointing):
        if moment not in terms:
            table.rows.append((f"({moment.name})", _gib(moment.size), f"at another moment: {moment.remark}"))
    alike = memory.at(ALIKE).bytes_per_parameter
    table.rows.append((f"at {ALIKE} ranks", "", f"{alike:.2f} bytes per parameter without activations and buckets"))
    return table


def _micro_batches(config: Config, memory: Memory) -> Table:
    """The largest micro-batch of every GPU."""
    columns = ("GPU", "GiB", "without checkpointing", "with checkpointing")
    table = Table("largest micro-batch", columns)
    for name, gpu in GPUS.items():
        if config.engine.precision == "bf16" and not gpu.has_bf16:
            continue
        sizes = [memory.largest_micro_batch(gpu.gib * GIB, activation_checkpointing=value) for value in (False, True)]
        table.rows.append((name, f"{gpu.gib}", *(str(size) if size else "does not fit" for size in sizes)))
    return table


def _rates(config: Config, request: Request, gpu: GPU, *, count: int) -> tuple[Rates, dict[str, str]]:
    """What is given, and what is assumed in its place, with a note each."""
    peak = gpu.peak(config.engine.precision)
    network = 25.0 if request.nodes > 1 else 150.0
    saved = checkpoint_bytes(config, count) / request.num_ranks
    rates = Rates(
        tflops=SUSTAINED * peak if request.tflops is None else request.tflops,
        network=network if request.network is None else request.network,
        interruption_hours=request.interruption_hours,
        save_seconds=saved / COPY_RATE if request.save_seconds is None else request.save_seconds,
        restart_seconds=request.restart_seconds,
    )
    assumed = f"an assumption: {SUSTAINED:.0%} of {gpu.title}'s {peak:g}; ops/bench/train_step.py measures it"
    return rates, {
        "tflops": assumed if request.tflops is None else f"{rates.tflops / peak:.0%} of {gpu.title}'s {peak:g}",
        "network": "an assumption" if request.network is None else "as given",
        "save": f"an assumption: {COPY_RATE / 1e9:g} GB/s" if request.save_seconds is None else "as given",
    }


def checkpoint_bytes(config: Config, count: int) -> int:
    """Bytes of a checkpoint: master weights, two moments, the target, the averages."""
    return 4 * count * (3 + config.method.facts.has_target + num_averages(config))


def _time(
    config: Config,
    request: Request,
    rates: Rates,
    notes: dict[str, str],
    scale: Scale,
    *,
    count: int,
) -> Table:
    """Step, days, price, data and checkpoints of the run on its nodes."""
    fast, slow = (config.train.global_batch_size / seconds for seconds in scale.seconds)
    needed = fast * request.gpus_per_node / request.num_ranks
    cores = needed / request.images_per_core
    workers = config.data.workers * request.gpus_per_node
    kept, size = kept_checkpoints(config), checkpoint_bytes(config, count) / GIB
    hours = [days * 24 * request.num_ranks for days in scale.days]
    rows = [
        ("sustained", f"{rates.tflops:.4g} TFLOP/s per GPU", notes["tflops"]),
        ("network", f"{rates.network:g} GB/s per GPU", notes["network"]),
        ("step", _span(scale.seconds, "s"), "all or none of the communication behind computation"),
        ("images", f"{slow:.4g} to {fast:.4g} per second", f"{fast / request.num_ranks:.3g} per GPU at most"),
        ("time", _span(scale.days, "days"), "without interruptions"),
        ("GPU-hours", _span(tuple(hours), ""), "" if request.price is None else f"at {request.price:g} each"),
    ]
    if request.price is not None:
        rows.append(("price", _span(tuple(request.price * each for each in hours), ""), "without interruptions"))
    enough = "enough" if workers >= cores else "TOO FEW"
    rows += [
        ("data", f"{needed:.0f} images/s per node", f"{cores:.1f} processors at {request.images_per_core:g} images/s"),
        ("data workers", f"{workers} per node", f"{enough}; data.workers {config.data.workers} per rank"),
        ("checkpoint", f"{size:.2f} GiB", f"{size / request.num_ranks:.2f} GiB per rank"),
        ("kept", f"{kept} checkpoints, {kept * size:.0f} GiB", "keep_last, keep_every; evaluated ones are kept too"),
        *_snapshots(config, count),
        ("a save delays by", f"{rates.save_seconds:.3g} s", notes["save"] + "; ops/bench/checkpoint.py measures it"),
        ("a restart takes", f"{rates.restart_seconds:g} s", "from the interruption to the next step"),
        ("interruptions", f"one in {rates.interruption_hours:,.0f} GPU-hours", "--interruption-hours"),
    ]
    return Table("time and storage", ("what", "estimate", "how"), rows, of=f" on {request.num_ranks} GPUs")


def _snapshots(config: Config, count: int) -> list[tuple[str, str, str]]:
    """The snapshots of averages by a power function, if the run keeps any."""
    if not config.ema.snapshot_every:
        return []
    number = config.train.total_steps // config.ema.snapshot_every
    size = number * 4 * count * len(config.ema.lengths) / GIB
    return [("snapshots", f"{number}, {size:.0f} GiB", "ema.snapshot_every, ema.lengths")]


def _scales(config: Config, request: Request, memory: Memory, rates: Rates, *, image_flop: float, count: int) -> Table:
    """The same run on other numbers of GPUs, with interruptions."""
    every = config.checkpoint.every_steps
    columns = ("GPUs", "GiB", "largest micro-batch", "s per step", "days", "hours between", "save every", "goodput")
    columns += (f"goodput at {every}", "days with interruptions", *(["price"] if request.price is not None else []))
    table = Table("many GPUs", columns)
    checkpointing = config.model.activation_checkpointing
    for num_ranks in SCALES:
        scale = at_scale(config, rates, num_ranks=num_ranks, image_flop=image_flop, count=count)
        if scale is None:
            table.rows.append((str(num_ranks), "", "the batch does not divide", *[""] * (len(columns) - 3)))
            continue
        there = memory.at(num_ranks)
        total = there.total(config.train.micro_batch_size, activation_checkpointing=checkpointing)
        largest = there.largest_micro_batch(GPUS[request.gpu].gib * GIB, activation_checkpointing=checkpointing)
        days = scale.days[1] / scale.configured if scale.configured else float("inf")
        row = (
            str(num_ranks),
            _gib(total),
            str(largest) if largest else "does not fit",
            f"{scale.seconds[1]:.3g}",
            f"{scale.days[1]:.3g}",
            f"{scale.between / 3600:.3g}",
            f"{scale.best_steps} steps",
            f"{scale.best:.2%}",
            f"{scale.configured:.2%}",
            f"{days:.3g}",
        )
        price = () if request.price is None else (f"{days * 24 * num_ranks * request.price:,.0f}",)
        table.rows.append((*row, *price))
    return table


def _span(values: tuple[float, ...], unit: str) -> str:
    low, high = (f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values)
    return f"{low if low == high else f'{low} to {high}'} {unit}".strip()


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
