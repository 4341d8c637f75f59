"""Measures the speed of data loading: this package, a plain PIL loader, mosaicml-streaming, webdataset, bare decoding.

    python ops/bench/data.py [--source lsun:DIR|folder:DIR|...] [--samples 512] [--rounds 5] [--json FILE]
                             [--against FILE]

`cpu` rows count the CPU seconds of this process, which do not depend on the machine's other load. `wall` rows
count elapsed seconds, because they wait for a server or for workers. The measurement is small by default; without
--source the images are generated.
"""

import io
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from the checkout

import harness
import numpy as np
import psutil
import simplejpeg
import torch
from harness import Row
from PIL import Image
from s3 import s3_server
from torch.utils.data import DataLoader, Dataset
from webdataset.compat import WebDataset

from cmscale.commands.use import USED
from cmscale.config import Data
from cmscale.data import Batches, open_batches
from cmscale.data.samples import Samples
from cmscale.distributed.world import World
from cmscale.io.storage import open_storage
from cmscale.runs.manifests import read_dataset_manifest
from data_prep import prepare
from data_prep.making.convert import convert
from data_prep.sources import SourceReader, open_source

SIZE = 256
BATCH = 32
PER_SHARD = 64
# Each row's baseline, its clock, and the ratio that is required.
ROWS: dict[str, tuple[str | None, str, float | None]] = {
    "bare simplejpeg.decode_jpeg": (None, "cpu", None),
    "ours, MDS, warm": ("bare simplejpeg.decode_jpeg", "cpu", 0.85),
    "ours, WebDataset, warm": ("bare simplejpeg.decode_jpeg", "cpu", 0.85),
    "plain PIL loader": ("bare simplejpeg.decode_jpeg", "cpu", None),
    "mosaicml StreamingDataset, warm": ("bare simplejpeg.decode_jpeg", "cpu", None),
    "webdataset, warm": ("bare simplejpeg.decode_jpeg", "cpu", None),
    "bare simplejpeg.decode_jpeg, wall": (None, "wall", None),
    "ours, MDS, cold from S3": ("bare simplejpeg.decode_jpeg, wall", "wall", 0.5),
    "ours, MDS, cold from S3, per CPU second": ("bare simplejpeg.decode_jpeg", "cpu", 0.5),
    "bare decode + resize + encode": (None, "cpu", None),
    "prepare.py, one worker": ("bare decode + resize + encode", "cpu", 0.8),
    "ours, MDS, 1 worker": (None, "wall", None),
    "ours, MDS, 2 workers": ("ours, MDS, 1 worker", "wall", 1.7),
    "ours, MDS, 1 worker, per CPU second": (None, "cpu", None),
    "ours, MDS, 2 workers, per CPU second": ("ours, MDS, 1 worker, per CPU second", "cpu", 1.7),
}


