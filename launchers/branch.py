"""Makes a run that goes on from a checkpoint of another with other values: `submit.py --branch RUN[@STEP] key=value`.

The new run gets a copy of the checkpoint: weights, moments, target, averages and cursor are as they were, and nothing
that happens to its parent later concerns it. It gets the snapshots of averages by a power function up to there, too:
such an average goes back to step 0. The parent is only read.
"""

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cmscale.config import Config, differences, dump_config, leaves, parse_config, parse_tree, trajectory
from cmscale.config.agreement import check_branch
from cmscale.config.averages import length_of
from cmscale.errors import UserError
from cmscale.io.durable import follow_umask, replace_durably, sync_file
from cmscale.io.fetch import file_sha256
from cmscale.io.place import Place
from cmscale.io.protocol import Storage
from cmscale.io.storage import open_storage
from cmscale.runs.checkpoint_copy import NotIntact, copy_files, copy_snapshots, intact_manifest
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.folder import CHECKPOINT_MANIFEST, RunDir, step_name
from cmscale.runs.lineage import Lineage
from cmscale.runs.manifests import CheckpointManifest, DatasetManifest, FileEntry
from cmscale.runs.snapshot import Code, take_snapshot
from launchers.provenance import record_start
from launchers.run_folders import staged_run, with_absolute_paths

_SCALER = ("engine.precision", "engine.initial_loss_scale_power")
"""Keys with which fp16's loss scale starts anew."""


@dataclass(frozen=True)
class Parent:
    """A run from which another one branches off.

    Attributes:
        named: What the user wrote.
        steps: Those of the checkpoints that may be taken, the first of them if it is intact.
        chosen: Whether the user chose the step.
    """

    named: str
    storage: Storage
    steps: tuple[int, ...]
    chosen: bool
    config: Config

    @property
    def run(self) -> RunDir | None:
        """Its folder; None if it is in an object store."""
        folder = self.storage.local_path("")
        return None if folder is None else RunDir(folder)

    @property
    def name(self) -> str:
        return self.storage.url.rstrip("/").rpartition("/")[2]


def find_parent(text: str, *, runs_dir: Place) -> Parent:
    """The run that `--branch` names: a folder, a name in `--runs-dir`, or a URL, with `@STEP` or without.

    Raises:
        UserError: no such run, or it has no such checkpoint.
    """
    named, at, step = text.rpartition("@")
    storage = _storage(text, runs_dir)
    if storage is None and at and (step == "latest" or re.fullmatch(r"[0-9]{1,9}", step)):
        storage = _storage(named, runs_dir)
    else:
        step = "latest"
    if storage is None:
        raise UserError(f"--branch {text}: no run there, nor in {runs_dir}; give RUN or RUN@STEP")
    steps = committed_steps(storage)
    if not steps:
        raise UserError(f"--branch {text}: the run has no complete checkpoint yet")
    if step != "latest" and int(step) not in steps:
        raise UserError(f"--branch {text}: no checkpoint of that step; choose from {', '.join(map(str, steps))}")
    chosen = tuple(reversed(steps)) if step == "latest" else (int(step),)
    return Parent(text, storage, chosen, step != "latest", _config_of(storage, chosen, named=text))


def _storage(text: str, runs_dir: Place) -> Storage | None:
    place = Place(text)
    if place.is_remote:
        storage = open_storage(place)
        return storage if next(iter(storage.list("checkpoints/")), None) is not None else None
    for folder in (Path(place), runs_dir.local("the folder of runs") / text):
        if (folder / "config.yaml").is_file() or committed_steps(folder):
            return open_storage(folder.absolute())
    return None


