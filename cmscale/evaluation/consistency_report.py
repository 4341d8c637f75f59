"""Writes the consistency error of a source along held-out trajectories, as JSON and as a plot."""

import io
import json
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure

from cmscale.consistency.consistency_curve import ErrorCurve, error_curve
from cmscale.consistency.solver import Denoise
from cmscale.data.first_images import first_images
from cmscale.errors import UserError
from cmscale.io.durable import replace_durably
from cmscale.model.precondition import teacher_denoiser_for
from cmscale.model.unet import build_unet
from cmscale.runs.folder import RunDir
from cmscale.source import Source, load_source, load_teacher


def measure_consistency_error(
    source: Source,
    *,
    data: str | None,
    num: int,
    seed: int,
    teacher: str | None,
    out: Path | None,
    plot: Path | None,
    batch_size: int,
    device: torch.device,
) -> Path:
    """Writes the error against time as JSON, and as PNG where a plot is asked for; the JSON's path.

    Trajectories are x + t z, or the ODE of `teacher`; of a distilled source, of its own teacher where none is named.

    Raises:
        UserError: a source without a consistency function, no data, or a run that is elsewhere and no `--out`.
    """
    method, size = source.config.method, source.config.model.image_size
    if not method.facts.is_consistency_model:
        raise UserError(f"consistency-error: {source.origin} is of kind {method.kind}; a consistency model is needed")
    if source.config.model.num_classes is not None:
        raise UserError(f"consistency-error: {source.origin} is class-conditional, and data sets carry no classes")
    path = _place(source, out)
    named, follow = _teacher(source, teacher, device=device)
    clean = first_images(data or source.config.data.path, count=num, size=size)
    curve = error_curve(
        method,
        source.denoiser(device),
        clean,
        indices=range(len(clean)),
        seed=seed,
        teacher=follow,
        batch_size=batch_size,
        device=device,
    )
    result = {
        "step": source.step,
        "weights": source.weights_name,
        "method": method.kind,
        "data": data or source.config.data.path,
        "trajectories": "x + t z" if follow is None else f"the ODE of {named}",
        "num_samples": len(clean),
        "seed": seed,
        "mean": curve.mean,
        **asdict(curve),
    }
    replace_durably(path, json.dumps(result, indent=1).encode())
    if plot is not None:
        replace_durably(plot, draw_curve(curve, title=f"{method.kind}, step {source.step}, {source.weights_name}"))
    return path


def draw_curve(curve: ErrorCurve, *, title: str) -> bytes:
    """The two errors against time, logarithmic, as a PNG."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot(curve.times[1:], curve.neighbours, label="to the next time")
    axes.plot(curve.times[1:], curve.to_start[1:], label="to the one-step sample")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("time t")
    axes.set_ylabel("root mean square difference of f")
    axes.set_title(title)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _place(source: Source, out: Path | None) -> Path:
    if out is not None:
        return out
    if source.run_dir is None:
        raise UserError(f"{source.origin}: not a run on this machine; say where the result goes with --out FILE.json")
    return RunDir(source.run_dir).consistency_error(step=source.step, weights=source.weights_name)


def _teacher(source: Source, named: str | None, *, device: torch.device) -> tuple[str, Denoise | None]:
    """What the trajectories follow, by name and as a denoiser; None where they are straight."""
    if named is not None:
        teacher = load_source(named)
        if not teacher.config.method.facts.can_teach:
            raise UserError(f"--teacher {named}: is of kind {teacher.config.method.kind}; a diffusion model is needed")
        if teacher.config.model.image_size != source.config.model.image_size:
            raise UserError(f"--teacher {named}: its images are {teacher.config.model.image_size} px, not the source's")
        return named, teacher.denoiser(device)
    method = source.config.method
    if not method.facts.follows_teacher:
        return "", None
    network = build_unet(source.config.model)
    network.load_state_dict(load_teacher(source.config))
    network.to(device).eval().requires_grad_(False)
    assert method.teacher_choice is not None
    return method.teacher_choice.source, teacher_denoiser_for(method, network)
