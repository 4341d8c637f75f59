"""What `cmscale runs` and `cmscale compare` say of runs: state and how it is known, progress, scores, differences."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import run
from run_folder import working_run, write_run

from cmscale.report.facts import read_facts
from cmscale.runs import standing
from cmscale.runs.folder import RunDir
from cmscale.runs.log import append_line, write_event
from cmscale.runs.overview import overview
from launchers.heartbeat import beating


def sign(found: RunDir, process: int, *, host: str | None = None, age: float = 0.0) -> None:
    """The sign of life of a launcher."""
    found.logs.mkdir(exist_ok=True)
    content = {"host": host or socket.gethostname(), "process": process, "machine": "m"}
    found.launcher_sign.write_text(json.dumps(content))
    os.utime(found.launcher_sign, (time.time() - age,) * 2)


def test_rate_and_time_left_are_those_of_the_last_records(tmp_path: Path) -> None:
    found = working_run(tmp_path / "one")
    sign(found, os.getpid())
    seen = overview(found)
    assert (seen.state, seen.known_by) == ("running", f"launcher {os.getpid()} on {socket.gethostname()}")
    assert (seen.step, seen.total_steps, seen.steps_per_second, seen.eta_seconds) == (100, 1000, 2.0, 450.0)
    assert seen.loss == 0.01
    assert seen.age_seconds is not None
    assert seen.age_seconds < 600


@pytest.mark.parametrize(("event", "at"), [("resumed", 20), ("rolled_back", 100)])
def test_a_run_that_goes_back_is_where_it_goes_on(event: str, at: int, tmp_path: Path) -> None:
    """In the page and in `cmscale runs`: also before it writes its next line of metrics."""
    found = working_run(tmp_path / "one")
    write_event(found, "checkpoint", step=20, rank=0)
    assert overview(found).step == read_facts(found).step == 100
    write_event(found, event, step=at, rank=0)
    long_ago = time.time() - 60
    os.utime(found.metrics, (long_ago, long_ago))
    assert overview(found).step == read_facts(found).step == 20
    write_event(found, "checkpoint", step=25, rank=0)
    assert overview(found).step == read_facts(found).step == 25
    append_line(found.metrics, {"step": 30, "loss": 1.0})
    assert overview(found).step == read_facts(found).step == 30


def test_a_state_is_known_by_the_launcher_where_there_is_one(tmp_path: Path) -> None:
    found = working_run(tmp_path / "one")
    assert overview(found).state == "running"  # written just now
    assert "written" in overview(found).known_by
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    sign(found, ended.pid)
    assert overview(found).state == "stale"
    assert f"launcher {ended.pid} on {socket.gethostname()} has ended" in overview(found).known_by
    sign(found, 1, host="elsewhere", age=5)
    assert re.search("launcher 1 on elsewhere, alive [0-9]+ s ago", overview(found).known_by)
    sign(found, 1, host="elsewhere", age=7200)
    assert overview(found, now=time.time() + 7200).state == "stale"
    assert "launcher 1 on elsewhere has been silent for 2 h" in overview(found, now=time.time() + 7200).known_by


@pytest.mark.parametrize(("ahead", "state"), [(300, "running"), (86_400, "stale")])
def test_files_of_a_clock_that_was_a_day_ahead_keep_no_dead_run_alive(ahead: int, state: str, tmp_path: Path) -> None:
    found = working_run(tmp_path / "one")
    for path in (found.metrics, found.events, found.checkpoints):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, (time.time() + ahead,) * 2)
    assert overview(found).state == state
    sign(found, 1, host="elsewhere", age=-ahead)
    seen = overview(found)
    assert seen.state == state
    assert ("alive 0 s ago" if state == "running" else "sign of life at a time that is 23 h") in seen.known_by


def test_another_process_of_a_dead_launchers_number_is_no_sign_of_life(tmp_path: Path) -> None:
    found = working_run(tmp_path / "one")
    found.logs.mkdir()
    with beating(found):
        assert overview(found).known_by.startswith("launcher ")
        written = json.loads(found.launcher_sign.read_text())
    for change, words in (({"started": "1"}, "has ended"), ({"space": "before the machine started again"}, "silent")):
        found.launcher_sign.write_text(json.dumps(written | change))
        for path in (found.launcher_sign, found.metrics, found.events):
            os.utime(path, (time.time() - 7200,) * 2)
        seen = overview(found)
        assert seen.state == "stale"
        assert words in seen.known_by


def test_the_copy_of_a_run_that_lives_does_not(tmp_path: Path, monkeypatch) -> None:
    first = working_run(tmp_path / "first")
    job = first.logs / "submissions" / "20261129-010000-a" / "job.json"
    job.parent.mkdir(parents=True)
    job.write_text(json.dumps({"worker": "train", "arguments": [str(first.root), False], "job_id": "12"}))
    monkeypatch.setattr(standing, "job_states", lambda job_id, clusters: {"RUNNING": "None"})
    with beating(first):
        shutil.copytree(first.root, tmp_path / "copy")
    copy = RunDir(tmp_path / "copy")
    assert overview(first).known_by == "Slurm job 12 is RUNNING"
    assert "no launcher or job of it is seen" in overview(copy).known_by
    first.root.rename(tmp_path / "gone")
    assert overview(copy).known_by == "Slurm job 12 is RUNNING"  # it was moved, as far as can be told


def test_a_copy_that_torchrun_continues_is_alive(tmp_path: Path, monkeypatch) -> None:
    """It has a launcher of its own, and the original's submissions alone."""
    first = working_run(tmp_path / "first")
    job = first.logs / "submissions" / "20261129-010000-a" / "job.json"
    job.parent.mkdir(parents=True)
    job.write_text(json.dumps({"worker": "train", "arguments": [str(first.root), False], "job_id": "12"}))
    monkeypatch.setattr(standing, "job_states", lambda job_id, clusters: {})
    copy = RunDir(tmp_path / "copy")
    shutil.copytree(first.root, copy.root)
    with beating(copy):
        seen = overview(copy, now=time.time() + 7200)
    assert (seen.state, seen.known_by) == ("running", f"launcher {os.getpid()} on {socket.gethostname()}")


