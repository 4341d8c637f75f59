"""A tiny config, a data set's manifest, and workers for jobs of this machine."""

import os
import signal
import time
from pathlib import Path

from cmscale.errors import UserError
from cmscale.runs.manifests import DATASET_MANIFEST, DatasetManifest, ShardEntry, dataset_fingerprint

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


def dataset(folder: Path, *, count: int = 10) -> Path:
    """A folder with the manifest of a data set of 8 px images, and no shard."""
    shards = (ShardEntry(name="shard.00000.mds", size=1, sha256="0" * 64, count=count),)
    kind = {"format": "mds", "image_size": 8, "preprocess": "adm", "encoding": "png"}
    manifest = DatasetManifest(
        **kind,
        source="test",
        count=count,
        shards=shards,
        fingerprint=dataset_fingerprint(**kind, shards=shards),
    )
    folder.mkdir()
    (folder / DATASET_MANIFEST).write_bytes(manifest.to_bytes())
    return folder


def worker(folder: str, how: str) -> str:
    """A rank without torch: writes what it is, then ends as `how` says; rank 1 is the one that goes wrong."""
    rank = os.environ["RANK"]
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    starts = Path(folder) / f"rank-{rank}"
    with starts.open("a") as file:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        file.write(" ".join([str(os.getpid()), *(os.environ[name] for name in names)]) + "\n")
    if how == "user_error":
        raise UserError("train.seed: got -1")
    if how == "preempted" and len(starts.read_text().splitlines()) == 1:
        return "preempted"
    if how in ("fault", "killed") and rank == "1":
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("rank 1 is out of luck")
    if how == "once" and rank == "1" and len(starts.read_text().splitlines()) == 1:
        raise RuntimeError("only the first time")
    while how in ("killed", "fault", "forever") and not asked:  # peers of a dead rank, as in a collective
        time.sleep(0.02)
    return "preempted" if asked else "finished"