def _config_of(storage: Storage, steps: Sequence[int], *, named: str) -> Config:
    """The parent's config: that of the run; of an older release's export, that of its newest intact checkpoint."""
    raw = storage.read_if_present("config.yaml")
    if raw is not None:
        return parse_config(raw.decode(errors="replace"), origin=storage.join("config.yaml"), resolved=True)
    problems = []
    for step in steps:
        folder = storage.sub(f"checkpoints/{step_name(step)}")
        try:
            return parse_tree(intact_manifest(folder).config, origin=folder.url)
        except NotIntact as error:
            problems.append(str(error))
    raise UserError(f"--branch {named}: none of the {len(steps)} checkpoints is intact ({problems[0]})")


def branch_config(parent: Parent, overrides: Sequence[str], origins: dict[str, str]) -> Config:
    """The config of a branch: its parent's, with overrides.

    A schedule without a length of its own keeps that which it had with the parent, unless an override gives one.

    Raises:
        UserError: an override is not allowed in a branch.
    """
    given = {override.partition("=")[0]: override.partition("=")[2] for override in overrides}
    before = parent.config
    for key in ("train.init_from", "train.init_weights"):
        if key in given:
            raise UserError(f"{key}: has no effect beside --branch, which starts with all of its parent; leave it out")
    if (kind := given.get("method.kind", before.method.kind)) != before.method.kind:
        raise UserError(
            f"--branch {parent.named}: method.kind: {before.method.kind} -> {kind}: a branch goes on with its parent's "
            f"network, method and scaling; start a new run, with train.init_from={parent.named} for its weights"
        )
    text, origin = dump_config(before), f"config of {parent.named}"
    config = parse_config(text, list(overrides), origin=origin, resolved=True)
    old, new = trajectory(before), trajectory(config)
    kept = [
        f"{key}={old[key]}"
        for key in _lengths(before, config)
        if key not in given and old.get(key) != new.get(key) and old.get(key) is not None
    ]
    if kept:
        print(f"note: schedules keep their length: {' '.join(kept)}; give another to change it", file=sys.stderr)
    config = parse_config(text, [*overrides, *kept], origin=origin, resolved=True, origins=origins)
    check_branch(before, config, step=parent.steps[0], origin=parent.named)
    return with_absolute_paths(config)


def _lengths(before: Config, config: Config) -> list[str]:
    """The keys that hold the lengths of schedules which both configs have."""
    found = ["method.schedule_steps"] if "schedule_steps" in type(config.method).model_fields else []
    if before.optimizer.schedule == config.optimizer.schedule == "cosine":
        found.append("optimizer.decay_reference")
    return found


def make_branch(run: RunDir, config: Config, code: Code, *, parent: Parent, data: DatasetManifest) -> None:
    """Makes the folder of a branch, with its first checkpoint, or nothing.

    Args:
        data: The data set of `config`.

    Raises:
        UserError: the folder exists or can't be written, no checkpoint is intact, or the branch may not begin with it.
    """
    problems: list[str] = []
    with staged_run(run) as staged:
        for step in parent.steps:
            try:
                lineage = _copy(parent, step, staged, config, data)
                break
            except NotIntact as error:
                problems.append(str(error))
                if parent.chosen:
                    raise UserError(f"--branch {parent.named}: {error}; choose another step") from None
                print(f"note: step {step} of {parent.named} is not taken: {error}", file=sys.stderr)
        else:
            raise UserError(f"--branch {parent.named}: none of {len(problems)} checkpoints is intact ({problems[0]})")
        record_start(staged, code, take_snapshot(code, staged.code), lineage=lineage)
        replace_durably(staged.config, dump_config(config).encode())


