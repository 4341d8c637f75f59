"""Checks that a checkpoint's manifest agrees with itself, with its folder and with the run that it belongs to."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter

from cmscale.config import Config, MethodSection, differences, trajectory
from cmscale.config.added import SCHEDULE_LENGTHS
from cmscale.config.methods import Method
from cmscale.errors import UserError
from cmscale.runs.folder import RunDir, original_file, rank_file, step_name
from cmscale.runs.manifests import MOMENTS, CheckpointManifest

NOT_SEALED = "its manifest has no hash of its own, as an earlier version wrote it"

_STEP_FOLDER = re.compile(r"step-\d{9}")


def manifest_problems(manifest: CheckpointManifest, *, origin: str) -> list[str]:
    """What in a manifest contradicts its own other fields, or the name of its folder.

    Args:
        origin: The checkpoint's folder or URL.
    """
    found = [*_layout(manifest), *_names(manifest, folder=origin.rstrip("/").rpartition("/")[2])]
    if not manifest.is_sealed:  # no hash protects it
        found += [*_config(manifest), *_progress(manifest)]
    return [f"{origin}: {problem}" for problem in found]


def must_continue(manifest: CheckpointManifest, config: Config, run: RunDir, *, data_fingerprint: str) -> None:
    """Checks that a run goes on from its checkpoint with the values and the images that it was trained with.

    Args:
        config: What the run would go on with, which is in its config.yaml.
        data_fingerprint: The data set's at `data.path`.

    Raises:
        UserError: config.yaml was edited in values that change the losses, or `data.path` holds other images.
    """
    name = step_name(manifest.state.step)
    if changed := differences(manifest.trajectory, trajectory(config)):
        key = "method.schedule_steps"  # for most methods train.total_steps, unless it is given
        length = manifest.trajectory.get(key)
        keep = f" ({key}={length} keeps the schedules)" if any(each.startswith(key) for each in changed) else ""
        raise UserError(
            f"{name} was trained with another config ({'; '.join(changed)}); undo the change in {run.config}{keep}: "
            f"other values are for a new run, --branch {run.root} --name NEW KEY=VALUE"
        )
    if manifest.data_fingerprint != data_fingerprint:
        raise UserError(
            f"{name} was trained on another data set (fingerprint {manifest.data_fingerprint[:12]}, "
            f"now {data_fingerprint[:12]}); point data.path at its own data, or start a new run"
        )


def _layout(manifest: CheckpointManifest) -> Iterator[str]:
    """The flat space must be covered exactly once: by the parameters, by the parts, and by each part's own file."""
    at = 0
    for parameter in manifest.parameters:
        if parameter.offset != at:
            yield f"parameter {parameter.name} is at {parameter.offset}, not {at}"
            return
        at += math.prod(parameter.shape)
    if at != manifest.num_elements:
        yield f"its parameters have {at} elements of {manifest.num_elements}"
    if manifest.part_size is None:
        yield from _listed_segments(manifest)
    elif manifest.zero_stage < 3 and manifest.part_size * manifest.num_ranks < manifest.num_elements:
        yield f"holds {manifest.part_size * manifest.num_ranks} elements of {manifest.num_elements}"


def _listed_segments(manifest: CheckpointManifest) -> Iterator[str]:
    listed = [part.segments or () for part in manifest.parts]
    at = 0
    for start, length in sorted((each.start, each.length) for segments in listed for each in segments):
        if start != at:
            yield f"elements {min(at, start)} to {max(at, start)} are missing or held twice"
            return
        at = start + length
    if at != manifest.num_elements:
        yield f"holds {at} elements of {manifest.num_elements}"
    for part, segments in zip(manifest.parts, listed, strict=True):
        at = 0
        for segment in segments:
            if segment.at != at:
                yield f"{part.file.name}: a segment is at {segment.at}, not {at}"
            at += segment.length


def _names(manifest: CheckpointManifest, *, folder: str) -> Iterator[str]:
    if _STEP_FOLDER.fullmatch(folder) and folder != step_name(manifest.state.step):
        yield f"its manifest is of step {manifest.state.step}"
    if len(manifest.parts) != manifest.num_ranks or any(
        original_file(part.file.name) != rank_file(rank, manifest.num_ranks) for rank, part in enumerate(manifest.parts)
    ):
        yield f"its manifest does not list the files of {manifest.num_ranks} ranks"
    names = [parameter.name for parameter in manifest.parameters]
    for what, listed in (("parameter", names), ("quantity", manifest.quantities)):
        if len(set(listed)) < len(listed):
            yield f"its manifest lists a {what} twice"


def _config(manifest: CheckpointManifest) -> Iterator[str]:
    """The trajectory must have its recorded hash, and the config its values; the moments must be there."""
    if missing := {"master", *MOMENTS} - set(manifest.quantities):
        yield f"its manifest lists no {', '.join(sorted(missing))}"
    trajectory = manifest.trajectory
    if hashlib.sha256(json.dumps(trajectory, sort_keys=True).encode()).hexdigest() != manifest.config_fingerprint:
        yield "config_fingerprint is not that of its trajectory"
    total = _at(manifest.config, "train.total_steps")
    for key, value in trajectory.items():
        own = _at(manifest.config, key)
        if own != value and not (own is None and key in SCHEDULE_LENGTHS and value == total):
            yield f"config: {key} is {_at(manifest.config, key)}, its trajectory has {value}"
            return


def _at(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _progress(manifest: CheckpointManifest) -> Iterator[str]:
    """The cursor counts whole batches, one per step at least; the optimizer has made every step since it started."""
    step, cursor = manifest.state.step, manifest.state.cursor
    batch = _at(manifest.config, "train.global_batch_size")
    if isinstance(batch, int) and (cursor % batch or cursor < step * batch):
        yield f"cursor {cursor} is not that of {step} steps of {batch} images"
    made = manifest.scalars.get("optimizer_step")
    if made is not None and not _may_have_started_at(manifest, step - made):
        yield f"optimizer_step {made:g} is not that of step {step}"


def _may_have_started_at(manifest: CheckpointManifest, start: float) -> bool:
    """Whether a stage of the run began at a step; the first begins at 0."""
    if start <= 0 or start != int(start):
        return start == 0
    method: MethodSection = TypeAdapter(Method).validate_python(manifest.config["method"])
    total = manifest.config["train"]["total_steps"]
    return method.schedule(int(start) - 1, total_steps=method.schedule_length(total)).ends_stage
