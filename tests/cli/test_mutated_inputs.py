"""The property that no file is trusted: whatever a user's file holds, a command works, or says in a line why not.

Every kind of file that a command reads is damaged at random (`mutations`). The seed is printed; it is new for each run,
except under ops/test.sh without --all, which gives always the same one.
More than half of the time the manifests beside it are made to agree (`settled`), as no hash protects from ill will.
CMSCALE_MUTATION_SEED repeats a run, CMSCALE_MUTATIONS sets the number of damaged files.
"""

import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from evaluation_fixtures import build_cheap_features
from mutations import mutated, replaced
from readable_inputs import Input, build_inputs
from settled import settle

from cmscale.cli import main as cli
from cmscale.commands import ending
from cmscale.config import Data, read_config
from cmscale.data import open_batches
from cmscale.distributed.world import World
from cmscale.engine.checkpoint_reader import FlatReader
from cmscale.engine.resume import newest
from cmscale.runs.folder import RunDir
from cmscale.training.assemble import flat_space
from data_prep import prepare, reference, verify
from launchers import evaluate, submit
from launchers.command_line import guarded

COUNT = int(os.environ.get("CMSCALE_MUTATIONS", "200"))
SECONDS = 300  # that one command may take on a busy machine
GROWTH = 2 << 30  # bytes of memory
LINES = 5  # of one mistake each: an empty config lacks so many sections


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Input]:
    """Every kind of file that a user can give, with `OUT` for what a command writes."""
    return build_inputs(tmp_path_factory.mktemp("inputs"))


def _call(command: Sequence[object], out: Path) -> tuple[int, str, str]:
    """Runs a command in this process. Returns its status, and what it printed."""
    program, *given = [str(part).replace("OUT", str(out)) if "OUT" in str(part) else str(part) for part in command]
    stdout, stderr = io.StringIO(), io.StringIO()
    mains: dict[str, Callable[[list[str]], int]] = {
        "prepare": prepare.main,
        "verify": verify.main,
        "reference": reference.main,
        "submit": lambda arguments: _launch(submit, arguments),
        "evaluate": lambda arguments: _launch(evaluate, arguments),
        "resume": _resume,
        "continue": _continue,
        "load": _load,
        "cmscale": _cmscale,
    }
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            status = mains[program](given)
        except SystemExit as ended:
            status = int(ended.code or 0)
    return status, stdout.getvalue(), stderr.getvalue()


def _cmscale(arguments: list[str]) -> int:
    sys.argv = ["cmscale", *arguments]
    cli.main()
    return 0


def _launch(launcher: ModuleType, arguments: list[str]) -> int:
    sys.argv = [f"{launcher.__name__}.py", *arguments]
    return guarded(launcher.main)


def _resume(arguments: list[str]) -> int:
    """What a rank does first: it looks for the newest checkpoint, in a copy of the run, as it renames bad ones."""
    run, out = RunDir(Path(arguments[1]) / "run"), Path(arguments[1])
    shutil.copytree(arguments[0], run.root, symlinks=True)

    def look(_: list[str]) -> None:
        config = read_config(run.config, resolved=True)
        found = newest(run, config, World(), data_fingerprint="data", parameters=flat_space(config))
        if found is not None:
            read = FlatReader(found.folder, found.manifest)
            for quantity in found.manifest.quantities:
                read(quantity, 0, found.manifest.num_elements)

    assert out.is_dir()
    return ending.guarded(look, [])


def _continue(arguments: list[str]) -> int:
    """Continues an interrupted preparation, in a copy."""
    folder, out, *rest = arguments
    shutil.copytree(folder, Path(out) / "data", symlinks=True)
    return prepare.main([*rest, "--out", str(Path(out) / "data")])


def _load(arguments: list[str]) -> int:
    """Reads a data set as training does."""

    def read(_: list[str]) -> None:
        data = Data(path=arguments[0], workers=0, num_canonical_nodes=1, shuffle_block=4)
        with contextlib.closing(open_batches(data, World(), seed=0, global_batch_size=4, image_size=8)) as batches:
            for _ in range(4):
                next(batches)

    return ending.guarded(read, [], faults=(RuntimeError,))


def _problem(command: Sequence[object], out: Path) -> str | None:
    """What a command does that it must not; None for nothing."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(SECONDS)
    try:
        status, printed, complaint = _call(command, out)
    except BaseException:
        return traceback.format_exc(limit=-6)
    finally:
        signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    allowed = (0, 1, 2) if {"verify", "load"} & set(command[:2]) else (0, 2)
    if status not in allowed or "Traceback" in complaint:
        return f"status {status}: {complaint[-2000:]}"
    if status == 2 and len((printed + complaint).splitlines()) > LINES:
        return f"{len((printed + complaint).splitlines())} lines: {(printed + complaint)[:2000]}"
    if status == 2 and not complaint.strip():
        return "status 2 without a word"
    return f"{grown >> 20} MiB of memory" if grown > GROWTH else None


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """Makes a command that reads without end fail, and not the machine."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * GROWTH, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _timed_out(*_: object) -> None:
    raise TimeoutError(f"a command took more than {SECONDS} s")


@pytest.mark.long
def test_damaged_files_give_a_result_or_one_line(
    inputs: list[Input], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = int(os.environ.get("CMSCALE_MUTATION_SEED") or random.SystemRandom().randrange(2**32))
    print(f"CMSCALE_MUTATION_SEED={seed}")
    monkeypatch.setattr("cmscale.evaluation.session.build_features", build_cheap_features)
    monkeypatch.setattr("cmscale.evaluation.features.extractor.build_features", build_cheap_features)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)
    signal.signal(signal.SIGALRM, _timed_out)
    wanted = os.environ.get("CMSCALE_MUTATION_INPUT")
    inputs = [each for each in inputs if wanted in (None, each.name)]
    failures: dict[str, str] = {}
    for number in range(COUNT):
        chance = random.Random(f"{seed} {number}")
        chosen = inputs[number % len(inputs)]
        path, command = chance.choice(list(chosen.files)), chance.choice(list(chosen.commands))
        content = path.read_bytes()
        others: dict[Path, bytes] = {}
        if replaced(path, chance) is None:
            path.write_bytes(mutated(path.name, content, chance))
            others = settle(path) if chance.random() < 0.6 else {}
        with _limited_memory():
            problem = _problem(command, tmp_path / "out")
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        for each, before in {path: content, **others}.items():
            each.write_bytes(before)
        if problem is not None:
            failures.setdefault(
                problem.splitlines()[-1][:300], f"{number}: {chosen.name} {path.name}: {command}\n{problem}"
            )
    report = "\n\n".join(failures.values())
    assert not failures, f"CMSCALE_MUTATION_SEED={seed}: {len(failures)} kinds of failure\n{report}"


@pytest.mark.long
def test_the_files_are_good_before_they_are_damaged(inputs: list[Input], tmp_path: Path, monkeypatch) -> None:
    """Otherwise the property would hold for a refusal of everything."""
    monkeypatch.setattr("cmscale.evaluation.session.build_features", build_cheap_features)
    monkeypatch.setattr("cmscale.evaluation.features.extractor.build_features", build_cheap_features)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)
    for each in inputs:
        for command in each.commands:
            (tmp_path / "out").mkdir(exist_ok=True)
            status, printed, complaint = _call(command, tmp_path / "out")
            assert status == 0, f"{command}: {status}\n{printed}{complaint}"
            shutil.rmtree(tmp_path / "out")
