"""A job runs the code that was submitted, however the checkout changes before or between its starts."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from launch_fixtures import CHECKOUT, placement

from cmscale.io.process import CHECKOUT as RUNNING
from cmscale.runs.folder import RunDir
from cmscale.runs.snapshot import read_code, take_snapshot
from cmscale.runs.starts import read_starts
from launchers.clusters.slurm import script_text
from launchers.evaluate_checkpoints import arguments_for
from launchers.jobs import TRAIN, JobSpec
from launchers.provenance import newest_code, record_start

WORKER = """
from pathlib import Path
VERSION = 1
def main(checkout, seen):
    from cmscale import later
    with open(seen, "a") as file:
        file.write(f"{VERSION} {later.VERSION} {Path(__file__).parents[1]}\\n")
    for name in ("worker", "later"):
        edited = Path(checkout, "cmscale", f"{name}.py")
        edited.write_text(edited.read_text().replace("VERSION = 1", "VERSION = 2"))
    if len(open(seen).readlines()) == 1:
        raise RuntimeError("only the first time")
    return "finished"
"""


@pytest.mark.long
def test_starts_after_an_edit_of_the_checkout_still_run_what_was_submitted(tmp_path: Path) -> None:
    checkout, run, seen = tmp_path / "checkout", RunDir(tmp_path / "run"), tmp_path / "seen"
    for package in ("cmscale", "launchers"):
        shutil.copytree(CHECKOUT / package, checkout / package)
    (checkout / "cmscale" / "worker.py").write_text(WORKER)
    (checkout / "cmscale" / "later.py").write_text("VERSION = 1\n")
    run.logs.mkdir(parents=True)
    code = f"""
        from pathlib import Path
        from launchers import jobs
        from launchers.clusters import CLUSTERS
        from launchers.placement import Placement
        from cmscale.config import Restart, Slurm
        from cmscale.runs.folder import RunDir
        from cmscale.runs.snapshot import read_code, take_snapshot
        run = RunDir(Path({str(run.root)!r}))
        where = Placement("local", 1, 2, False, None, None, Slurm(), Restart(backoff_seconds=0, signal_seconds=5))
        job = jobs.JobSpec("cmscale.worker:main", ({str(checkout)!r}, {str(seen)!r}), run, where,
                           code=take_snapshot(read_code(), run.code))
        edited = Path({str(checkout)!r}, "cmscale", "later.py")
        edited.write_text("VERSION = 2")
        raise SystemExit(CLUSTERS["local"].run(job, wait=True))
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", textwrap.dedent(code)]  # in the checkout, which "-m" would put first on the path
    ran = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    (copy,) = run.code.iterdir()
    lines = seen.read_text().splitlines()
    assert len(lines) >= 3  # two ranks, one of them twice at least
    assert set(lines) == {f"1 1 {copy}"}
    starts = read_starts(run)
    assert [start["worker"] for start in starts] == ["cmscale.worker:main"] * 2
    assert {start["code"] for start in starts} == {f"code/{copy.name}"}


def test_a_rank_that_would_run_other_code_than_was_submitted_refuses(tmp_path: Path) -> None:
    from launchers.submission import Submission

    submission = Submission(RunDir(tmp_path / "run"), "one")
    submission.write_job("json:dumps", (), code=tmp_path / "elsewhere")
    places = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "1", "MASTER_PORT": "1"}
    command = [sys.executable, "-m", "launchers.job", "local", str(submission.run.root), "one", "first"]
    environment = {**os.environ, **places, "PYTHONPATH": str(CHECKOUT)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert f"imports cmscale from {CHECKOUT}, but {tmp_path / 'elsewhere'} was submitted" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_on_slurm_ranks_epilogue_and_evaluations_find_the_copy_before_the_folder_they_start_in(tmp_path: Path) -> None:
    run, where = RunDir(tmp_path), placement()
    script = script_text(JobSpec(TRAIN, (), run, where, arguments_for(run, where, 10), code=run.code / "abc"))
    (path,) = (line for line in script.splitlines() if "PYTHONPATH=" in line)
    (tmp_path / "cmscale").mkdir()
    (tmp_path / "cmscale" / "__init__.py").write_text("raise RuntimeError('the folder where the job starts')")
    (run.code / "abc" / "cmscale").mkdir(parents=True)
    (run.code / "abc" / "cmscale" / "__init__.py").write_text("print(__file__)")
    shown = subprocess.run(["bash", "-c", f"{path}; python3 -m cmscale"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.stdout.strip() == str(run.code / "abc" / "cmscale" / "__init__.py")
    for line in script.splitlines():
        if "launchers." in line:
            assert " -P " in line


def test_each_start_records_its_own_revision_and_diff(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    code = read_code(RUNNING)
    edited = type(code)(code.checkout, {**code.files, "cmscale/x.py": b""}, "abc-dirty", "+x\n", ("cmscale/x.py",))
    assert newest_code(run) is None
    for each in (code, edited):
        record_start(run, each, take_snapshot(each, run.code), worker="train")
    first, last = json.loads(run.provenance.read_text())["starts"]
    assert (first["git"], last["git"]) == (code.revision, "abc-dirty")
    assert (run.root / last["diff"]).read_text() == "+x\n"
    assert last["untracked"] == ["cmscale/x.py"]
    assert newest_code(run) == last["code"] == f"code/{edited.name}"
    run.provenance.write_text("{")  # damaged: kept, and no reason not to start
    record_start(run, code, run.code / code.name)
    assert len(read_starts(run)) == 1
    assert (run.root / "provenance.damaged.json").read_text() == "{"
