"""Writes the consistency error of a source along held-out trajectories, as JSON and as a plot."""

import io
import json
import sys
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from matplotlib.figure import Figure

from cmscale import __version__
from cmscale.config.published import is_elsewhere
from cmscale.consistency.consistency_curve import ErrorCurve, error_curve
from cmscale.consistency.consistency_error import TIMES
from cmscale.consistency.solver import Denoise
from cmscale.data.first_images import first_images
from cmscale.errors import UserError
from cmscale.evaluation.progress import must_be_there
from cmscale.generation.draw import advancing
from cmscale.io.counting import Counting
from cmscale.io.json_text import parse_json
from cmscale.io.place import Place
from cmscale.io.storage import open_storage
from cmscale.model.precondition import teacher_denoiser_for
from cmscale.model.unet import build_unet
from cmscale.runs.choices import refuse_followed, refuse_other_models
from cmscale.runs.folder import RunDir
from cmscale.runs.manifests import read_dataset_manifest
from cmscale.runs.results import hash_of, utc_now
from cmscale.source import Source, load_source, load_teacher, weights_fingerprint


@dataclass(frozen=True)
class _Followed:
    """What the trajectories follow: in words, the hash of a teacher's weights, and the teacher; None if straight."""

    description: str
    sha256: str | None = None
    denoise: Denoise | None = None


def measure_consistency_error(
    source: Source,
    *,
    data: str | None,
    num: int,
    seed: int,
    teacher: str | None,
    out: Place | None,
    plot: Place | None,
    batch_size: int,
    device: torch.device,
    force: bool = False,
) -> Place:
    """Writes the error against time as JSON, and as PNG where a plot is asked for; the JSON's path.

    A result of the same that exists is returned as it is, unless `force` is set.

    Trajectories are x + t z, or the ODE of `teacher`; of a distilled source, of its own teacher where none is named.

    Raises:
        UserError: a source without a consistency function, no data, a run that is elsewhere and no `--out`, or another
            result is at `--out`.
    """
    refuse_other_models(source.config, origin=source.origin, what="consistency-error")
    url = data or _data_of(source)
    manifest = read_dataset_manifest(open_storage(url))
    followed = _teacher(source, teacher, device=device)
    if num > manifest.count:
        print(f"warning: {url} holds {manifest.count} images, fewer than {num}: all are taken", file=sys.stderr)
    num = min(num, manifest.count)
    identity = _identity(source, followed, data_fingerprint=manifest.fingerprint, num=num, seed=seed)
    key = hash_of(identity)
    path = _place(source, out, num_samples=num, seed=seed, key=key)
    result = _existing(path, key=key, force=force)
    if result is None:
        path.check_output()
        clean = first_images(url, count=num, size=source.config.model.image_size)
        with Counting("following trajectories", total=num) as counting:
            curve = error_curve(
                source.config.method,
                advancing(source.denoiser(device), counting.advance, evaluations=TIMES),
                clean,
                indices=range(num),
                seed=seed,
                teacher=followed.denoise,
                batch_size=batch_size,
                device=device,
            )
            counting.set(num)
        if out is None:
            must_be_there(source.run_dir)
        result = _document(source, followed, curve, data=url, identity=identity, key=key)
        path.write(json.dumps(result, indent=1).encode())
    if plot is not None:
        curve = ErrorCurve(**{field.name: result[field.name] for field in fields(ErrorCurve)})
        title = f"{source.config.method.kind}, step {source.step}, {source.weights_name}"
        Place(plot).write(draw_curve(curve, title=title))
    return path


def _data_of(source: Source) -> Place:
    """What a source was trained on."""
    place = Place(source.config.data.path)
    _refuse_lost(source, place, what="the data that it was trained on", option="--data")
    return place


def _refuse_lost(source: Source, place: Place, *, what: str, option: str) -> None:
    """Raises UserError if exported weights have the name alone of what they were made from."""
    if is_elsewhere(place):
        raise UserError(f"{source.origin}: of {what} it has the name alone, {place}; give {option}")


def _identity(source: Source, followed: _Followed, *, data_fingerprint: str, num: int, seed: int) -> dict[str, Any]:
    """What determines the result."""
    return {
        "step": source.step,
        "weights": source.weights_name,
        "weights_sha256": source.fingerprint,
        "model": source.config.model.described(),
        "data_fingerprint": data_fingerprint,
        "teacher_sha256": followed.sha256,
        "num_samples": num,
        "seed": seed,
        "cmscale": __version__,
    }


def _document(
    source: Source, followed: _Followed, curve: ErrorCurve, *, data: str, identity: dict[str, Any], key: str
) -> dict[str, Any]:
    """The content of the JSON file."""
    return {
        "method": source.config.method.kind,
        "data": data,
        "trajectories": followed.description,
        **identity,
        "mean": curve.mean,
        **asdict(curve),
        "date": utc_now(),
        "key": key,
    }


def _existing(path: Place, *, key: str, force: bool) -> dict[str, Any] | None:
    """The result of the same at `path`; None if it is to be measured.

    Raises:
        UserError: another result or something else is there, and is not to be replaced.
    """
    content = path.read_if_present()
    if content is None:
        return None
    try:
        found = parse_json(content)
    except ValueError:
        found = None
    if not isinstance(found, dict) or "neighbours" not in found:
        raise UserError(f"{path}: holds something else than a consistency error; name another file")
    if force:
        return None
    if found.get("key") != key:
        raise UserError(f"{path}: holds another measurement; give another --out, or --force to replace it")
    print(f"{path}: measured {found['date']} already; --force measures anew", file=sys.stderr, flush=True)
    return found


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


def _place(source: Source, out: Place | None, *, num_samples: int, seed: int, key: str) -> Place:
    if out is not None:
        return Place(out)
    if source.run_dir is None:
        raise UserError(f"{source.origin}: not a run on this machine; say where the result goes with --out FILE.json")
    file = RunDir(source.run_dir).consistency_error(
        step=source.step, weights=source.weights_name, num_samples=num_samples, seed=seed, key=key
    )
    return Place(file)


def _teacher(source: Source, named: str | None, *, device: torch.device) -> _Followed:
    """The teacher that is named, else the source's own; straight trajectories if it has none."""
    if named is not None:
        teacher = load_source(named)
        refuse_followed(teacher.config, source.config, teacher=named)
        followed = teacher.denoiser(device)  # with the teacher's own sigma_data
        return _Followed(f"the ODE of {named}", weights_fingerprint(teacher.weights), followed)
    method = source.config.method
    if not method.facts.follows_teacher:
        return _Followed("x + t z")
    assert method.teacher_choice is not None
    _refuse_lost(source, Place(method.teacher_choice.source), what="its teacher", option="--teacher")
    network = build_unet(source.config.model)
    weights = load_teacher(source.config)
    network.load_state_dict(weights)
    network.to(device).eval().requires_grad_(False)
    description = f"the ODE of {method.teacher_choice.source}"
    return _Followed(description, weights_fingerprint(weights), teacher_denoiser_for(method, network))
