"""Continues a run from its exports, in another folder of runs: `submit.py --resume s3://.../NAME --runs-dir DIR`.

The folder here becomes the run's home (`cmscale.runs.homes`); the one before may export nothing more, and a start that
is alive there ends. It can come back the same way.
"""

import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cmscale.config import Config, dump_config, parse_tree, read_config
from cmscale.errors import UserError
from cmscale.io.durable import replace_durably, sync_folder
from cmscale.io.place import Place
from cmscale.io.protocol import Storage
from cmscale.io.storage import open_storage
from cmscale.runs.checkpoint_copy import NotIntact, copy_checkpoint, copy_snapshots, intact_manifest
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.copies import exported_run
from cmscale.runs.folder import CHECKPOINT_MANIFEST, EXPORTED_HOMES, RunDir, step_name
from cmscale.runs.history import fetch_history
from cmscale.runs.homes import Home, claim, homes, token_of
from cmscale.runs.log import write_event
from cmscale.runs.snapshot import Code, take_snapshot
from launchers.provenance import record_start
from launchers.run_folders import new_run, staged_run
from launchers.submission import newest_step

_DAMAGED_MANIFEST = "damaged-manifest.json"


@dataclass(frozen=True)
class Exports:
    """The exports of a run, and the folder in which it is to go on.

    Attributes:
        steps: Those of the complete checkpoints, newest first.
        text: The run's config, as YAML.
    """

    storage: Storage
    run: RunDir
    steps: tuple[int, ...]
    text: str

    @property
    def place(self) -> str:
        """`checkpoint.export_to`: the folder or prefix that holds the run's exports."""
        return self.storage.url.rstrip("/").rpartition("/")[0]


def find_exports(text: str, *, runs_dir: Place) -> Exports | None:
    """The exports that `--resume` names; None if it names a run by its folder or name.

    Raises:
        UserError: there is no complete checkpoint, or nothing at all.
    """
    place = Place(text.rstrip("/"))
    storage = open_storage(place.absolute())
    if not place.is_remote and next(iter(_known_homes(storage)), None) is None:
        return None
    steps = tuple(reversed(committed_steps(storage)))
    if not steps:
        raise UserError(f"--resume {text}: no complete checkpoint of a run there; give checkpoint.export_to/NAME")
    run = new_run(name=place.rpartition("/")[2], runs_dir=runs_dir, stem="")
    raw = storage.read_if_present("config.yaml")
    return Exports(storage, run, steps, _config_of(storage, steps) if raw is None else raw.decode(errors="replace"))


def _known_homes(storage: Storage) -> list[Home]:
    folder = storage.local_path("")
    return [] if folder is not None and not (folder / EXPORTED_HOMES).is_dir() else homes(storage)


def _config_of(storage: Storage, steps: tuple[int, ...]) -> str:
    """The config in the newest intact checkpoint: exports of earlier releases hold no other."""
    problems = []
    for step in steps:
        try:
            folder = storage.sub(f"checkpoints/{step_name(step)}")
            return dump_config(parse_tree(intact_manifest(folder).config, origin=folder.url))
        except NotIntact as error:
            problems.append(str(error))
    raise UserError(f"--resume {storage.url}: none of the {len(steps)} checkpoints is intact ({problems[0]})")


def is_home(exports: Exports) -> bool:
    """Whether the run's folder here is its home already, so that it goes on from its own checkpoints.

    Raises:
        UserError: the folder here is of another run, or has trained on after the run went elsewhere.
    """
    run = exports.run
    if not run.root.exists():
        return False
    known, token = homes(exports.storage), token_of(run, make=False)
    if not known:
        export_to = read_config(run.config, resolved=True).checkpoint.export_to if run.config.is_file() else None
        if export_to is not None and exported_run(run, export_to).url == exports.storage.url:
            return True
    mine = [index for index, home in enumerate(known) if token and home.token == token]
    if not mine:
        raise UserError(
            f"--resume {exports.storage.url}: {run.root} is there and is not this run; give another --runs-dir"
        )
    if mine[-1] == len(known) - 1:
        return True
    left, here = known[mine[-1] + 1], newest_step(run)
    if here > left.step:
        raise UserError(
            f"--resume {exports.storage.url}: {run.root} has a checkpoint of step {here}, but the run went on from "
            f"step {left.step} in {left}; give another --runs-dir, or move the later checkpoints away"
        )
    return False