class DataBenchmark:
    """The data sets that are measured, and one method per row, which reads images and returns their number."""

    def __init__(self, folder: Path, *, source: str, images: int, s3: str) -> None:
        self.folder, self.images, self.s3 = folder, images, s3
        self.source = source
        for format in ("mds", "webdataset"):
            self.prepare(folder / format, format)
        self.prepare(f"{s3}/mds", "mds")
        self.manifests = {f: read_dataset_manifest(open_storage(folder / f)) for f in ("mds", "webdataset")}
        samples = Samples(str(folder / "mds"))
        self.encoded = [samples.read(index)[1] for index in range(len(samples))]
        self.files = folder / "files"
        self.files.mkdir()
        for number, data in enumerate(self.encoded):
            (self.files / f"{number:06d}.jpg").write_bytes(data)
        opened = open_source(source)
        read = SourceReader(opened)
        self.originals = [read(key) for key in opened.keys]
        read.close()
        self.warm = {format: self.open(str(folder / format)) for format in self.manifests}
        self.round = 0

    def prepare(self, out: object, format: str) -> None:
        command = ["--source", self.source, "--out", str(out), "--format", format, "--image-size", str(SIZE)]
        command += ["--encoding", "jpeg"]
        with redirect_stdout(io.StringIO()):
            assert prepare.main([*command, "--samples-per-shard", str(PER_SHARD), "--workers", "1"]) == 0

    def open(self, path: str, **more: object) -> Batches:
        config = Data.model_validate({"path": path, "workers": 0, "shuffle_block": PER_SHARD, **more})
        return open_batches(config, World(), seed=0, global_batch_size=BATCH, image_size=SIZE)

    def actions(self) -> dict[str, Callable[[], int]]:
        return {
            "bare simplejpeg.decode_jpeg": self.bare,
            "ours, MDS, warm": lambda: self.take(self.warm["mds"]),
            "ours, WebDataset, warm": lambda: self.take(self.warm["webdataset"]),
            "plain PIL loader": self.pil,
            "mosaicml StreamingDataset, warm": self.streaming,
            "webdataset, warm": self.webdataset,
            "bare simplejpeg.decode_jpeg, wall": self.bare,
            "bare decode + resize + encode": self.convert,
            "prepare.py, one worker": self.prepare_again,
        }

    def take(self, batches: Batches) -> int:
        for _ in range(self.images // BATCH):
            next(batches)
        return self.images // BATCH * BATCH

    def bare(self) -> int:
        for data in self.encoded[: self.images]:
            simplejpeg.decode_jpeg(data)
        return min(self.images, len(self.encoded))

    def pil(self) -> int:
        loader = DataLoader(_Files(sorted(self.files.iterdir())[: self.images]), batch_size=BATCH)
        return sum(len(batch) for batch in loader)

    def streaming(self) -> int:
        # Decoded as in this package, so that only reading and batching differ.
        return sum(len(batch) for batch in DataLoader(self._streaming, batch_size=BATCH, collate_fn=_decoded))

    def webdataset(self) -> int:
        shards = [str(self.folder / "webdataset" / shard.name) for shard in self.manifests["webdataset"].shards]
        dataset: Any = WebDataset(shards, shardshuffle=False).to_tuple("jpg").map(lambda pair: {"image": pair[0]})
        return sum(len(batch) for batch in DataLoader(dataset, batch_size=BATCH, collate_fn=_decoded))

    def convert(self) -> int:
        for data in self.originals:
            convert(data, size=SIZE, preprocess="adm", encoding="jpeg")
        return len(self.originals)

    def prepare_again(self) -> int:
        self.round += 1
        self.prepare(self.folder / f"again-{self.round}", "mds")
        shutil.rmtree(self.folder / f"again-{self.round}")
        return len(self.originals)

    def cold(self) -> tuple[float, float]:
        """Reads an epoch from S3 with an empty cache.

        Returns:
            Images per elapsed second, and per CPU second of this process (reading, hashing and decoding).
        """
        cache = self.folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        with closing(self.open(f"{self.s3}/mds", cache_dir=str(cache), num_canonical_nodes=1)) as batches:
            since, own = time.perf_counter(), time.process_time()
            for _ in range(len(self.encoded) // BATCH):
                next(batches)
            count = len(self.encoded) // BATCH * BATCH
            return count / (time.perf_counter() - since), count / (time.process_time() - own)

    def workers(self, count: int) -> tuple[float, float]:
        """Reads with `count` workers that are already running.

        Returns:
            Images per elapsed second, and per CPU second of the busiest process: the rate if every process had a core.
        """
        with closing(self.open(str(self.folder / "mds"), workers=count, prefetch_batches=2)) as batches:
            for _ in range(4 * count):  # more than what is prefetched
                next(batches)
            processes = [psutil.Process(worker.pid) for worker in batches._iterator._workers]
            before = [_seconds(process) for process in processes]
            since, own = time.perf_counter(), time.process_time()
            done = self.take(batches)
            wall, own = time.perf_counter() - since, time.process_time() - own
            used = sum(_seconds(process) - start for process, start in zip(processes, before, strict=True))
            return done / wall, done / max(own, used / count)

    def __enter__(self) -> "DataBenchmark":
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        self._streaming: Any = StreamingDataset(local=str(self.folder / "mds"), shuffle=True, batch_size=BATCH)
        return self

    def __exit__(self, *_: object) -> None:
        for batches in self.warm.values():
            batches.close()

    def memory(self) -> dict[str, float]:
        """Resident MiB after a tenth of an epoch, and the maximum until the end of the next epoch."""
        epoch = max(10, len(self.encoded) // BATCH)
        batches = self.warm["mds"]
        for _ in range(epoch // 10):
            next(batches)
        early = most = _resident()
        for _ in range(epoch):
            next(batches)
            most = max(most, _resident())
        return {"early_mib": round(early, 1), "most_mib": round(most, 1)}


class _Files(Dataset[torch.Tensor]):
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as image:
            return torch.from_numpy(np.asarray(image.convert("RGB")).copy())


def _decoded(samples: list[dict[str, bytes]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([simplejpeg.decode_jpeg(sample["image"]) for sample in samples]))


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def generated_images(folder: Path, count: int) -> str:
    """Writes `count` images with as many JPEG bytes per pixel as photographs have. Returns the folder as a source."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    for number in range(count):
        coarse = draws.integers(0, 256, (18, 20, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((320, 288), Image.Resampling.BICUBIC)).astype(np.int16)
        image = np.clip(image + draws.normal(0, 9, image.shape), 0, 255).astype(np.uint8)
        (folder / f"{number:06d}.jpg").write_bytes(simplejpeg.encode_jpeg(image, quality=90))
    return f"folder:{folder}"


def measured(benchmark: DataBenchmark, rounds: int) -> dict[str, list[float]]:
    """Images per second of every row in every round."""
    clocks = {"cpu": time.process_time, "wall": time.perf_counter}
    beside: dict[str, list[float]] = {name: [] for name in ROWS}

    def rate(name: str, action: Callable[[], int]) -> harness.Action:
        clock = clocks[ROWS[name][1]]

        def measure() -> float:
            since = clock()
            count = action()
            return count / (clock() - since)

        return measure

    def pair(other: str, action: Callable[[], tuple[float, float]]) -> harness.Action:
        """Of an action that measures both rates at once, the first; the second belongs to the row `other`."""

        def measure() -> float:
            wall, own = action()
            beside[other].append(own)
            return wall

        return measure

    actions = {name: rate(name, action) for name, action in benchmark.actions().items()}
    cold = "ours, MDS, cold from S3"
    actions[cold] = pair(f"{cold}, per CPU second", benchmark.cold)
    for count, name in ((1, "ours, MDS, 1 worker"), (2, "ours, MDS, 2 workers")):
        actions[name] = pair(f"{name}, per CPU second", partial(benchmark.workers, count))
    found = harness.interleaved(actions, rounds=rounds)
    return found | {name: values[-rounds:] for name, values in beside.items() if values}


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add("--source", use=USED, help="source of images, as for prepare.py (default: generated)")
    parser.add("--samples", use=USED, type=int, default=512, help="images per round (default: 512)")
    given = harness.parse(parser)
    with ExitStack() as stack:
        stack.enter_context(harness.threads(1))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cmscale-bench-"))
        s3 = stack.enter_context(s3_server())
        source = given.source or generated_images(Path(folder) / "generated", given.samples)
        built = DataBenchmark(Path(folder), source=source, images=given.samples, s3=s3)
        benchmark = stack.enter_context(built)
        load = os.getloadavg()[0]
        rates = measured(benchmark, given.rounds)
        memory = benchmark.memory()
    rows = [
        Row(name, "images/s", rates[name], baseline, wanted, clock) for name, (baseline, clock, wanted) in ROWS.items()
    ]
    print(f"memory over an epoch: {memory['early_mib']:.0f} MiB early, at most {memory['most_mib']:.0f} MiB")
    return harness.report(given, rows, facts={"images": given.samples, "memory": memory}, load=load)


if __name__ == "__main__":
    sys.exit(harness.run(main))
