"""Kills a small run at random moments until it has finished, and compares it with an uninterrupted run.

With --outages its data and the copies of its checkpoints are in an object store that goes away meanwhile.
"""

import collections
import contextlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, assert_never, get_args

import numpy as np
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for a run from any folder

from soak_findings import differences, flaws_of_copies, left_in_shared_memory, orphans, repeated_steps, waits
from soak_processes import NUM_RANKS, PATIENCE, Stuck, family, kill, log_of, ranks_of, start, wait_for
from soak_store import BUCKET, Outages, store

from cmscale.commands.ending import guarded, leave
from cmscale.commands.parser import CommandParser, whole_number
from cmscale.commands.use import USED
from cmscale.errors import UserError
from cmscale.io.storage import open_storage
from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines
from data_prep.demo import write_lmdb
from data_prep.prepare import main as prepare

EVERY = 5  # steps between checkpoints
CONFIG = """
method: {kind: ct, distance: l2, s1: 20}
model: {image_size: 8, channels: 32, channel_multipliers: [1, 1], num_res_blocks: 1, attention_resolutions: [4],
        head_channels: 32, dropout: 0.1}
data: {path: DATA, num_canonical_nodes: 2, workers: 1}
optimizer: {learning_rate: 1e-3}
ema: {rates: [0.9, 0.99]}
engine: {device: cpu}
train: {total_steps: STEPS, global_batch_size: 8, micro_batch_size: 4, log_every: 1}
checkpoint: {every_steps: EVERY, keep_last: 3}
wandb: {mode: off}
restart: {max_restarts: 1000000, backoff_seconds: 0, signal_seconds: 5}
"""
Moment = Literal["while starting", "between steps", "during a save"]
Target = Literal["rank 0", "rank 1", "the controller", "launcher, controller and ranks"]


@dataclass
class Soak:
    """One run that is killed again and again, with a record of the kills."""

    root: Path
    config: Path
    random: random.Random
    run: RunDir = field(init=False)
    seen: set[int] = field(default_factory=set)
    kills: list[tuple[str, str, int]] = field(default_factory=list)
    launcher: subprocess.Popen[bytes] = field(init=False)
    revived_after: int = -1

    def __post_init__(self) -> None:
        self.run = RunDir(self.root / "soak")

    def go(self, number: int) -> None:
        """Starts the run, kills it `number` times, and waits until it has finished.

        Raises:
            Stuck: it hangs, or ends without having finished.
        """
        self.launcher = start(self.root, "soak", self.config)
        while len(self.kills) < number:
            self._revive()
            if self._kill(self.launcher):
                target, moment, step = self.kills[-1]
                print(f"kill {len(self.kills)}/{number}: {target}, {moment}, at step {step}", flush=True)
        signs, until = None, 0.0
        while self.launcher.poll() != 0:
            self._revive()
            if (now := self._signs_of_life()) != signs:
                signs, until = now, time.monotonic() + PATIENCE
            if time.monotonic() > until:
                raise Stuck(f"after the last kill the run did not finish: {log_of(self.root, 'soak')}")
            time.sleep(0.1)

    def end(self) -> None:
        """Kills all processes of the run that are left."""
        kill(family(self.launcher.pid))

    def _revive(self) -> None:
        """Resumes the run if its launcher was killed, or gave up after three kills without progress."""
        if self.launcher.poll() is None:
            return
        if self.launcher.returncode == 0:
            raise Stuck("the run finished before the last kill")
        if self.launcher.returncode == 2 or not self.run.config.exists() or self.revived_after == len(self.kills):
            raise Stuck(f"the run ended without a kill: see {log_of(self.root, 'soak')}")
        self.revived_after = len(self.kills)
        self.launcher = start(self.root, "soak", None)

    def _kill(self, launcher: subprocess.Popen[bytes]) -> bool:
        """Waits for a random moment of a start and kills. Returns False if the launcher ended before that moment."""
        moment: Moment = self.random.choice(get_args(Moment))
        target: Target = self.random.choice(get_args(Target))
        last, leftovers = self._step(), self._staged()
        fresh: dict[int, psutil.Process] = {}

        def started() -> bool:
            fresh.update(enumerate(rank for rank in ranks_of(launcher.pid) if rank.pid not in self.seen))
            return len(fresh) == NUM_RANKS

        if not wait_for(started, launcher):
            return False
        match moment:
            case "while starting":
                time.sleep(self.random.uniform(0, 5))
            case "between steps":
                goal = last + self.random.randint(1, 2 * EVERY)
                if not wait_for(lambda: self._step() >= goal, launcher):
                    return False
                time.sleep(self.random.uniform(0, 0.05))
            case "during a save":
                if not wait_for(lambda: bool(self._staged() - leftovers), launcher):
                    return False
                time.sleep(self.random.uniform(0, 0.02))
            case _:
                assert_never(moment)
        everybody = family(launcher.pid)
        self.seen |= {process.pid for process in everybody}
        match target:
            case "rank 0" | "rank 1":
                victims = [fresh[int(target[-1])]]
            case "the controller":
                victims = [process for process in everybody if process.pid == fresh[0].ppid()]
            case "launcher, controller and ranks":
                victims = everybody
            case _:
                assert_never(target)
        kill(victims)
        if launcher.pid in [victim.pid for victim in victims]:
            launcher.wait()
        self.kills.append((target, moment, self._step()))
        return True

    def _signs_of_life(self) -> list[int]:
        """The sizes of what the run writes while it goes on."""
        files = (self.run.metrics, self.run.events, log_of(self.root, "soak"))
        return [path.stat().st_size for path in files if path.exists()]

    def _step(self) -> int:
        return max((record["step"] for record in read_lines(self.run.metrics)), default=0)

    def _staged(self) -> set[str]:
        return {path.name for path in self.run.checkpoints.glob(".step-*")}


