"""The files of a submission: the job that ranks read, its history, and files that older versions wrote."""

import errno
import json
import tempfile
from pathlib import Path

import pytest

from cmscale.errors import UserError
from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines, write_event
from launchers.decide import decide
from launchers.jobs import EVALUATE, SAMPLE, TRAIN, WORKERS, load_worker
from launchers.judge import Attempt, RankEnd, RankFailure
from launchers.submission import JobRecord, Submission, newest_step, submissions_of


@pytest.fixture
def submission(tmp_path: Path) -> Submission:
    return Submission(RunDir(tmp_path), "one")


def test_a_job_is_a_name_and_json_values(submission: Submission) -> None:
    arguments = ("a", 1, True, None, [1.5], {"key": "value"})
    submission.write_job(TRAIN, arguments)
    assert submission.read_job() == JobRecord(TRAIN, arguments, None)
    submission.replace_job_id("17")
    submission.replace_job_id("18")
    assert submission.read_job() == JobRecord(TRAIN, arguments, "18")
    assert json.loads(submission.job_file.read_text()).keys() == {"worker", "arguments", "job_id"}
    submission.write_job(TRAIN, arguments, code="/run/code/abc")
    submission.replace_job_id("19")
    assert submission.read_job() == JobRecord(TRAIN, arguments, "19", code="/run/code/abc")


@pytest.mark.parametrize(
    ("stored", "worker"),
    [
        ({"worker": "cmscale.train:main", "job_id": "17"}, TRAIN),
        ({"worker": "cmscale.training.loop:main", "job_id": "17"}, TRAIN),
        ({"job_id": "17", "worker": "cmscale.evaluate:main"}, EVALUATE),
        ({"job_id": "17", "worker": "cmscale.evaluation.evaluate:main"}, EVALUATE),
    ],
)
def test_jobs_that_older_versions_wrote_are_readable(stored: dict, worker: str, submission: Submission) -> None:
    submission.folder.mkdir(parents=True)
    submission.job_file.write_text(json.dumps(stored))
    assert submission.read_job() == JobRecord(worker, (), "17")
    assert (submission.beside == "evaluation") == (worker == EVALUATE)
    assert submissions_of(submission.run) == [submission]


@pytest.mark.parametrize("text", [None, "", '{"worker": "tra', "{}", '{"worker": 3}'])
def test_a_missing_or_damaged_job_is_named(text: str | None, submission: Submission) -> None:
    if text is not None:
        submission.folder.mkdir(parents=True)
        submission.job_file.write_text(text)
    with pytest.raises(UserError, match=r"submissions/one/job\.json: missing or damaged"):
        submission.read_job()
    assert submission.beside is None


def test_every_worker_of_the_table_exists() -> None:
    assert set(WORKERS) == {TRAIN, EVALUATE, SAMPLE}
    assert all(callable(load_worker(worker)) for worker in WORKERS)
    assert load_worker("json:dumps") is json.dumps


def test_reports_of_ranks_are_read_in_the_order_in_which_they_were_written(submission: Submission) -> None:
    ends = [RankEnd(1, "b", "fault", "boom"), RankEnd(0, "a", "running")]
    for end in (RankEnd(1, "b", "running"), *ends):
        submission.write_rank_end("7.0", end)
    assert submission.rank_ends("7.0") == ends
    assert submission.rank_ends("7.1") == []


def test_the_history_survives_a_line_cut_by_a_crash(submission: Submission) -> None:
    first, second = Attempt("preempted", "", 3), Attempt("fault", "boom", 4, 1, "node1")
    submission.write_job("train", ())
    assert submission.record(first) == [first]
    with (submission.folder / "attempts.jsonl").open("a") as file:
        file.write('{"ending": "fa')
    assert submission.record(second) == [first, second]
    with (submission.folder / "attempts.jsonl").open("ab") as file:
        file.write(bytes(512) + b"\n3\n{}\n\xff\xfe\n")  # what a file system may leave after a power cut
    assert submission.record(second) == [first, second, second]


def test_a_rank_report_that_a_crash_damaged_counts_as_none(submission: Submission) -> None:
    submission.write_rank_end("7.0", RankEnd(0, "a", "running"))
    (submission.folder / "7.0" / "rank-0001.json").write_text('{"rank"')
    assert submission.rank_ends("7.0") == [RankEnd(0, "a", "running")]


