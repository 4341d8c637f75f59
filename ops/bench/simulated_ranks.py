"""Plays one rank of many for `scale.py`: a run's real files, with what the other ranks write made beforehand."""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Action, Row
from safetensors.torch import save_file

from cmscale.config import Config, parse_config, trajectory
from cmscale.data.order import Order, epoch_order
from cmscale.distributed.noticeboard import NoticeBoard
from cmscale.distributed.world import World
from cmscale.engine import resume, staged
from cmscale.engine.checkpoint import Checkpoints
from cmscale.engine.checkpoint_reader import FlatReader
from cmscale.engine.fence import claim_generation
from cmscale.engine.flat_space import count_elements, flat_part_size
from cmscale.io.local import LocalStorage
from cmscale.io.protocol import Entry
from cmscale.runs.checkpoints import committed_steps, read_manifest
from cmscale.runs.folder import CHECKPOINT_MANIFEST, RunDir, rank_file, step_name
from cmscale.runs.manifests import CheckpointManifest, FileEntry, Parameter, TrainState
from cmscale.runs.partition import Partition
from cmscale.training.preflight import versions
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
NUM_PARAMETERS = 600  # as the UNet for 256 px has; each has 64 x 64 elements, so that 4,096 ranks have some
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
        self.names = [CHECKPOINT_MANIFEST, *(rank_file(rank, num_ranks) for rank in range(num_ranks))]
        self.answers = 0

    def sub(self, prefix: str) -> "Listing":
        del prefix
        return self

    def local_path(self, key: str) -> None:
        del key

    def list(self, prefix: str = "") -> Iterator[Entry]:
        keys = (f"{step_name(step)}/{name}" for step in range(EXPORTED) for name in self.names)
        for number, key in enumerate(key for key in keys if key.startswith(prefix)):
            self.answers += number % PAGE == 0
            yield Entry(key, 1)

    def folders(self, prefix: str = "") -> "list[str]":
        del prefix
        self.answers += 1
        return [step_name(step) for step in range(EXPORTED)]