def prepared(folder: Path, *, steps: int) -> Path:
    """Prepares a data set of fifty 8 px images. Returns the config that trains on it."""
    rows, columns = np.mgrid[0:32, 0:32]
    images = (
        np.stack([(37 * number + 3 * (c + 1) * rows + 5 * columns) % 256 for c in range(3)], axis=-1)
        for number in range(50)
    )
    write_lmdb(folder / "images_lmdb", (Image.fromarray(image.astype(np.uint8)) for image in images))
    where = ["--source", f"lsun:{folder / 'images_lmdb'}", "--out", str(folder / "data"), "--samples-per-shard", "20"]
    with contextlib.redirect_stdout(sys.stderr):
        if prepare([*where, "--format", "webdataset", "--image-size", "8", "--encoding", "png"]) != 0:
            raise Stuck("the data set could not be prepared")
    text = CONFIG.replace("DATA", str(folder / "data")).replace("STEPS", str(steps)).replace("EVERY", str(EVERY))
    config = folder / "config.yaml"
    config.write_text(text)
    return config


def in_the_store(config: Path, *, cache: Path) -> None:
    """Moves a config's data to the store, and has checkpoints copied there."""
    url, text = f"s3://{BUCKET}/data", config.read_text()
    for path in (config.parent / "data").iterdir():
        if path.is_file():
            open_storage(url).upload(path.name, path)
    text = text.replace(str(config.parent / "data"), url).replace("workers: 1", f"workers: 1, cache_dir: {cache}")
    text = text.replace("keep_last: 3", f"keep_last: 3, export_to: 's3://{BUCKET}/exports', export_keep_last: 3")
    config.write_text(text)


