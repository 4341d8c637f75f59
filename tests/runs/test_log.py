"""A run's logs: whole lines from many writers, replayed steps counted once, a wandb mirror that cannot fail a run."""

import json
import os
import subprocess
import sys
import threading
import time
from functools import partialmethod
from pathlib import Path

import pytest
from fsyncs import record_fsyncs

from cmscale.config import Wandb
from cmscale.engine import watch
from cmscale.errors import UserError
from cmscale.runs.folder import RunDir
from cmscale.runs.log import append_line, latest_metrics, measured_until, read_lines, write_event
from cmscale.training.metrics_log import MetricsLog
from cmscale.training.wandb_mirror import WandbMirror
from launchers.judge import Attempt, RankEnd
from launchers.submission import Submission


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    found = RunDir(tmp_path / "run")
    found.root.mkdir()
    return found


def test_lines_of_many_writers_never_mix(run: RunDir) -> None:
    def write(number: int) -> None:
        for index in range(50):
            append_line(run.events, {"writer": number, "index": index, "padding": "x" * 500})

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    records = list(read_lines(run.events))
    assert len(records) == 200
    assert [r["index"] for r in records if r["writer"] == 2] == list(range(50))


def test_a_line_cut_by_a_crash_is_passed_over(run: RunDir) -> None:
    write_event(run, "start", step=0, rank=0)
    with run.events.open("a") as file:
        file.write('{"event": "chec')
    assert [record["event"] for record in read_lines(run.events)] == ["start"]
    write_event(run, "resumed", step=0, rank=0)
    assert [record["event"] for record in read_lines(run.events)] == ["start", "resumed"]


def test_the_metrics_age_is_known_but_in_a_copy_with_times_of_its_own(run: RunDir) -> None:
    assert measured_until(run) is None
    write_event(run, "start", step=0, rank=0)
    assert measured_until(run) is None
    append_line(run.metrics, {"step": 1})
    os.utime(run.metrics, (1.79e9 + 0.5, 1.79e9 + 0.5))
    assert measured_until(run) == 1.79e9 + 0.5
    copied = time.time() + 3600
    for path in (run.metrics, run.events):
        os.utime(path, (copied, copied))
    assert measured_until(run) is None


@pytest.mark.parametrize("writer", ["run", "watchdog", "launcher"])
def test_no_writer_of_events_adds_to_a_line_cut_by_a_crash(run: RunDir, writer: str, tmp_path: Path) -> None:
    run.events.write_text('{"event": "start"}\n{"event": "chec')
    match writer:
        case "run":
            write_event(run, "fault", step=5, rank=1, why="why")
        case "watchdog":  # as it runs: isolated, without site-packages
            code = f"import runpy; runpy.run_path({watch.__file__!r})['load_append']()"
            code += f"({str(run.events)!r}, {{'event': 'fault', 'step': 5}}, durable=True)"
            subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
        case "launcher":
            Submission(run, "one").report("fault", Attempt("fault", "why", 5), why="why")
    assert [(record["event"], record.get("step")) for record in read_lines(run.events)] == [
        ("start", None),
        ("fault", 5),
    ]


def test_an_event_is_on_the_disk_when_it_is_written(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = record_fsyncs(monkeypatch)
    write_event(run, "start", step=0, rank=0)
    assert synced == [run.events, run.root]  # the file's name, too
    write_event(run, "finished", step=9, rank=0)
    assert synced == [run.events, run.root, run.events]


def test_a_disk_that_takes_half_a_line_is_an_error_in_one_line(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[: len(data) // 2]))
    with pytest.raises(UserError, match="no space left"):
        write_event(run, "start", step=0, rank=0)
    monkeypatch.undo()
    write_event(run, "resumed", step=0, rank=0)
    assert [record["event"] for record in read_lines(run.events)] == ["resumed"]


def test_a_replayed_step_counts_once_with_its_last_value(run: RunDir) -> None:
    for step, loss in [(1, 0.5), (2, 0.4), (3, 0.3), (2, 0.4), (3, 0.31)]:
        append_line(run.metrics, {"step": step, "loss": loss})
    assert latest_metrics(run) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}, {"step": 3, "loss": 0.31}]


def test_the_mirror_keeps_one_id_over_resumptions_and_takes_replayed_steps(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")  # a busy machine starts wandb's service in its own time
    monkeypatch.setattr(WandbMirror, "close", partialmethod(WandbMirror.close, patience=300))
    ids = []
    for steps in ([1, 2, 3], [2, 3, 4]):
        log = MetricsLog(run, Wandb(mode="offline"), config={"a": 1}, active=True)
        for step in steps:
            log.write({"step": step, "loss": 1.0 / step})
        log.close()
        ids.append(run.wandb_id.read_text())
    assert ids[0] == ids[1]
    assert len(list((run.root / "wandb").glob(f"offline-run-*-{ids[0]}"))) >= 1
    assert [record["event"] for record in read_lines(run.events)] == []
    assert len(list(read_lines(run.metrics))) == 6


def test_a_mirror_that_fails_leaves_the_metrics_and_an_event(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def broken(**_: object) -> None:
        raise ConnectionError("wandb is away")

    monkeypatch.setattr(wandb, "init", broken)
    log = MetricsLog(run, Wandb(mode="online"), config={}, active=True)
    log.write({"step": 1, "loss": 1.0})
    log.close()
    assert json.loads(run.metrics.read_text()) == {"step": 1, "loss": 1.0}
    assert [record["why"] for record in read_lines(run.events)] == ["ConnectionError: wandb is away"]


def test_other_ranks_are_silent(run: RunDir) -> None:
    log = MetricsLog(run, Wandb(mode="offline"), config={}, active=False)
    log.write({"step": 1})
    log.close()
    assert not list(run.root.iterdir())


def test_a_run_that_was_moved_away_is_not_made_anew_by_what_is_written_of_it(run: RunDir) -> None:
    submission = Submission(run, "one")
    submission.write_job("train", (), job_id="7")
    run.root.rename(run.root.with_name("moved"))
    for write in (
        lambda: write_event(run, "rolled_back", step=3, rank=0),
        lambda: append_line(run.metrics, {"step": 3}),
        lambda: submission.write_rank_end("7.0", RankEnd(0, "node1", "running")),
        lambda: submission.record(Attempt("fault", "", 3)),
        lambda: submission.end(Attempt("fault", "", 3), why=""),
    ):
        with pytest.raises(UserError, match=r"gone from .* it is not made anew"):
            write()
    assert not run.root.exists()


def test_a_run_above_which_nobody_may_look_is_a_line(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after somebody changed the permissions of the folder of runs."""

    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_dir", refuse)
    submission = Submission(run, "one")
    for write in (
        lambda: write_event(run, "rolled_back", step=3, rank=0),
        lambda: submission.end(Attempt("fault", "", 3), why=""),
    ):
        with pytest.raises(UserError, match="not allowed to write there"):
            write()