def make_continuation(exports: Exports, config: Config, code: Code) -> None:
    """Makes the run's folder here with its newest intact checkpoint and its history, or nothing, and claims the run.

    Raises:
        UserError: no checkpoint is intact, or the folder can't be written.
    """
    run = exports.run
    with staged_run(run) as staged:
        fetch_history(exports.storage, staged)
        step = _take_over(exports, staged)
        replace_durably(staged.config, dump_config(config).encode())
        _record(exports, staged, code, step)


def bring_back(exports: Exports, config: Config, code: Code) -> None:
    """Brings a run that was continued elsewhere back to its folder here. Its launcher is this one.

    Raises:
        UserError: no checkpoint is intact, or the folder can't be written.
    """
    run = exports.run
    step = _take_over(exports, run)
    with suppress(FileNotFoundError):  # a checkpoint may come before the first line
        exports.storage.download(run.metrics.name, run.metrics)
    replace_durably(run.config, dump_config(config).encode())
    _record(exports, run, code, step)


def _record(exports: Exports, run: RunDir, code: Code, step: int) -> None:
    record_start(
        run, code, take_snapshot(code, run.code), continued_from={"exports": exports.storage.url, "step": step}
    )
    write_event(run, "continued", step=step, rank=0, why=f"continued from {exports.storage.url}")


def _take_over(exports: Exports, run: RunDir) -> int:
    """Fetches the newest intact checkpoint and claims the run; one that came meanwhile is fetched, too.

    So are the snapshots of averages up to it, without which `cmscale ema` could compute no averages.
    """
    steps = _newest_first(exports.storage)
    step, damaged = _fetch_first(exports.storage, run, steps)
    if step is None:
        first = next(iter(damaged.values()), "there is none")
        raise UserError(f"--resume {exports.storage.url}: no checkpoint there is intact ({first})")
    claim(exports.storage, RunDir(exports.run.root), step=step, token=token_of(run))
    came = [each for each in _newest_first(exports.storage) if each > step and each not in steps]
    later, more = _fetch_first(exports.storage, run, came)
    for each in damaged | more:
        _retire(exports.storage, each)
    step = step if later is None else later
    for each, why in copy_snapshots(exports.storage, run, until=step).items():
        print(f"note: the snapshot of step {each} is not taken: {why}", file=sys.stderr)
    return step


def _fetch_first(storage: Storage, run: RunDir, steps: list[int]) -> tuple[int | None, dict[int, str]]:
    """Copies the first intact checkpoint into a run's folder. Returns its step, and what is wrong with those before."""
    problems: dict[int, str] = {}
    for step in steps:
        final, staged = run.checkpoint(step), run.checkpoints / f".{step_name(step)}.start-0.save-0"
        shutil.rmtree(staged, ignore_errors=True)
        print(f"fetching the checkpoint of step {step} from {storage.url}", flush=True)
        try:
            copy_checkpoint(storage.sub(f"checkpoints/{step_name(step)}"), staged)
        except NotIntact as error:
            problems[step] = str(error)
            print(f"note: step {step} is not taken: {error}", file=sys.stderr)
            shutil.rmtree(staged, ignore_errors=True)
            continue
        if final.exists():
            shutil.rmtree(final)
        Path(staged).rename(final)
        sync_folder(run.checkpoints)
        return step, problems
    return None, problems


def _newest_first(storage: Storage) -> list[int]:
    """The steps of the copies, the one first with which the run should go on: the newest of the newest home.

    A copy of a later step that a former home made, as the run was already going on elsewhere, comes after it.
    """
    steps, known = committed_steps(storage), homes(storage)
    late = [step for step in steps if step > known[-1].step] if len(known) > 1 else []
    made_by = {step: _home_of(storage, step) for step in late}
    return sorted(steps, key=lambda step: (made_by.get(step, 0), step), reverse=True)


def _home_of(storage: Storage, step: int) -> int:
    with suppress(NotIntact):
        return intact_manifest(storage.sub(f"checkpoints/{step_name(step)}")).home
    return 0


def _retire(storage: Storage, step: int) -> None:
    """Takes the manifest away from an exported checkpoint that is damaged, so that the run can export it again."""
    folder = storage.sub(f"checkpoints/{step_name(step)}")
    raw = folder.read_if_present(CHECKPOINT_MANIFEST)
    try:
        if raw is not None:
            folder.write(_DAMAGED_MANIFEST, raw)
        folder.delete(CHECKPOINT_MANIFEST)
    except UserError as error:
        print(f"note: the damaged export of step {step} stays: {error}", file=sys.stderr)
