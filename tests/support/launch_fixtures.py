"""A tiny config, a data set's manifest, placements, and workers for jobs without torch."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from cmscale.config import Restart, Slurm
from cmscale.errors import NoSpace, UserError
from cmscale.runs.manifests import DATASET_MANIFEST, DatasetManifest, ShardEntry, dataset_fingerprint
from launchers.placement import Placement, PlacementRequest

CHECKOUT = Path(__file__).resolve().parents[2]
CONFIG = """
method:
  kind: edm
model: {{image_size: 8, channels: 32, channel_multipliers: [1, 1], num_res_blocks: 1, head_channels: 32}}
data: {{path: "{data}"}}
optimizer: {{learning_rate: 1e-3}}
train: {{total_steps: 3, global_batch_size: 8, micro_batch_size: 2}}
engine: {{device: cpu}}
restart: {{signal_seconds: 5}}
"""


def placement(cluster: str = "slurm", **changed: Any) -> Placement:
    """A placement on one node of one CPU rank, but for what is given."""
    defaults = {"nodes": 1, "ranks_per_node": 1, "gpus": False, "partition": None, "minutes": 60}
    return Placement(cluster, **{**defaults, "slurm": Slurm(), "restart": Restart(), **changed})


def placement_request(**changed: Any) -> PlacementRequest:
    """What a command without flags requests for CPU ranks, but for what is given."""
    defaults = {"nodes": 1, "ranks_per_node": None, "partition": None, "minutes": None, "device": "cpu"}
    return PlacementRequest(
        **{
            **defaults,
            "dry_run": False,
            "device_option": "engine.device=",
            "slurm": Slurm(),
            "restart": Restart(),
            **changed,
        }
    )


def dataset(folder: Path, *, count: int = 10) -> Path:
    """A folder with the manifest of a data set of 8 px images, and no shard."""
    shards = (ShardEntry(name="shard.00000.mds", size=1, sha256="0" * 64, count=count),)
    kind: dict[str, Any] = {"format": "mds", "image_size": 8, "preprocess": "adm", "encoding": "png"}
    fingerprint = dataset_fingerprint(**kind, shards=shards)
    manifest = DatasetManifest(**kind, source="test", count=count, shards=shards, fingerprint=fingerprint)
    folder.mkdir()
    (folder / DATASET_MANIFEST).write_bytes(manifest.to_bytes())
    return folder


def worker(folder: str, how: str) -> str:
    """Writes the rank's place to `folder`, then ends as `how` says; the faults happen on rank 1."""
    rank = os.environ["RANK"]
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    starts = Path(folder) / f"rank-{rank}"
    with starts.open("a") as file:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        file.write(" ".join([str(os.getpid()), *(os.environ[name] for name in names)]) + "\n")
    if how == "user_error":
        raise UserError("train.seed: got -1")
    if how == "no_space":
        raise NoSpace("no space left")
    if how == "preempted" and len(starts.read_text().splitlines()) == 1:
        return "preempted"
    if how in ("fault", "killed") and rank == "1":
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("rank 1 is out of luck")
    if how == "once" and rank == "1" and len(starts.read_text().splitlines()) == 1:
        raise RuntimeError("only the first time")
    while how in ("killed", "fault", "forever") and not signals:  # as in a collective that a rank does not reach
        time.sleep(0.02)
    return "preempted" if signals else "finished"


def starts(folder: Path, rank: int) -> list[list[str]]:
    """What `worker` wrote as this rank: process id and place, per start."""
    file = folder / f"rank-{rank}"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []
