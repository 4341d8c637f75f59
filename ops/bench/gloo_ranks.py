"""Trains a tiny network on real ranks over gloo for `scale.py`: forks of one process, which share its imports."""

import importlib
import os
import socket
import statistics
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from PIL import Image
from simulated_ranks import CONFIG

from cmscale.config import dump_config, parse_config
from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines
from cmscale.training import loop
from data_prep.prepare import main as prepare


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


def measure(folder: Path, data: Path, ranks: int) -> dict[str, float]:
    """Trains four steps on real ranks, then resumes for four more. Seconds by name, from the run's events."""
    run = RunDir(folder / "run")
    run.logs.mkdir(parents=True)
    text = CONFIG.replace("STAGE", "2").replace("BATCH", str(ranks)).replace("DATA", str(data))
    found = {}
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # it imports torch's compiler, for seconds
    for name, steps in (("start", 4), ("resumed", 8)):
        run.config.write_text(dump_config(parse_config(text, [f"train.total_steps={steps}"])))
        began = time.time()
        _together(run, ranks)
        events = [event for event in read_lines(run.events) if event["time"] >= began]
        at = {event["event"]: event["time"] for event in reversed(events)}
        found[f"{name}: until the first step may begin"] = at[name] - began
        saves = [event["seconds"] for event in events if event["event"] == "checkpoint"]
        found[f"{name}: a save, in its thread"] = statistics.median(saves)
        found[f"{name}: all"] = time.time() - began
    return found


def _together(run: RunDir, ranks: int) -> None:
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