@pytest.mark.parametrize(
    ("states", "state", "words"),
    [
        ({"RUNNING": "None"}, "running", "Slurm job 12 is RUNNING"),
        ({"PENDING": "Resources"}, "queued", "Slurm job 12 is PENDING: Resources"),
        (
            {"PENDING": "JobHeldAdmin"},
            "held",
            "Slurm job 12 is PENDING: JobHeldAdmin; scontrol release 12 lets it go on",
        ),
        ({"SPECIAL_EXIT": "job requeued in held state"}, "held", "; scontrol release 12 lets it go on"),
        ({"COMPLETING": "None"}, "completing", "Slurm job 12 is COMPLETING"),
        ({}, "stale", "Slurm has no job 12 any more"),
        (None, "running", "Slurm does not answer about job 12"),  # it wrote just now
    ],
)
def test_a_state_is_known_by_slurm(states, state: str, words: str, tmp_path: Path, monkeypatch) -> None:
    found = working_run(tmp_path / "one")
    job = found.logs / "submissions" / "a" / "job.json"
    job.parent.mkdir(parents=True)
    job.write_text(json.dumps({"worker": "train", "job_id": "12"}))
    monkeypatch.setattr(standing, "job_states", lambda job_id, clusters: states)
    seen = overview(found)
    assert seen.state == state
    assert words in seen.known_by


def test_the_job_that_is_alive_counts_whatever_the_clock_said_when_it_was_submitted(
    tmp_path: Path, monkeypatch
) -> None:
    found = working_run(tmp_path / "one")
    for name, job_id in (("20261129-020000-b", "12"), ("20261129-010000-a", "13")):
        job = found.logs / "submissions" / name / "job.json"
        job.parent.mkdir(parents=True)
        job.write_text(json.dumps({"worker": "train", "job_id": job_id}))
    monkeypatch.setattr(standing, "job_states", lambda job_id, clusters: {"RUNNING": "None"} if job_id == "13" else {})
    assert overview(found).known_by == "Slurm job 13 is RUNNING"


