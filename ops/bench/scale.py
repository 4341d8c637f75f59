"""Measures what starting, saving, committing, restoring and ordering cost as ranks grow, without as many machines.

    python ops/bench/scale.py [--ranks 2,16,128,1024,4096] [--zero-stage 2] [--gloo 2,8,32] [--json FILE]

One process plays one rank of many: rank 0, or where all ranks do the same, any. Files are real; what other ranks
write is written beforehand. Seconds are processor time, so that other processes on the machine do not count, and
operations are those of the file system: a parallel one takes about a millisecond for each. With --gloo, ranks are real:
forks of this process train a tiny network, seconds are wall time, and more ranks than processors wait for each other.
"""

import argparse
import importlib
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from the checkout

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from cmscale.config import dump_config, parse_config, trajectory
from cmscale.data.order import Order, epoch_order
from cmscale.distributed.noticeboard import NoticeBoard
from cmscale.distributed.world import World
from cmscale.engine import checkpoint, resume
from cmscale.engine.checkpoint import Checkpoints, claim_generation
from cmscale.engine.checkpoint_reader import FlatReader
from cmscale.engine.flat_space import count_elements, flat_part_size
from cmscale.io.protocol import Entry
from cmscale.runs.checkpoints import committed_steps, read_manifest
from cmscale.runs.folder import RunDir, rank_file, step_name
from cmscale.runs.log import read_lines
from cmscale.runs.manifests import CheckpointManifest, FileEntry, Parameter, TrainState
from cmscale.runs.partition import Partition
from cmscale.training import loop
from cmscale.training.preflight import versions
from data_prep.prepare import main as prepare
from launchers.judge import RankEnd, judge
from launchers.submission import Submission

CONFIG = """
method: {kind: edm, sampler_steps: 3}
model: {image_size: 8, channels: 32, channel_multipliers: [1], num_res_blocks: 1, head_channels: 32}
data: {path: DATA, workers: 0, num_canonical_nodes: 8}
optimizer: {learning_rate: 1e-3}
engine: {device: cpu, zero_stage: STAGE, step_timeout_minutes: 60.0, collective_timeout_minutes: 30.0}
train: {total_steps: 4, global_batch_size: BATCH, micro_batch_size: 1, log_every: 1}
checkpoint: {every_steps: 2, keep_last: 5}
wandb: {mode: off}
"""
QUANTITIES = ("master", "exp_avg", "exp_avg_sq", "ema_0.999943")
NUM_PARAMETERS = 600  # as the UNet for 256 px has; here each has 64 x 64 elements, so that 4,096 ranks have some
NUM_CHECKPOINTS = 5  # in the run
EXPORTED = 20  # checkpoints in the store
SHARDS = (1000,) * 3000  # 3 million images, as LSUN Bedroom has
PAGE = 1000  # objects of one answer of an object store's listing


class Operations:
    """Counts this process's operations of the file system: files opened, looked at, made, renamed, removed, listed."""

    counted = ("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link")

    def __init__(self) -> None:
        self.number = 0
        sys.addaudithook(self._count)
        for name in ("stat", "lstat", "access"):  # of which Python tells no hook
            setattr(os, name, self._counting(getattr(os, name)))

    def _count(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in self.counted and not str(arguments[0]).startswith(("/proc", "/sys")):
            self.number += 1

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **more: Any) -> Any:
            self.number += 1
            return function(*arguments, **more)

        return counted


class Listing:
    """A store with the exports of a run; counts the answers that its listings take."""

    url = "store"

    def __init__(self, num_ranks: int) -> None:
        self.names = ["manifest.json", *(rank_file(rank, num_ranks) for rank in range(num_ranks))]
        self.answers = 0

    def sub(self, prefix: str) -> "Listing":
        del prefix
        return self

    def local_path(self, key: str) -> None:
        del key

    def list(self, prefix: str = "") -> Iterator[Entry]:
        for number, (step, name) in enumerate((step, name) for step in range(EXPORTED) for name in self.names):
            self.answers += number % PAGE == 0
            key = f"{step_name(step)}/{name}"
            if key.startswith(prefix):
                yield Entry(key, 1)


