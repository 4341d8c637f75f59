"""Writes the folder of a run as long as the paper's: `python tests/support/long_run.py FOLDER`."""

import argparse
import json
import math
import random
from pathlib import Path

import numpy as np
from PIL import Image
from run_folder import write_evaluation

from cmscale.runs.folder import RunDir

STEPS = 800_000
CHECKPOINTS = 192
FAULT = "RuntimeError: NCCL error on node17: unhandled system error"
BEGAN = 1.79e9


def write_long_run(
    root: Path, *, log_every: int = 50, grids: int = 40, grid_size: int = 264, evaluations: int = 36
) -> RunDir:
    """A run of 800,000 steps: 192 checkpoints, four preemptions, one fault, evaluations at every twelfth of it."""
    run = RunDir(root)
    for folder in (run.samples, run.evaluations):
        folder.mkdir(parents=True)
    run.config.write_text(
        "method: {kind: cd, teacher: runs/teacher, target_ema: 0.95}\n"
        "model: {image_size: 256, channels: 256}\n"
        "data: {path: s3://data/lsun_bedroom}\n"
        f"train: {{total_steps: {STEPS}, global_batch_size: 2048, micro_batch_size: 16, log_every: {log_every}}}\n"
    )
    run.placement.write_text(json.dumps({"nodes": 8, "gpus_per_node": 8}))
    _write_metrics(run, log_every)
    _write_events(run)
    for place in range(grids):
        step = STEPS * (place + 1) // grids
        noise = np.random.default_rng(place).integers(0, 256, (grid_size // 8, grid_size // 8, 3), np.uint8)
        picture = Image.fromarray(noise).resize((grid_size, grid_size), Image.Resampling.BICUBIC)
        picture.save(run.sample_grid(step))
    for place in range(evaluations):
        step = STEPS * (place + 1) // evaluations
        for nfe in (1, 2):
            fid = 3 + 40 / (1 + place) / nfe
            more = {"sfid": 8.0, "inception_score": 2.4, "inception_score_adm": 2.4, "kid": 0.004, "recall": 0.3}
            write_evaluation(
                run,
                step=step,
                nfe=nfe,
                values=(fid, fid + 0.1, fid - 0.1),
                features="inception",
                weights="ema_0.9999432",
                num_samples=50_000,
                metrics=more | {"density": 0.9, "coverage": 0.8},
                reference_name="lsun_bedroom.npz",
            )
    return run


def _write_metrics(run: RunDir, log_every: int) -> None:
    numbers = random.Random(0)
    with run.metrics.open("w") as file:
        for step in (1, *range(log_every, STEPS + 1, log_every)):
            loss = (0.02 + 0.3 / math.sqrt(step)) * math.exp(numbers.gauss(0, 0.2))
            record = {
                "step": step,
                "samples": 2048 * step,
                "loss": loss,
                "lr": 8e-6,
                "num_scales": 40,
                "target_ema": 0.95,
                "grad_norm": math.exp(numbers.gauss(-2, 0.5)),
                "loss_scale": 1.0,
                "seconds": round(0.4 * log_every, 3),
                "images_per_second": round(numbers.gauss(5100, 60), 3),
                "mfu": 0.41,
                "peak_memory_gib": 61.2,
            }
            quartiles = {f"loss_q{q}": loss * q / 2.5 for q in range(1, 5)}
            file.write(json.dumps(record | quartiles) + "\n")


def _write_events(run: RunDir) -> None:
    every = STEPS // CHECKPOINTS
    stops = {40: "preempted", 81: "fault", 95: "preempted", 130: "preempted", 171: "preempted"}
    moment = BEGAN
    events = [_event(moment, "start", 0, attention="xformers: fastest")]
    for number in range(1, CHECKPOINTS + 1):
        step = STEPS if number == CHECKPOINTS else number * every
        moment += 0.4 * every
        events.append(_event(moment, "checkpoint", step, generation=1, seconds=9.1))
        events.append(_event(moment + 60, "exported", step, seconds=40.2))
        if number % 16 == 0:
            events.append(_event(moment + 300, "evaluated", step, "FID 9.1"))
        if stop := stops.get(number):
            why = FAULT if stop == "fault" else "SIGUSR2 from Slurm"
            events.append(_event(moment + 400, stop, step + 7, why))
            moment += 7200
            events.append(_event(moment, "resumed", step))
    events.append(_event(moment + 90, "finished", STEPS))
    run.events.write_text("".join(json.dumps(each) + "\n" for each in events))


def _event(moment: float, event: str, step: int, why: str = "", **more: object) -> dict[str, object]:
    return {"time": moment, "event": event, "step": step, "rank": 0, "why": why, **more}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--grids", type=int, default=160)
    parser.add_argument("--grid-size", type=int, default=2066)
    given = parser.parse_args()
    write_long_run(given.folder, log_every=given.log_every, grids=given.grids, grid_size=given.grid_size)
