"""Writes a run's folder in training's format, for tests of code that reads one."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from cmscale.config import dump_config, parse_config
from cmscale.runs.folder import RunDir
from cmscale.runs.log import append_line, write_event
from cmscale.runs.results import EvaluationResult, Metric, hash_of

CONFIG = """
method: {kind: ct}
model: {image_size: 16, channels: 32, channel_multipliers: [1, 1], num_res_blocks: 1, head_channels: 32}
data: {path: data}
optimizer: {learning_rate: 1e-4}
train: {total_steps: 1000, global_batch_size: 64, micro_batch_size: 8}
"""


def write_run(root: Path, *, kind: str = "ct", total_steps: int = 200, nfes: tuple[int, ...] = (1, 2)) -> RunDir:
    """A run with metrics, events, three sample grids, provenance, and evaluations with `nfes` at two steps."""
    run = RunDir(root)
    run.samples.mkdir(parents=True)
    run.config.write_text(
        f"method: {{kind: {kind}}}\nmodel: {{image_size: 16}}\n"
        f"train: {{total_steps: {total_steps}, global_batch_size: 64}}\n"
    )
    for step in range(5, total_steps + 1, 5):
        record = {
            "step": step,
            "samples": 64 * step,
            "loss": 3.0 / step,
            "lr": 1e-4,
            "num_scales": 2 + step // 20,
        }
        append_line(run.metrics, record | {"target_ema": 0.95, "grad_norm": 1.0, "images_per_second": 210.0})
    happened = [("start", 0, ""), ("preempted", 80, "SIGUSR2 from Slurm"), ("resumed", 80, "")]
    for second, (event, step, why) in enumerate([*happened, ("finished", total_steps, "")]):
        append_line(run.events, {"time": 1.79e9 + second, "event": event, "step": step, "rank": 0, "why": why})
    for step in (0, total_steps // 2, total_steps):
        pixels = np.random.default_rng(step).integers(0, 256, size=(64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(run.sample_grid(step))
    for step in (total_steps // 2, total_steps):
        for nfe in nfes:
            write_evaluation(run, step=step, nfe=nfe, values=(4000.0 / step / nfe, 4400.0 / step / nfe))
    start = {
        "time": "2026-01-02T03:04:05+00:00",
        "host": "node1",
        "git": "0123456789abcdef",
        "python": "3.11",
    }
    run.provenance.write_text(json.dumps({"starts": [start | {"command": ["submit.py"], "packages": {"torch": "2"}}]}))
    return run


def working_run(root: Path, *, steps: int = 100, **changes: float) -> RunDir:
    """A run whose last event is its start."""
    found = RunDir(root)
    root.mkdir(parents=True)
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    found.config.write_text(dump_config(parse_config(CONFIG, overrides)))
    write_event(found, "start", step=0, rank=0)
    for step in range(10, steps + 1, 10):
        append_line(found.metrics, {"step": step, "loss": 1 / step, "images_per_second": 128.0})
    return found


def write_evaluation(
    run: RunDir,
    *,
    step: int,
    nfe: int,
    values: tuple[float, ...],
    features: str = "efficientnet_lite0",
    weights: str = "ema_0.999",
    times: tuple[float, ...] | None = None,
    warnings: tuple[str, ...] = (),
    num_samples: int = 500,
    reference: str = "0123",
    metrics: dict[str, float] | None = None,
    reference_name: str = "crops",
    date: str | None = None,
) -> None:
    """Writes an evaluation to the run's folder; it replaces one that differs in values and seeds alone."""
    result = EvaluationResult(
        step=step,
        weights=weights,
        nfe=nfe,
        times=times,
        num_samples=num_samples,
        seeds=tuple(range(len(values))),
        features=features,
        score_name="FID" if features == "inception" else "FD-EfficientNet",
        reference={"name": reference_name, "sha256": reference},
        metrics={
            "fid": Metric.of(values),
            "precision": Metric.of([0.5] * len(values)),
            **{name: Metric.of([value] * len(values)) for name, value in (metrics or {}).items()},
        },
        seconds=1.0,
        warnings=warnings,
        date=date,
    )
    named = {"step": step, "weights": weights, "nfe": nfe, "times": times or (), "features": features}
    named |= {"num_samples": num_samples, "reference": reference}
    path = run.evaluation(**named, seeds=1, key=hash_of(named))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(result.to_bytes())