def main() -> int:
    """Runs the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=numbers, default=(2, 16, 128, 1024, 4096), help="numbers of simulated ranks")
    parser.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=2)
    parser.add_argument("--gloo", type=numbers, default=(), help="numbers of real ranks; none by default")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    operations = Operations()
    result: dict[str, Any] = {"zero_stage": given.zero_stage, "simulated": {}, "gloo": {}}
    for ranks in given.ranks:
        with tempfile.TemporaryDirectory(prefix="scale-") as folder:
            result["simulated"][ranks] = simulated(Path(folder), ranks, given.zero_stage, operations)
    show("simulated ranks: processor seconds (operations of the file system)", result["simulated"])
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        data = make_data(Path(folder)) if given.gloo else Path(folder)
        for ranks in given.gloo:
            result["gloo"][ranks] = real(Path(folder) / str(ranks), data, ranks)
    show("real ranks over gloo: seconds", result["gloo"])
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def show(title: str, found: dict[int, dict[str, str]]) -> None:
    """Prints a table: a row per measurement, a column per number of ranks."""
    if not found:
        return
    table = Table(title, *(f"{ranks:,}" for ranks in found), box=None)
    for name in next(iter(found.values())):
        table.add_row(name, *(str(row[name]) for row in found.values()))
    Console(width=160).print(table)


def simulated(folder: Path, ranks: int, stage: int, operations: Operations) -> dict[str, str]:
    """What one rank of `ranks` does, by name."""
    run = RunDir(folder / "run")
    run.logs.mkdir(parents=True)
    config = parse_config(CONFIG.replace("STAGE", str(stage)).replace("BATCH", str(max(2048, ranks))))
    parameters = tuple(
        Parameter(name=f"blocks.{n}.weight", shape=(64, 64), offset=4096 * n) for n in range(NUM_PARAMETERS)
    )
    part_size = flat_part_size(count_elements(parameters), num_ranks=ranks, alignment=2)
    found: dict[str, str] = {}

    def measure(name: str, action: Callable[[], Any], *, repeats: int = 3) -> Any:
        seconds, value, before = [], None, operations.number
        for _ in range(repeats):
            began = time.process_time()
            value = action()
            seconds.append(time.process_time() - began)
        found[name] = f"{statistics.median(seconds):.4f} ({(operations.number - before) / repeats:.0f})"
        return value

    of_first, of_other = (partial(versions, config, with_source=first) for first in (True, False))
    measure("start: versions, the first rank of a node", of_first)
    measure("start: versions, another rank", of_other)
    segments = Partition(parameters, ranks, stage, part_size)
    measure("engine: which elements this rank holds", lambda: segments[ranks // 2])
    world = World(rank=0, num_ranks=ranks, rank_of_node=0, ranks_per_node=8)
    generation = claim_generation(run)
    writer = Checkpoints(run, config, world, generation=generation, data_fingerprint="data")
    board = NoticeBoard()
    for step in range(NUM_CHECKPOINTS):
        manifest = CheckpointManifest(
            state=TrainState(step=step, cursor=step * config.train.global_batch_size),
            generation=generation,
            num_ranks=ranks,
            zero_stage=stage,
            config_fingerprint=config.fingerprint(),
            config=config.model_dump(mode="json"),
            trajectory=trajectory(config),
            data_fingerprint="data",
            quantities=QUANTITIES,
            parameters=parameters,
            num_elements=count_elements(parameters),
            part_size=part_size,
            parts=(),
        )
        tensors = {name: torch.zeros(sum(each.length for each in segments[0])) for name in QUANTITIES}
        staged = writer._staged(run.checkpoint(step), manifest, tensors)
        staged.folder.mkdir(parents=True)
        files = [own_file(staged.folder, rank, ranks, segments[rank]) for rank in range(ranks)]
        if step == NUM_CHECKPOINTS - 1:
            write = partial(checkpoint.write_part, staged.folder, world, tensors)
            measure("save: a rank's own part", write)
        for rank, file in enumerate(files):
            checkpoint.record(board, staged.folder, rank, file)

        def commit(staged: Any = staged) -> None:
            writer._commit(staged, writer._await_parts(staged.folder))

        measure("save: rank 0's commit", commit, repeats=1)
    newest = run.checkpoint(NUM_CHECKPOINTS - 1)
    size = (newest / "manifest.json").stat().st_size
    found["manifest, MB"] = f"{size / 1e6:.2f}"
    chosen = measure(
        "start: rank 0 chooses the checkpoint",
        lambda: resume.newest(run, config, world, data_fingerprint="data", parameters=parameters),
    )
    other = replace(world, rank=ranks - 1)
    measure(
        "start: another rank does",
        lambda: resume.newest(run, config, other, data_fingerprint="data", parameters=parameters),
    )
    own = segments[ranks // 2]

    def restore() -> None:
        read = FlatReader(chosen.folder, chosen.manifest)
        for quantity in QUANTITIES:
            for segment in own:
                read(quantity, segment.start, segment.length)

    measure("restore: a rank's own part", restore)
    measure("restore: the manifest alone", lambda: read_manifest_of(newest))
    order = Order(SHARDS, 8, 0, 65536)
    epoch_order.cache_clear()
    measure("order: the first batch of an epoch", lambda: share(order, ranks), repeats=1)
    measure("order: each batch", lambda: share(order, ranks))
    measure("launcher: steps in the run's folder", lambda: committed_steps(run))
    listing = Listing(ranks)
    measure("exporter: steps in the store", lambda: committed_steps(listing), repeats=1)  # pyright: ignore[reportArgumentType]
    found["exporter: steps in the store"] += f", {listing.answers} answers"
    submission = Submission(run, "one")
    for rank in range(ranks):
        submission.write_rank_end("1", RankEnd(rank, "node", "finished"))
    measure(
        "launcher: how a start ended",
        lambda: judge(submission.rank_ends("1"), status=0, first_failure=None, step=0, leaving=None),
    )
    return found


def own_file(staged: Path, rank: int, ranks: int, segments: tuple[Any, ...]) -> FileEntry:
    """A rank's file; ranks of one length share their bytes, which need not be hashed again."""
    path = staged / rank_file(rank, ranks)
    length = sum(segment.length for segment in segments)
    data = _bytes_of(length)
    path.write_bytes(data[0])
    return FileEntry(name=path.name, size=len(data[0]), sha256=data[1])


