"""Measures checkpoints: by how much a save delays training, uploads, and what a restart reads.

    python ops/bench/checkpoint.py [key=value ...] [--rounds 5] [--out DIR] [--device auto|cpu|cuda]
                                   [--json FILE] [--against FILE]

A save copies the state and returns; a synchronous save also waits until the checkpoint is committed. Uploads go to
`--to s3://BUCKET/...`, by default to a server on this machine, against a bare parallel multipart upload of the same
file. A rank of eight reads its own share of every quantity. Seconds are elapsed ones: they wait for files and servers.
"""

import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from the checkout

import harness
from harness import Row
from s3 import s3_server
from train_step import alone, make_step

from cmscale.commands.use import USED
from cmscale.config import dump_config, parse_config
from cmscale.engine.checkpoint import Checkpoints
from cmscale.engine.checkpoint_reader import FlatReader, read_manifest
from cmscale.engine.copying import export_checkpoint
from cmscale.engine.fence import claim_generation
from cmscale.io.local import LocalStorage
from cmscale.io.storage import open_storage
from cmscale.runs.folder import RunDir
from cmscale.runs.manifests import TrainState

TEXT = """
method: {kind: ct, distance: l2}
model: {image_size: 16, channels: 192, channel_multipliers: [1, 2], num_res_blocks: 1, head_channels: 64}
data: {path: nowhere}
optimizer: {learning_rate: 1.0e-5}
train: {total_steps: 100, global_batch_size: 2, micro_batch_size: 2}
ema: {rates: [0.9999, 0.99994, 0.999943]}
"""
RANKS = 8
PARALLEL = 8


class CheckpointBenchmark:
    """A run with an engine, saved again and again."""

    def __init__(self, run: RunDir, overrides: list[str], world: Any, *, target: str) -> None:
        self.run, self.target = run, target
        config = parse_config(TEXT, overrides)
        run.config.write_text(dump_config(config))
        self.step = make_step(config, world)
        self.step()
        self.checkpoints = Checkpoints(
            run, config, world, generation=claim_generation(run), data_fingerprint="benchmark"
        )
        self.number = 0
        self.save()
        self.checkpoints.wait()

    def save(self) -> float:
        """Starts a save of another step. Returns the seconds of the call."""
        self.number += 1
        began = time.perf_counter()
        self.checkpoints.save(TrainState(step=self.number, cursor=self.number), self.step.parts.engine)
        return time.perf_counter() - began

    def stall(self) -> float:
        """Seconds by which a save delays training, while it is written beside the next step."""
        self.checkpoints.wait()
        return self.save()

    def synchronous(self) -> float:
        self.checkpoints.wait()
        began = time.perf_counter()
        self.save()
        self.checkpoints.wait()
        return time.perf_counter() - began

    @property
    def folder(self) -> Path:
        self.checkpoints.wait()
        return self.run.checkpoint(self.number)

    @property
    def file(self) -> Path:
        return next(self.folder.glob("rank-*"))

    def megabytes(self) -> float:
        return self.file.stat().st_size / 1e6

    def upload(self) -> float:
        """MB/s of a checkpoint's file through this package's storage."""
        began = time.perf_counter()
        open_storage(self.target).upload(f"ours-{self.number}-{began}", self.file)
        return self.megabytes() / (time.perf_counter() - began)

    def checked_upload(self) -> float:
        """MB/s of a whole export: uploaded, read back, compared, committed by the manifest."""
        began = time.perf_counter()
        assert export_checkpoint(self.folder, open_storage(self.target).sub(f"export-{self.number}-{began}"))
        return self.megabytes() / (time.perf_counter() - began)

    def bare_upload(self) -> float:
        """MB/s of boto3's own parallel multipart upload."""
        from boto3.s3.transfer import TransferConfig
        from boto3.session import Session

        bucket, _, prefix = self.target.removeprefix("s3://").partition("/")
        settings = TransferConfig(multipart_threshold=1 << 23, max_concurrency=PARALLEL)
        client = Session().client("s3")
        began = time.perf_counter()
        client.upload_file(str(self.file), bucket, f"{prefix}bare-{began}", Config=settings)
        return self.megabytes() / (time.perf_counter() - began)

    def read(self, ranks: int) -> float:
        """Seconds in which a rank of `ranks` reads its share of a checkpoint."""
        manifest = read_manifest(LocalStorage(self.folder))
        reader = FlatReader(self.folder, manifest)
        length = manifest.num_elements // ranks
        began = time.perf_counter()
        for quantity in manifest.quantities:
            reader(quantity, 0, length).clone()
        return time.perf_counter() - began


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add("overrides", use=USED, nargs="*", metavar="key=value")
    parser.add("--out", use=USED, type=Path, help="where checkpoints are written (default: the temporary folder)")
    parser.add("--to", use=USED, metavar="s3://...", help="where they are uploaded to")
    parser.add("--device", use=USED, choices=("auto", "cpu", "cuda"), default="auto")
    given = harness.parse(parser)
    with ExitStack() as stack:
        world = stack.enter_context(alone(given.device, 1))
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=given.out))) / "run"
        root.mkdir()
        target = given.to or stack.enter_context(s3_server())
        world = replace(world)
        benchmark = CheckpointBenchmark(RunDir(root), given.overrides, world, target=f"{target.rstrip('/')}/")
        load = os.getloadavg()[0]
        found = harness.interleaved(
            {
                "stall of a save": benchmark.stall,
                "synchronous save": benchmark.synchronous,
                "upload": benchmark.upload,
                "upload, read back, committed": benchmark.checked_upload,
                "bare multipart upload": benchmark.bare_upload,
                f"restart, one of {RANKS} ranks": lambda: benchmark.read(RANKS),
                "restart, the whole": lambda: benchmark.read(1),
            },
            rounds=given.rounds,
        )
        facts = {"mb": round(benchmark.megabytes(), 1), "device": world.device.type, "target": given.to or "local moto"}
    rows = [
        Row("stall of a save", "s", found["stall of a save"], "synchronous save", 10.0),
        Row("synchronous save", "s", found["synchronous save"]),
        Row("upload", "MB/s", found["upload"], "bare multipart upload", 0.8),
        Row("upload, read back, committed", "MB/s", found["upload, read back, committed"], "bare multipart upload"),
        Row("bare multipart upload", "MB/s", found["bare multipart upload"]),
        Row(f"restart, one of {RANKS} ranks", "s", found[f"restart, one of {RANKS} ranks"], "restart, the whole", 4.0),
        Row("restart, the whole", "s", found["restart, the whole"]),
    ]
    return harness.report(given, rows, facts=facts, load=load)


if __name__ == "__main__":
    sys.exit(harness.run(main))