class SimulatedRanks:
    """A run of `ranks` ranks with five checkpoints, and what one rank does at its start, in a save and in a batch.

    Attributes:
        counts: By name and unit, what each action counted beside its seconds, in each call.
    """

    def __init__(self, folder: Path, ranks: int, stage: int, operations: Operations) -> None:
        self.ranks = ranks
        self.counts: dict[tuple[str, str], list[float]] = {}
        self._operations = operations
        self._run = RunDir(folder / "run")
        self._run.logs.mkdir(parents=True)
        text = CONFIG.replace("STAGE", str(stage)).replace("BATCH", str(max(2048, ranks)))
        self._config: Config = parse_config(text)
        self._parameters = tuple(
            Parameter(name=f"blocks.{n}.weight", shape=(64, 64), offset=4096 * n) for n in range(NUM_PARAMETERS)
        )
        size = flat_part_size(count_elements(self._parameters), num_ranks=ranks, alignment=2)
        self._partition = Partition(self._parameters, ranks, stage, size)
        self._world = World(rank=0, num_ranks=ranks, rank_of_node=0, ranks_per_node=8)
        generation = claim_generation(self._run)
        self._board = NoticeBoard()
        self._writer = Checkpoints(
            self._run, self._config, self._world, generation=generation, data_fingerprint="data", board=self._board
        )
        self._own = {name: torch.zeros(self._partition.length(0)) for name in QUANTITIES}
        self._known: dict[int, tuple[bytes, str]] = {}
        for step in range(NUM_CHECKPOINTS):
            self._stage(step)
            self._commit()
        self._order = Order(SHARDS, 8, 0, 65536)
        self._listing = Listing(ranks)
        self._submission = Submission(self._run, "one")
        for rank in range(ranks):
            self._submission.write_rank_end("1", RankEnd(rank, "node", "finished"))

    @property
    def _newest(self) -> Path:
        return self._run.checkpoint(NUM_CHECKPOINTS - 1)

    def actions(self) -> dict[str, Action]:
        """What is measured, by name."""
        found = self._at_start() | self._in_a_save() | self._of_data() | self._of_launcher()
        return {name: partial(self._measured, name, *each) for name, each in found.items()}

    def rows(self, seconds: dict[str, list[float]]) -> list[Row]:
        """The rows of the seconds, and of what was counted in the same rounds."""
        rounds = len(next(iter(seconds.values())))
        rows = [Row(f"{self.ranks}: {name}", "s", values, clock="cpu") for name, values in seconds.items()]
        for (name, unit), values in self.counts.items():
            rows.append(Row(f"{self.ranks}: {name}: {unit}", unit, values[-rounds:]))
        size = (self._newest / CHECKPOINT_MANIFEST).stat().st_size / 1e6
        return [*rows, Row(f"{self.ranks}: manifest", "MB", [size] * rounds)]

    def _measured(self, name: str, action: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> float:
        prepare()
        operations, answers = self._operations.number, self._listing.answers
        began = time.process_time()
        action()
        seconds = time.process_time() - began
        self.counts.setdefault((name, "operations"), []).append(self._operations.number - operations)
        if self._listing.answers > answers:
            self.counts.setdefault((name, "answers"), []).append(self._listing.answers - answers)
        return seconds

    def _at_start(self) -> dict[str, tuple[Callable[[], Any], ...]]:
        manifest = read_manifest(LocalStorage(self._newest))
        other = replace(self._world, rank=self.ranks - 1)
        choose = partial(resume.newest, self._run, self._config, data_fingerprint="data", parameters=self._parameters)
        return {
            "start: versions, the first rank of a node": (partial(versions, self._config, with_source=True),),
            "start: versions, another rank": (partial(versions, self._config, with_source=False),),
            "start: which elements a rank holds": (lambda: self._partition[self.ranks // 2],),
            "start: rank 0 chooses the checkpoint": (partial(choose, self._world),),
            "start: another rank does": (partial(choose, other),),
            "restore: a rank's own part": (partial(self._restore, manifest),),
            "restore: the manifest alone": (lambda: read_manifest(LocalStorage(self._newest)),),
        }

    def _in_a_save(self) -> dict[str, tuple[Callable[[], Any], ...]]:
        apart = self._run.root / "apart"

        def again() -> None:
            staged.remove(self._newest)
            self._stage(NUM_CHECKPOINTS - 1)

        return {
            "save: a rank's own part": (lambda: staged.write_part(apart, self._world, self._own),),
            "save: rank 0's commit": (self._commit, again),
        }

    def _of_data(self) -> dict[str, tuple[Callable[[], Any], ...]]:
        self._share()
        return {
            "order: the first batch of an epoch": (self._share, epoch_order.cache_clear),
            "order: each batch": (self._share,),
        }

    def _of_launcher(self) -> dict[str, tuple[Callable[[], Any], ...]]:
        ends = self._submission.rank_ends
        return {
            "launcher: steps in the run's folder": (lambda: committed_steps(self._run),),
            "exporter: steps in the store": (lambda: committed_steps(self._listing),),  # pyright: ignore[reportArgumentType]
            "launcher: how a start ended": (
                lambda: judge(ends("1"), status=0, first_failure=None, step=0, leaving=None),
            ),
        }

    def _stage(self, step: int) -> None:
        """Writes the files of all ranks, and tells the board."""
        config = self._config
        manifest = CheckpointManifest(
            state=TrainState(step=step, cursor=step * config.train.global_batch_size),
            generation=1,
            num_ranks=self.ranks,
            zero_stage=self._partition.zero_stage,
            config_fingerprint=config.fingerprint(),
            config=config.model_dump(mode="json"),
            trajectory=trajectory(config),
            data_fingerprint="data",
            quantities=QUANTITIES,
            parameters=self._parameters,
            num_elements=count_elements(self._parameters),
            part_size=self._partition.part_size,
            parts=(),
        )
        self._staged = self._writer._staged(self._run.checkpoint(step), manifest, self._own)
        self._staged.folder.mkdir(parents=True)
        for rank in range(self.ranks):
            path = self._staged.folder / rank_file(rank, self.ranks)
            data, digest = self._bytes_of(self._partition.length(rank))
            path.write_bytes(data)
            staged.record(
                self._board, self._staged.folder, rank, FileEntry(name=path.name, size=len(data), sha256=digest)
            )

    def _bytes_of(self, length: int) -> tuple[bytes, str]:
        """A rank's file and its hash; ranks of one length share them."""
        if length not in self._known:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "part"
                save_file({name: torch.zeros(length) for name in QUANTITIES}, path)
                self._known[length] = path.read_bytes(), staged.file_sha256(path)
        return self._known[length]

    def _commit(self) -> None:
        parts = self._writer._await_parts(self._staged.folder)
        self._staged.commit(parts, fence=self._writer._fence.must_be_newest)

    def _restore(self, manifest: CheckpointManifest) -> None:
        read = FlatReader(self._newest, manifest)
        for quantity in QUANTITIES:
            for segment in self._partition[self.ranks // 2]:
                read(quantity, segment.start, segment.length)

    def _share(self) -> np.ndarray:
        """The samples of one rank in one batch."""
        batch = max(2048, self.ranks)
        positions = self._order.rank_positions(0, global_batch_size=batch, rank=self.ranks // 2, num_ranks=self.ranks)
        return self._order.at(positions)[0]
