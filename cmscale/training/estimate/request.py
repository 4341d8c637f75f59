"""Holds what an estimate is asked for, and assumes the rates that were not given."""

from dataclasses import dataclass

from cmscale.config import Config
from cmscale.training.estimate.duration import Rates
from cmscale.training.estimate.gpus import GPUS
from cmscale.training.estimate.memory import num_averages

SUSTAINED = 0.35  # of the peak rate, where no rate is given
COPY_RATE = 4e9  # bytes per second from a GPU to the host's memory, where no time of a save is given


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


def rates_of(config: Config, request: Request, *, count: int) -> tuple[Rates, dict[str, str]]:
    """What is given, and what is assumed in its place, with a note each."""
    gpu = GPUS[request.gpu]
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