@pytest.mark.parametrize(
    ("worker", "states", "launcher", "state", "words"),
    [
        (
            "train",
            {"RUNNING": "None"},
            "ended",
            "running",
            "Slurm job 12 is RUNNING",
        ),  # the terminal of `--wait` was closed
        (
            "train",
            {"PENDING": "Resources"},
            "alive",
            "queued",
            "Slurm job 12 is PENDING: Resources",
        ),  # `--wait` waits for the queue
        ("train", {}, "alive", "running", "launcher"),
        ("train", None, "ended", "running", "Slurm does not answer about job 12"),
        ("train", {}, "ended", "stale", "Slurm has no job 12 any more"),
        ("sample", {"RUNNING": "None"}, "ended", "stale", "launcher"),
        ("evaluate", {"RUNNING": "None"}, "ended", "stale", "launcher"),
    ],
)
def test_a_training_job_counts_beside_the_launcher_that_waits_for_it(
    worker: str, states, launcher: str, state: str, words: str, tmp_path: Path, monkeypatch
) -> None:
    found = working_run(tmp_path / "one")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    sign(found, os.getpid() if launcher == "alive" else ended.pid)
    job = found.logs / "submissions" / "a" / "job.json"
    job.parent.mkdir(parents=True)
    job.write_text(json.dumps({"worker": worker, "job_id": "12"}))
    monkeypatch.setattr(standing, "job_states", lambda job_id, clusters: states)
    seen = overview(found)
    assert seen.state == state
    assert words in seen.known_by