def _copy(parent: Parent, step: int, staged: RunDir, config: Config, data: DatasetManifest) -> Lineage:
    """Copies a checkpoint and describes it as the branch's own. Returns what the branch came from."""
    source, folder = parent.storage.sub(f"checkpoints/{step_name(step)}"), staged.checkpoint(step)
    manifest = intact_manifest(source)
    _check(parent, manifest, config, data)
    size = sum(part.file.size for part in manifest.parts)
    print(f"copying the checkpoint of step {step} from {parent.storage.url}: {size / 2**30:.2f} GiB", flush=True)
    if config.ema.lengths:
        for each, why in copy_snapshots(parent.storage, staged, until=step).items():
            print(f"note: the snapshot of step {each} of {parent.named} is not taken: {why}", file=sys.stderr)
    digest = hashlib.sha256(source.read(CHECKPOINT_MANIFEST)).hexdigest()
    manifest = copy_files(source, folder, manifest)
    averages = new_averages(manifest, config)
    parts = manifest.parts
    if averages:
        files = [_with_averages(folder / part.file.name, averages) for part in parts]
        parts = tuple(part.model_copy(update={"file": file}) for part, file in zip(parts, files, strict=True))
    changed = _changed(parent.config, config)
    scalars = dict(manifest.scalars)
    if changed.keys() & set(_SCALER):
        scalars = {"optimizer_step": scalars["optimizer_step"]}
    own = manifest.model_copy(
        update={
            "version": max(2, manifest.version),  # which has a hash of its own
            "generation": 0,
            "config_fingerprint": config.fingerprint(),
            "config": config.model_dump(mode="json"),
            "trajectory": trajectory(config),
            "data_fingerprint": data.fingerprint,
            "quantities": (
                *(each for each in manifest.quantities if not _is_average(each)),
                *config.ema.names,
                *config.ema.power_names,
            ),
            "parts": parts,
            "scalars": scalars,
        }
    )
    replace_durably(folder / CHECKPOINT_MANIFEST, own.to_bytes())
    return Lineage(
        parent=parent.storage.url,
        step=step,
        samples=manifest.state.cursor,
        generation=manifest.generation,
        manifest_sha256=digest,
        changed=changed,
        averages=averages,
    )


def _check(parent: Parent, manifest: CheckpointManifest, config: Config, data: DatasetManifest) -> None:
    """Checks that the branch may begin with this checkpoint, which is not yet read."""
    check_branch(parent.config, config, step=manifest.state.step, origin=parent.named)
    if other := differences(manifest.trajectory, trajectory(parent.config)):
        raise UserError(
            f"--branch {parent.named}: its checkpoint of step {manifest.state.step} was trained with another config "
            f"than the run's ({'; '.join(other)})"
        )
    if data.fingerprint != manifest.data_fingerprint and config.data.path == parent.config.data.path:
        raise UserError(
            f"--branch {parent.named}: data.path holds another data set than the run was trained on (fingerprint "
            f"{manifest.data_fingerprint[:12]}, now {data.fingerprint[:12]}); give data.path=, its own or another"
        )


def _changed(before: Config, config: Config) -> dict[str, tuple[object, object]]:
    """The keys with another value, whatever they change."""
    old, new = ({key: value for key, value, _ in leaves(each)} for each in (before, config))
    return {
        key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    }


def _is_average(quantity: str) -> bool:
    return quantity.startswith("ema_") or length_of(quantity) is not None


def new_averages(manifest: CheckpointManifest, config: Config) -> dict[str, str]:
    """The averages that a checkpoint does not hold, and the one of nearest length in it, with which each begins.

    An average over n steps forgets within a few n what it began with; until then the nearest is the best estimate.
    """
    held = [quantity for quantity in manifest.quantities if quantity.startswith("ema_")]

    def rate(name: str) -> float:
        return float(name.removeprefix("ema_"))

    def distance(one: str, other: str) -> float:
        lengths = sorted((1 - rate(one), 1 - rate(other)))
        return lengths[1] / lengths[0]

    return {name: min(held, key=lambda each: distance(each, name)) for name in config.ema.names if name not in held}


def _with_averages(path: Path, averages: dict[str, str]) -> FileEntry:
    """Adds averages to a rank's file, as copies of others."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    tensors |= {name: tensors[origin] for name, origin in averages.items()}
    staged = path.with_name(f".{path.name}.averages")
    save_file(tensors, staged)
    follow_umask(staged)
    staged.replace(path)
    sync_file(path)
    return FileEntry(name=path.name, size=path.stat().st_size, sha256=file_sha256(path))