def _bytes_of(length: int, known: dict[int, tuple[bytes, str]] = {}) -> tuple[bytes, str]:  # noqa: B006
    if length not in known:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "part"
            save_file({name: torch.zeros(length) for name in QUANTITIES}, path)
            known[length] = path.read_bytes(), checkpoint.file_sha256(path)
    return known[length]


def read_manifest_of(folder: Path) -> CheckpointManifest:
    from cmscale.io.local import LocalStorage

    return read_manifest(LocalStorage(folder))


def share(order: Order, ranks: int) -> np.ndarray:
    """The samples of one rank in one batch."""
    positions = order.rank_positions(0, global_batch_size=max(2048, ranks), rank=ranks // 2, num_ranks=ranks)
    return order.at(positions)[0]


def make_data(folder: Path) -> Path:
    """A prepared data set of 64 images of 8 px."""
    images = folder / "images"
    images.mkdir()
    for number in range(64):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number:03d}.png")
    made = ["--source", f"folder:{images}", "--format", "mds", "--image-size", "8", "--out", str(folder / "data")]
    with redirect_stdout(sys.stderr):
        assert prepare([*made, "--encoding", "png", "--workers", "1"]) == 0
    return folder / "data"


def real(folder: Path, data: Path, ranks: int) -> dict[str, str]:
    """Trains four steps on real ranks, then resumes for four more. Seconds by name, from the run's events."""
    run = RunDir(folder / "run")
    run.logs.mkdir(parents=True)
    text = CONFIG.replace("STAGE", "2").replace("BATCH", str(ranks)).replace("DATA", str(data))
    found = {}
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # it imports torch's compiler, for seconds
    for name, steps in (("start", 4), ("resumed", 8)):
        run.config.write_text(dump_config(parse_config(text, [f"train.total_steps={steps}"])))
        began = time.time()
        together(run, ranks)
        events = [event for event in read_lines(run.events) if event["time"] >= began]
        at = {event["event"]: event["time"] for event in reversed(events)}
        found[f"{name}: until the first step may begin"] = f"{at[name] - began:.2f}"
        saves = [event["seconds"] for event in events if event["event"] == "checkpoint"]
        found[f"{name}: a save, in its thread"] = f"{statistics.median(saves):.2f}"
        found[f"{name}: all"] = f"{time.time() - began:.2f}"
    return found


def together(run: RunDir, ranks: int) -> None:
    """Trains a run to its end on forks of this process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
            output = os.open(run.logs / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            status = 1
            try:
                status = 0 if loop.main(str(run.root)) == "finished" else 1
            finally:
                os._exit(status)
        children.append(child)
    failed = [rank for rank, child in enumerate(children) if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]
    if failed:
        log = (run.logs / f"rank-{failed[0]}.txt").read_text()[-2000:]
        raise SystemExit(f"rank {failed[0]} of {ranks} failed\n{log}")


if __name__ == "__main__":
    sys.exit(main())