@pytest.mark.parametrize("answers", [True, False])
def test_slurm_is_asked_once_about_all_runs(answers: bool, tmp_path: Path, monkeypatch, capsys) -> None:
    """A controller that thousands of questions reach slows the queue of everybody; a silent one, each question."""
    for number in range(30):
        found = working_run(tmp_path / "runs" / f"run{number}")
        job = found.logs / "submissions" / "a" / "job.json"
        job.parent.mkdir(parents=True)
        job.write_text(json.dumps({"worker": "train", "job_id": str(100 + number)}))
    commands = tmp_path / "bin"
    commands.mkdir()
    lines = "echo '103 PENDING'; echo '104 RUNNING'" if answers else "exit 1"
    (commands / "squeue").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\n{lines}\n')
    (commands / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    assert run(monkeypatch, "runs", tmp_path / "runs", "--json") == 0
    seen = {each["run"]: each["state"] for each in json.loads(capsys.readouterr().out)}
    expected = {"run3": "queued", "run4": "running", "run5": "stale"} if answers else {"run3": "running"}
    assert expected.items() <= seen.items()
    assert len((tmp_path / "asked").read_text().splitlines()) == 1


@pytest.mark.parametrize(("event", "state"), [("finished", "finished"), ("preempted", "preempted"), ("fault", "fault")])
def test_what_has_ended_is_known_by_its_events(event: str, state: str, tmp_path: Path) -> None:
    found = working_run(tmp_path / "one")
    write_event(found, event, step=100, rank=0)
    seen = overview(found)
    assert seen.state == state
    assert seen.known_by.startswith("events.jsonl")
    assert seen.eta_seconds is None


@pytest.mark.parametrize(("ending", "state"), [("cancelled", "cancelled"), ("time_limit", "preempted")])
def test_a_run_that_was_cancelled_is_no_preempted_one(ending: str, state: str, tmp_path: Path) -> None:
    found = working_run(tmp_path / "one")
    write_event(found, "preempted", step=100, rank=0, why="SIGTERM")
    for name, worker in (("20261129-010000-a", "train"), ("20261129-020000-b", "evaluate")):
        folder = found.logs / "submissions" / name
        folder.mkdir(parents=True)
        (folder / "job.json").write_text(json.dumps({"worker": worker, "job_id": "12"}))
        (folder / "ending.json").write_text(json.dumps({"ending": ending, "why": f"{ending}; continue with --resume"}))
    seen = overview(found)
    assert seen.state == state
    assert (seen.known_by == "cancelled; continue with --resume") is (ending == "cancelled")
    found.events.unlink()  # it was ended before its first checkpoint
    assert (overview(found).state == "cancelled") is (ending == "cancelled")
    os.utime(found.logs / "submissions" / "20261129-010000-a" / "ending.json", (1e9, 1e9))  # long before
    write_event(found, "resumed", step=100, rank=0)  # by torchrun, which submits nothing
    write_event(found, "preempted", step=110, rank=0, why="SIGTERM")
    assert overview(found).state == "preempted"


DAMAGES = {
    "metrics.jsonl": '{"step": "ten", "loss": null}\n[1]\n\x00\x00\n{"step": 1e999}\n',
    "events.jsonl": '{"event": 5, "time": "noon", "step": []}\n',
    "config.yaml": "method: [\n",
    "evaluations/step-000000001-x.json": "{",
}


def test_damage_in_one_run_never_hides_the_others(tmp_path: Path, monkeypatch, capsys) -> None:
    write_run(tmp_path / "good")
    for number, (name, content) in enumerate(DAMAGES.items()):
        damaged = write_run(tmp_path / f"bad-{number}")
        (damaged.root / name).write_text(content)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("")
    odd = write_run(tmp_path / "odd")
    odd.config.write_text("method: ct\ntrain: {total_steps: many, global_batch_size: -1}\n")
    assert run(monkeypatch, "runs", tmp_path) == 0
    table = capsys.readouterr().out
    names = sorted(path.name for path in tmp_path.iterdir())
    assert all(name in table for name in names)
    assert "unreadable" in table
    assert run(monkeypatch, "runs", tmp_path, "--json") == 0
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert sorted(found) == names
    assert all(each["run"] == name for name, each in found.items())  # its former key is `name`
    assert not found["good"]["problems"]
    assert found["good"]["best"]["name"] == "FD-EfficientNet"
    assert all(found[f"bad-{number}"]["problems"] for number in (2, 3))
    assert found["bad-0"]["step"] == 200  # of its events


def test_what_may_not_be_looked_into_is_listed_and_said(tmp_path: Path, monkeypatch, capsys) -> None:
    working_run(tmp_path / "good")
    (tmp_path / "closed").mkdir()
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "config.yaml").symlink_to("config.yaml")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "theirs").symlink_to("elsewhere")
    look = Path.stat

    def refuse_theirs(path: Path, **how: Any) -> os.stat_result:
        if path.name == "theirs":
            raise PermissionError(13, "Permission denied")
        return look(path, **how)

    monkeypatch.setattr(Path, "stat", refuse_theirs)
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name not in {"closed", "theirs"})  # a superuser may
    assert run(monkeypatch, "runs", tmp_path, "--json") == 0
    listed = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert set(listed) == {"good", "closed", "lost", "theirs"}
    assert listed["closed"]["state"] == listed["theirs"]["state"] == "unreadable"
    assert "its owner can allow you to read it" in listed["closed"]["problems"][0]
    assert "can't be read" in listed["lost"]["problems"][0]
    assert listed["good"]["step"] == 100

    def refuse(_: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert run(monkeypatch, "runs", tmp_path) == 2
    assert "can't be read (Permission denied); name another folder of runs" in capsys.readouterr().err


def test_files_that_may_not_be_read_hide_nothing_else(tmp_path: Path, monkeypatch, capsys) -> None:
    one, closed = write_run(tmp_path / "one"), write_run(tmp_path / "closed")
    opened, forbidden = Path.open, {closed.metrics, closed.events, closed.config, closed.provenance}

    def refuse(path: Path, *how: Any, **more: Any) -> Any:
        if path in forbidden:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *how, **more)

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != closed.evaluations)  # a superuser may
    assert run(monkeypatch, "runs", tmp_path, "--json") == 0
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert found["one"]["best"]
    assert not found["closed"]["best"]
    assert "evaluations: not allowed to look into it" in found["closed"]["problems"]
    assert run(monkeypatch, "compare", one.root, closed.root) == 0
    said = capsys.readouterr()
    assert re.search(r"Loss +one ", said.out)
    for part in ("metrics.jsonl: Permission denied", "events.jsonl: ", "evaluations: not allowed to look into it"):
        assert f"note: not compared: closed: {part}" in said.err
    assert run(monkeypatch, "report", closed.root, "--beside", one.root) == 0
    page = closed.report.read_text()
    assert "metrics.jsonl: Permission denied" in page
    assert "evaluations: not allowed to look into it" in page
    assert "<svg" in page  # the other run's curves