def report(golden: RunDir, soak: Soak, *, steps: int, asked: int, outages: Outages | None) -> int:
    """Prints counts of kills, outages, repeated steps and differences. Returns the exit status."""
    events = collections.Counter(record["event"] for record in read_lines(soak.run.events))
    found = differences(golden, soak.run, steps=steps)
    found += [f"process {pid} of a killed start still exists" for pid in orphans(soak.seen)]
    batches, others = left_in_shared_memory(soak.seen)
    found += [f"{file} was left behind by a killed start" for file in others]
    repeated = repeated_steps(soak.run)
    by = [collections.Counter(kill[place] for kill in soak.kills) for place in (0, 1)]
    print(f"kills: {len(soak.kills)} of {asked}")
    for counter in by:
        print("  " + ", ".join(f"{name}: {count}" for name, count in sorted(counter.items())))
    if outages is not None:
        found += flaws_of_copies(f"s3://{BUCKET}/exports/{soak.run.name}", newest=steps)
        lost, lengths = waits(soak.run), outages.lengths
        print(f"outages: {len(lengths)}, {sum(lengths):.0f} s in all")
        print(f"  met and waited for: {len(lost)}, {sum(lost)} s")
    print(f"steps: {steps}, repeated: {sum(repeated)}, at most {max(repeated, default=0)} after one kill")
    rejected, unfinished = events["damaged_checkpoint"], events["unfinished_save"]
    print(f"checkpoints: {rejected} damaged, {unfinished} unfinished saves removed")
    print(f"batches left in /dev/shm by workers killed while they made one: {len(batches)}")
    print(f"differences: {len(found)}")
    for line in found[:20]:
        print(f"  {line}")
    return 1 if found or len(soak.kills) < asked else 0


def command_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="soak.py", description=__doc__)
    kills = "number of kills (default: 50)"
    parser.add("--kills", use=USED, type=whole_number(1), default=50, metavar="N", help=kills)
    parser.add("--seed", use=USED, type=whole_number(0), default=0, help="seed for moments and victims (default: 0)")
    folder = "a new folder, which is kept (default: a temporary one, kept only after a failure)"
    parser.add("--out", use=USED, type=Path, help=folder)
    away = "data and copies are in a store that goes away meanwhile"
    parser.add("--outages", use=USED, action="store_true", help=away)
    return parser


def main(arguments: list[str]) -> int:
    flags, _ = command_parser().read(arguments)
    if flags.out is not None and flags.out.exists():
        raise UserError(f"--out {flags.out}: exists; name a new one")
    root = flags.out or Path(tempfile.mkdtemp(prefix="cmscale-soak-"))
    root.mkdir(parents=True, exist_ok=True)
    steps = 2 * EVERY * (flags.kills + 1)
    config = prepared(root, steps=steps)
    try:
        with store() if flags.outages else contextlib.nullcontext() as proxy:
            outages = None
            if proxy is not None:
                cache = root / "cache"
                in_the_store(config, cache=cache)
                outages = Outages(proxy, random.Random(flags.seed + 1), cache)
            status = compare(root, config, kills=flags.kills, seed=flags.seed, steps=steps, outages=outages)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if status == 0 and flags.out is None:
        shutil.rmtree(root)
    else:
        print(f"runs: {root}")
    return status


def compare(root: Path, config: Path, *, kills: int, seed: int, steps: int, outages: Outages | None) -> int:
    """Runs the config twice, once alone and once among kills and outages. Returns the exit status."""
    began = time.monotonic()
    if start(root, "golden", config).wait() != 0:
        print(f"fault: the golden run failed: {log_of(root, 'golden')}", file=sys.stderr)
        return 1
    alone = time.monotonic() - began
    soak = Soak(root, config, random.Random(seed))
    status, began = 1, time.monotonic()
    try:
        with outages or contextlib.nullcontext():
            soak.go(kills)
        status = report(RunDir(root / "golden"), soak, steps=steps, asked=kills, outages=outages)
    except Stuck as stuck:
        print(f"fault: {stuck}", file=sys.stderr)
    finally:
        soak.end()
    print(f"seconds: {time.monotonic() - began:.0f}, of the run that was left alone {alone:.0f}")
    return status


if __name__ == "__main__":
    leave(guarded(main))
