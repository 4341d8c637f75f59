"""Arranges the estimate of a run in tables."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cmscale.config import Config, accumulation_steps
from cmscale.training.estimate import counts
from cmscale.training.estimate.duration import Rates, Scale, at_scale, kept_checkpoints
from cmscale.training.estimate.gpus import GPU, GPUS
from cmscale.training.estimate.memory import GIB, Memory
from cmscale.training.estimate.request import Request, checkpoint_bytes, rates_of

SCALES = (8, 16, 32, 64, 128, 256, 512)
ALIKE = 8  # ranks at which bytes per parameter are compared


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        name: What its facts are called in JSON, whatever was asked.
        title: What is printed above it.
        facts: The numbers of its texts, with their units in their names.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    facts: Any
    rows: list[tuple[str, ...]] = field(default_factory=list)


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
    facts = {
        "parameters": count,
        "ranks": request.num_ranks,
        "micro_batch_size": size,
        "accumulation_steps": accumulation,
        "forward_flop_per_image": passes,
        "training_flop_per_image": image_flop,
        "images": images,
    }
    yield Table(
        "run",
        "run",
        ("what", "estimate"),
        facts,
        [
            ("parameters", f"{count / 1e6:.1f} M"),
            ("ranks, micro-batch, accumulation", f"{request.num_ranks}, {size}, {accumulation}"),
            ("forward pass", f"{passes / 1e12:.3g} TFLOP per image"),
            ("training", f"{image_flop / 1e12:.3g} TFLOP per image, {images:,} images"),
        ],
    )
    yield _memory(config, memory, gpu)
    yield _micro_batches(config, memory)
    rates, notes = rates_of(config, request, count=count)
    scale = at_scale(config, rates, num_ranks=request.num_ranks, image_flop=image_flop, count=count)
    assert scale is not None
    yield _time(config, request, rates, notes, scale, count=count)
    yield _scales(config, request, memory, rates, image_flop=image_flop, count=count)


def _memory(config: Config, memory: Memory, gpu: GPU) -> Table:
    """The terms of a rank, and whether they fit."""
    checkpointing = config.model.activation_checkpointing
    size = config.train.micro_batch_size
    terms = memory.terms(size, activation_checkpointing=checkpointing)
    total = sum(term.size for term in terms)
    moments = memory.moments(size, activation_checkpointing=checkpointing)
    others = [moment for moment in moments if moment not in terms]
    alike = memory.at(ALIKE).bytes_per_parameter
    serves = config.engine.precision != "bf16" or gpu.has_bf16
    facts = {
        "zero_stage": config.engine.zero_stage,
        "gib": {term.name: term.size / GIB for term in terms},
        "total_gib": total / GIB,
        "gpu_gib": gpu.gib,
        "fits": serves and total <= gpu.gib * GIB,
        "gib_at_other_moments": {moment.name: moment.size / GIB for moment in others},
        f"bytes_per_parameter_at_{ALIKE}_ranks": alike,
    }
    title = f"memory per rank, ZeRO-{config.engine.zero_stage}"
    table = Table("memory_per_rank", title, ("term", "GiB", "what it is"), facts)
    for term in terms:
        table.rows.append((term.name, _gib(term.size), term.remark))
    if not serves:
        verdict = f"{gpu.title} has no bf16"
    elif facts["fits"]:
        verdict = f"fits in the {gpu.gib} GiB of {gpu.title}"
    else:
        verdict = f"DOES NOT FIT in the {gpu.gib} GiB of {gpu.title}"
    table.rows.append(("total", _gib(total), verdict))
    for moment in others:
        table.rows.append((f"({moment.name})", _gib(moment.size), f"at another moment: {moment.remark}"))
    table.rows.append((f"at {ALIKE} ranks", "", f"{alike:.2f} bytes per parameter without activations and buckets"))
    return table


def _micro_batches(config: Config, memory: Memory) -> Table:
    """The largest micro-batch of every GPU."""
    columns = ("GPU", "GiB", "without checkpointing", "with checkpointing")
    table = Table("largest_micro_batch", "largest micro-batch", columns, facts={})
    for name, gpu in GPUS.items():
        if config.engine.precision == "bf16" and not gpu.has_bf16:
            continue
        sizes = [memory.largest_micro_batch(gpu.gib * GIB, activation_checkpointing=value) for value in (False, True)]
        table.facts[name] = {"gpu_gib": gpu.gib, "without_checkpointing": sizes[0], "with_checkpointing": sizes[1]}
        table.rows.append((name, f"{gpu.gib}", *(str(size) if size else "does not fit" for size in sizes)))
    return table


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
    facts = {
        "gpus": request.num_ranks,
        "tflop_per_second_per_gpu": rates.tflops,
        "network_gb_per_second_per_gpu": rates.network,
        "step_seconds": scale.seconds,
        "images_per_second": (slow, fast),
        "days": scale.days,
        "gpu_hours": hours,
        "price": None if request.price is None else [request.price * each for each in hours],
        "images_per_second_per_node": needed,
        "processors_per_node": cores,
        "data_workers_per_node": workers,
        "checkpoint_gib": size,
        "checkpoints_kept": kept,
        "snapshots_kept": _num_snapshots(config),
        "snapshot_gib": _snapshot_gib(config, count),
        "save_seconds": rates.save_seconds,
        "restart_seconds": rates.restart_seconds,
        "gpu_hours_between_interruptions": rates.interruption_hours,
    }
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
    title = f"time and storage on {request.num_ranks} GPUs"
    return Table("time_and_storage", title, ("what", "estimate", "how"), facts, rows)


def _snapshots(config: Config, count: int) -> list[tuple[str, str, str]]:
    """The snapshots of averages by a power function, if the run keeps any."""
    number = _num_snapshots(config)
    size = number * _snapshot_gib(config, count)
    return [("snapshots", f"{number}, {size:.0f} GiB", "ema.snapshot_every, ema.lengths")] if number else []


def _num_snapshots(config: Config) -> int:
    return config.train.total_steps // config.ema.snapshot_every if config.ema.snapshot_every else 0


def _snapshot_gib(config: Config, count: int) -> float:
    return 4 * count * len(config.ema.lengths) / GIB


def _scales(config: Config, request: Request, memory: Memory, rates: Rates, *, image_flop: float, count: int) -> Table:
    """The same run on other numbers of GPUs, with interruptions."""
    every = config.checkpoint.every_steps
    columns = ("GPUs", "GiB", "largest micro-batch", "s per step", "days", "hours between", "save every", "goodput")
    columns += (f"goodput at {every}", "days with interruptions", *(["price"] if request.price is not None else []))
    table = Table("many_gpus", "many GPUs", columns, facts=[])
    checkpointing = config.model.activation_checkpointing
    for num_ranks in SCALES:
        scale = at_scale(config, rates, num_ranks=num_ranks, image_flop=image_flop, count=count)
        if scale is None:
            table.rows.append((str(num_ranks), "", "the batch does not divide", *[""] * (len(columns) - 3)))
            table.facts.append({"gpus": num_ranks, "batch_divides": False})
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
        price = None if request.price is None else days * 24 * num_ranks * request.price
        table.rows.append((*row, *(() if price is None else (f"{price:,.0f}",))))
        facts = {
            "gpus": num_ranks,
            "batch_divides": True,
            "total_gib": total / GIB,
            "largest_micro_batch": largest,
            "step_seconds": scale.seconds,
            "days": scale.days,
            "hours_between_interruptions": scale.between / 3600,
            "best_save_every_steps": scale.best_steps,
            "best_goodput": scale.best,
            "goodput": scale.configured,
            "days_with_interruptions": days,
            "price": price,
        }
        table.facts.append(facts)
    return table


def _span(values: tuple[float, ...], unit: str) -> str:
    low, high = (f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values)
    return f"{low if low == high else f'{low} to {high}'} {unit}".strip()


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