def test_many_runs_and_long_metrics_say_how_far_they_are(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("cmscale.io.counting.FIRST_SECONDS", 0.0)
    monkeypatch.setattr("cmscale.io.counting.EVERY_SECONDS", 0.0)
    monkeypatch.setattr("cmscale.io.traffic._BYTES", 1)
    one, two = (working_run(tmp_path / "runs" / name, steps=4000) for name in ("one", "two"))
    assert run(monkeypatch, "runs", tmp_path / "runs", "--json") == 0
    said = capsys.readouterr()
    assert len(json.loads(said.out)) == 2
    lines = said.err.splitlines()
    assert [line.partition(",")[0] for line in lines[:2]] == [
        f"reading {tmp_path / 'runs'}: {count} of 2 runs" for count in (1, 2)
    ]
    for command in (("report", one.root), ("compare", one.root, two.root)):
        monkeypatch.setattr("cmscale.runs.log._READ_AT_ONCE", 10_000)
        assert run(monkeypatch, *command) == 0
        size = one.metrics.stat().st_size
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"reading {one.metrics}: ")]
        assert len(lines) == 1 + -(-size // 10_000)
        assert f" {size} of {size} MB in " in lines[-1]


def test_watching_prints_again(tmp_path: Path, monkeypatch, capsys) -> None:
    write_run(tmp_path / "good")
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    assert run(monkeypatch, "runs", tmp_path, "--watch", 3) == 130
    assert slept == [3, 3]
    assert capsys.readouterr().out.count(" good ") == 2
    assert run(monkeypatch, "runs", tmp_path, "--watch", "inf") == 2
    assert "--watch" in capsys.readouterr().err


def test_a_narrow_terminal_has_whole_words(tmp_path: Path, monkeypatch, capsys) -> None:
    write_run(tmp_path / "good")
    monkeypatch.setattr("cmscale.cli.command._WIDTH_OF_FILES", 80)
    assert run(monkeypatch, "runs", tmp_path) == 0
    said = capsys.readouterr().out
    assert "…" not in said
    assert re.search(r"good +ct +finished .* 200", said)
    assert re.search(r"good: events.jsonl; FD-EfficientNet", said)


@pytest.mark.parametrize("width", [20, 80])
def test_where_a_row_has_no_room_a_run_has_lines(width: int, tmp_path: Path, monkeypatch, capsys) -> None:
    names = [f"lsun_bedroom_cd_lpips_of_the_second_teacher_{number}" for number in (1, 2)]
    for name in names:
        write_run(tmp_path / name)
    monkeypatch.setattr("cmscale.cli.command._WIDTH_OF_FILES", width)
    assert run(monkeypatch, "runs", tmp_path) == 0
    said = "".join(capsys.readouterr().out.split())
    assert "…" not in said
    for name in names:
        assert re.search(rf"{name}:ct,finished,\d+d(\d+h)?old,step200of200,loss0.015;events.jsonl;FD-Effic", said)
    assert run(monkeypatch, "compare", *(tmp_path / name for name in names)) == 0
    said = "".join(capsys.readouterr().out.split())
    assert all(f"{name}:10.5(step200,ema_0.999,2NFE)" in said for name in names)


@pytest.mark.parametrize("width", [100, 200])
def test_a_run_with_a_long_name_has_lines_and_the_others_keep_their_rows(
    width: int, tmp_path: Path, monkeypatch, capsys
) -> None:
    long = "lsun_bedroom_cd_lpips_" * 9
    for name in ("good", long):
        write_run(tmp_path / name)
    monkeypatch.setattr("cmscale.cli.command._WIDTH_OF_FILES", width)
    assert run(monkeypatch, "runs", tmp_path) == 0
    said = capsys.readouterr().out
    assert re.search(r"^ *good +ct +finished .* 200 .* 0.015 *$", said, re.MULTILINE)
    assert f"{long}:ct,finished," in "".join(said.split())
    assert "good: events.jsonl; FD-EfficientNet" in said


def test_names_of_runs_command_no_terminal(tmp_path: Path, monkeypatch, capsys) -> None:
    write_run(tmp_path / "a\x1b[31m\nb")
    write_run(tmp_path / "c")
    assert run(monkeypatch, "runs", tmp_path) == 0
    said = capsys.readouterr().out
    assert r"a\x1b[31m\nb" in said
    assert run(monkeypatch, "compare", tmp_path / "a\x1b[31m\nb", tmp_path / "c") == 0
    assert "\x1b" not in said + capsys.readouterr().out