def test_an_evaluation_continues_as_long_as_it_measures_though_no_step_is_trained(submission: Submission) -> None:
    submission.write_job(EVALUATE, ())

    def action(history: list[Attempt]) -> str:
        limits = {"max_restarts": 0, "backoff_seconds": 0, "can_requeue": True}
        return decide(history, **limits, go_on=submission.how_to_go_on).action  # pyright: ignore[reportArgumentType]

    for number in range(4):
        blocks = submission.run.evaluation_progress / "a set"
        blocks.mkdir(parents=True, exist_ok=True)
        (blocks / f"block-{number}.safetensors").touch()
        assert action(submission.record(Attempt("time_limit", "", 9))) == "requeue"
    assert action(submission.record(Attempt("time_limit", "", 9))) == "requeue"
    assert action(submission.record(Attempt("time_limit", "", 9))) == "stop"
    cancelled = submission.record(Attempt("cancelled", "newest", 9))[-1]
    assert cancelled.message == cancelled.measured == "0 sets and 4 blocks of samples"
    assert submission.record(Attempt("fault", "boom", 9))[-1].message == "boom"


@pytest.mark.parametrize(("worker", "event"), [(TRAIN, "fault"), (EVALUATE, "evaluation_fault")])
def test_events_of_an_evaluation_have_names_of_their_own(worker: str, event: str, submission: Submission) -> None:
    submission.write_job(worker, ())
    submission.report("fault", Attempt("fault", "boom", -1, 3), why="boom")
    (record,) = read_lines(submission.run.events)
    assert {name: record[name] for name in ("event", "step", "rank", "why")} == {
        "event": event,
        "step": 0,
        "rank": 3,
        "why": "boom",
    }


def test_the_newest_step_is_that_of_a_committed_checkpoint(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert newest_step(run) == -1
    for step in (5, 10):
        run.checkpoint(step).mkdir(parents=True)
    (run.checkpoint(5) / "manifest.json").write_text("{}")
    assert newest_step(run) == 5


def test_of_a_rank_that_its_watch_has_killed_the_watchs_reason_counts(submission: Submission) -> None:
    submission.write_job(TRAIN, ("run",))
    killed = RankFailure(1, "node1", "killed by SIGKILL (by hand, or the machine ran out of memory: see dmesg)")
    late = "no step within 1800 s; stacks in logs/stacks-rank-1.txt"

    def after(event: str, rank: int, why: str, *, start: str = "attempt-0") -> str:
        write_event(submission.run, event, step=4, rank=rank, why=why, start=f"{submission.name}/{start}")
        found = submission.explained("attempt-0", killed)
        assert found is not None
        return found.how

    assert after("fault", 0, late) == killed.how
    assert after("fault", 1, late, start="attempt-1") == killed.how  # in which rank 1 was killed before any event
    assert after("fault", 1, late) == late
    write_event(submission.run, "fault", step=4, rank=1, why="the launcher's own event of another start")
    assert after("recovered", 1, "a step after all") == killed.how
    assert submission.explained("attempt-0", None) is None


@pytest.mark.parametrize(
    ("waiting", "late", "blamed"),
    [
        ((0, 1), (2,), 2),
        ((0, 1), (), 2),  # its machine hangs, with its watch
        ((0,), (1, 2), 1),
        ((0, 1, 2), (), 1),
        ((), (0, 1, 2), 1),
    ],
)
def test_the_rank_that_all_others_wait_for_hangs_whichever_was_killed_first(
    submission: Submission, waiting: tuple[int, ...], late: tuple[int, ...], blamed: int
) -> None:
    submission.write_job(TRAIN, ("run",))
    for rank in range(3):
        submission.write_rank_end("7.0", RankEnd(rank, f"node{rank}", "running"))
    for rank in (*waiting, *late):
        said = {"start": f"{submission.name}/7.0", "waits_for_others": rank in waiting}
        write_event(submission.run, "fault", step=4, rank=rank, why=f"no step by {rank}", **said)
    found = submission.explained("7.0", RankFailure(1, "node1", "Killed"))
    assert found is not None
    assert (found.rank, found.node) == (blamed, f"node{blamed}")
    assert found.how == (
        f"no step by {blamed}" if blamed in (*waiting, *late) else "hangs: all other ranks wait for it"
    )


def test_a_job_whose_ranks_could_write_no_logs_is_refused(submission: Submission, monkeypatch) -> None:
    submission.folder.mkdir(parents=True)  # of an earlier start; a file system may have become read-only since

    def only_there(*_: object, dir: Path, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", only_there)
    with pytest.raises(UserError, match=rf"^{submission.run.logs}/JOB_0_log.out: not allowed to write there"):
        submission.write_job(TRAIN, ("run",))
    assert not submission.job_file.exists()
