"""Finds the newest valid checkpoint and restores it, into any world size and ZeRO stage."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cmscale.config import Config, differences, trajectory
from cmscale.distributed.collectives import from_main, gather, on_main
from cmscale.distributed.world import World
from cmscale.engine.checkpoint_reader import FlatReader, parts_problems, read_manifest
from cmscale.engine.engine import Engine
from cmscale.errors import UserError
from cmscale.io.local import LocalStorage
from cmscale.io.remarks import say
from cmscale.runs.checkpoints import named_steps
from cmscale.runs.folder import CHECKPOINT_MANIFEST, RunDir, step_of
from cmscale.runs.lineage import read_lineage
from cmscale.runs.log import read_lines, write_event
from cmscale.runs.manifest_checks import NOT_SEALED, manifest_problems, must_continue
from cmscale.runs.manifests import CheckpointManifest, Parameter, TrainState


@dataclass(frozen=True)
class Found:
    """A checkpoint of which every file was read and has the recorded hash."""

    folder: Path
    manifest: CheckpointManifest


def newest(
    run: RunDir,
    config: Config,
    world: World,
    *,
    data_fingerprint: str,
    parameters: Sequence[Parameter] | None = None,
    fresh: bool = False,
) -> Found | None:
    """The newest valid checkpoint of a run, the same on all ranks; None if the run has none. Collective.

    A damaged one is recorded in events.jsonl and renamed, and the one before it is tried.

    Args:
        parameters: The flat space of the run's network; a manifest with another one is damaged.
        fresh: Starts from step 0 if no checkpoint is valid.

    Raises:
        UserError: a checkpoint may not be read; or all checkpoints are damaged, or the run has made steps and has no
            checkpoint (both unless `fresh`); or the checkpoint belongs to another config (in values that change the
            losses) or another data set.
    """
    folders = from_main(on_main(lambda: [run.checkpoint(step) for step in reversed(named_steps(run))]))
    problems: list[str] = []
    for number, folder in enumerate(folders):
        problems = _problems(folder, world) or _of_another_run(folder, run, config, parameters)
        if not problems:
            found = Found(folder, read_manifest(LocalStorage(folder)))
            if world.is_main and not found.manifest.is_sealed:
                say(f"{folder.name}: {NOT_SEALED}; the next one will have it")
            must_continue(found.manifest, config, run, data_fingerprint=data_fingerprint)
            on_main(partial(_set_aside, folders[:number]))
            return found
        if world.is_main:
            write_event(run, "damaged_checkpoint", step=step_of(folder.name), rank=0, why=problems[0])
    if fresh:
        on_main(partial(_set_aside, folders))
    elif folders:
        raise UserError(
            f"{run.checkpoints}: none of the {len(folders)} checkpoints is valid ({problems[0]}); "
            "repair one, or start again from step 0 with --fresh"
        )
    if not folders and not fresh:
        began = f"{run.metrics} has steps of this run" if any(True for _ in read_lines(run.metrics)) else ""
        if lineage := read_lineage(run):
            began = f"the run is a branch of {lineage}"
        if began:
            raise UserError(
                f"{run.checkpoints}: no checkpoint there, though {began}; "
                "copy one back, or start again from step 0 with --fresh"
            )
    return None


def restore(found: Found, engine: Engine) -> TrainState:
    """Sets the engine to a checkpoint, bit for bit. Returns the state of training. Collective.

    Raises:
        UserError: the checkpoint is of another network.
    """
    manifest = found.manifest
    if manifest.parameters != engine.parameters or set(engine.shards.quantities) - set(manifest.quantities):
        raise UserError(f"{found.folder}: holds another network or other averages than the config describes")
    engine.restore(FlatReader(found.folder, manifest), manifest.scalars)
    return manifest.state


def _of_another_run(folder: Path, run: RunDir, config: Config, parameters: Sequence[Parameter] | None) -> list[str]:
    """What an intact checkpoint's manifest says that can't be of this run. The same on all ranks."""
    manifest = read_manifest(LocalStorage(folder))
    if differences(manifest.trajectory, trajectory(config)):
        return []  # the config was changed: that is refused, and no damage
    if parameters is not None and tuple(parameters) != manifest.parameters:
        changed = (ours.name for ours, its in zip(parameters, manifest.parameters, strict=False) if ours != its)
        return [f"{folder}: holds another network (from {next(changed, 'its end')} on) than the config describes"]
    if not manifest.is_sealed:
        step, cursor = manifest.state.step, manifest.state.cursor
        logged = [record.get("samples") for record in read_lines(run.metrics) if record.get("step") == step]
        if logged and cursor not in logged:
            return [f"{folder}: its cursor is {cursor}, {run.metrics.name} has {logged[-1]} samples at that step"]
    return []


def _set_aside(folders: list[Path]) -> None:
    """Renames damaged checkpoints, so that they are kept and no longer count as checkpoints."""
    for folder in folders:
        aside = folder.with_name(f"damaged-{folder.name}")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}-again")
        folder.rename(aside)


def _problems(folder: Path, world: World) -> list[str]:
    """What is wrong with a checkpoint, the same on all ranks; each rank reads a share of the files. Collective.

    Raises:
        UserError: this user may not read it: such a checkpoint is not damaged, and must not be passed over.
    """
    storage = LocalStorage(folder)
    found: list[str] = []
    forbidden = _forbidden(folder, folder / CHECKPOINT_MANIFEST)
    if forbidden is None:
        try:
            manifest = read_manifest(storage)
            found += manifest_problems(manifest, origin=storage.url) if world.is_main else []
            share = range(world.rank, len(manifest.parts), world.num_ranks)
            forbidden = _forbidden(*(folder / manifest.parts[rank].file.name for rank in share))
            if forbidden is None:
                found += parts_problems(storage, manifest, share)
        except (UserError, OSError) as error:
            found.append(str(error))
    reports = gather((found, forbidden))
    if named := next((path for _, path in reports if path), None):
        raise UserError(f"{named}: not allowed to read it; ask its owner for chmod -R g+rX, or run as its owner")
    return [problem for problems, _ in reports for problem in problems]


def _forbidden(*paths: Path) -> str | None:
    """The first of files or folders that is there and that this user may not read."""
    for path in paths:
        needed = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
        if path.exists() and not os.access(path, needed):
            return str(path)
    return None
