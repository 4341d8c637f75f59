"""What the end of a Slurm job's batch script reads from Slurm, and what it does: requeue, submit again, or stop."""

import json
import os
import signal
from pathlib import Path

import pytest

from cmscale.errors import NoSpace
from cmscale.io.slurm import without_fulfilled_dependency
from cmscale.runs.folder import RunDir
from cmscale.runs.generations import claim_next
from cmscale.runs.log import read_lines
from launchers.clusters import slurm_epilogue
from launchers.clusters.slurm_again import waits_within
from launchers.clusters.slurm_epilogue import (
    SLACK_SECONDS,
    _job_facts,
    first_failure,
    leaving,
    parse_first_failure,
    superseded,
)
from launchers.jobs import EVALUATE, TRAIN
from launchers.judge import RankEnd, RankFailure
from launchers.submission import Submission

NO_MEMORY = "out of memory; request more with slurm.mem_gb"


class TestFirstFailure:
    def test_it_is_read_from_what_srun_prints(self) -> None:
        log = "srun: error: node2: task 1: Killed\nsrun: error: node1: task 0: Exited with exit code 1\n"
        assert parse_first_failure(log) == RankFailure(1, "node2", "Killed")
        assert parse_first_failure("srun: error: gpu-07: tasks 8-15: Exited with exit code 1") == RankFailure(
            8, "gpu-07", "Exited with exit code 1"
        )
        assert parse_first_failure("nothing to report") is None

    @pytest.mark.parametrize(
        "log",
        [
            "srun: error: node2: task 1: Out Of Memory\n",
            "slurmstepd-node2: error: Exceeded job memory limit\nsrun: error: node2: task 1: Killed\n",
            "srun: error: node2: task 1: Killed\nslurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\n",
        ],
    )
    def test_memory_that_ran_out_is_named(self, log: str) -> None:
        assert parse_first_failure(log) == RankFailure(1, "node2", NO_MEMORY)

    def test_a_node_whose_ranks_srun_could_not_start_is_the_cause_of_what_the_others_say(self) -> None:
        log = (
            "srun: error: Task launch for StepId=7.0 failed on node node2: Socket timed out on send/recv operation\n"
            "srun: error: Application launch failed: Socket timed out on send/recv operation\n"
            "srun: Job step aborted\nsrun: error: node1: task 0: Killed\n"
        )
        assert parse_first_failure(log) == RankFailure(None, "node2", "Socket timed out on send/recv operation")

    def test_of_ranks_that_are_killed_together_the_one_that_used_the_memory_is_named(self, tmp_path: Path) -> None:
        run = RunDir(tmp_path)
        run.logs.mkdir()
        (run.logs / "7_batch.log").write_text(
            "slurmstepd-node1: error: Exceeded job memory limit\n"
            "srun: error: node1: task 0: Killed\nsrun: error: node2: task 1: Killed\n"
        )
        (run.logs / "7_0_log.out").write_text("slurmstepd-node1: error: *** STEP 7.0 ON node1 CANCELLED ***\n")
        exceeded = "slurmstepd-node2: error: StepId=7.0 exceeded memory limit (3 > 2), being killed\n"
        (run.logs / "7_1_log.out").write_text(exceeded)
        ends = [RankEnd(0, "node1", "running"), RankEnd(1, "node2", "running")]
        assert first_failure(run, "7", ends) == RankFailure(1, "node2", NO_MEMORY)
        (run.logs / "7_1_log.out").unlink()
        assert first_failure(run, "7", ends) == RankFailure(0, "node1", NO_MEMORY)

    def test_logs_of_ranks_are_read_for_memory_only_if_it_ran_out(self, tmp_path: Path) -> None:
        run = RunDir(tmp_path)
        run.logs.mkdir()
        (run.logs / "7_1_log.out").write_text("Out Of Memory of an earlier start\n")
        ends = [RankEnd(0, "node1", "running"), RankEnd(1, "node2", "running")]
        assert first_failure(run, "7", ends) is None
        (run.logs / "7_batch.log").write_text("srun: error: node1: task 0: Killed\n")
        assert first_failure(run, "7", ends) == RankFailure(0, "node1", "Killed")

    def test_each_start_reads_its_own_part_of_the_log_of_all(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = RunDir(tmp_path)
        run.logs.mkdir()
        (run.logs / "7_batch.log").write_text("srun: error: a: task 0: Killed\n7.0: requeue: fault: x\nquiet\n")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert first_failure(run, "7", []) is None
        monkeypatch.delenv("SLURM_RESTART_COUNT")
        assert first_failure(run, "7", []) == RankFailure(0, "a", "Killed")


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"JobState": "CANCELLED"}, "cancelled"),
        ({"JobState": "COMPLETING"}, "cancelled"),
        ({"JobState": "TIMEOUT"}, "time_limit"),
        ({"JobState": "RUNNING", "PreemptTime": "2026-01-01T00:00:00"}, "preempted"),
        (
            {"JobState": "RUNNING", "PreemptTime": "None", "RunTime": "1-00:00:01", "TimeLimit": "1-00:00:00"},
            "time_limit",
        ),
        ({"JobState": "RUNNING", "PreemptTime": "None", "RunTime": "23:50:00", "TimeLimit": "1-00:00:00"}, None),
        ({"JobState": "RUNNING", "RunTime": "00:01:00", "TimeLimit": "UNLIMITED"}, None),
        ({}, None),
    ],
)
def test_why_a_job_leaves_is_read_from_scontrol(facts: dict[str, str], expected: str | None) -> None:
    assert leaving(facts, signal_seconds=120) == expected


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        (0, "time_limit"),
        (120, "time_limit"),  # the signal just came
        (120 + SLACK_SECONDS, "time_limit"),  # it may come this much earlier
        (120 + SLACK_SECONDS + 1, None),  # no signal can have come: ranks that end now have failed
    ],
)
def test_ranks_that_end_near_the_time_limit_were_signalled_up_to_a_minute_early(
    left: int, expected: str | None
) -> None:
    """Whatever the clocks of nodes say: the job has run for a time, and may run for one."""
    assert SLACK_SECONDS == 60
    minutes, seconds = divmod(3600 - left, 60)
    times = {"RunTime": f"00:{minutes:02}:{seconds:02}", "TimeLimit": "01:00:00", "EndTime": "2020-01-01T00:00:00"}
    assert leaving({"JobState": "RUNNING", "PreemptTime": "None", **times}, signal_seconds=120) == expected


def test_what_a_user_writes_into_a_job_is_no_fact_about_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{commands.folder}:{os.environ['PATH']}")
    said = "JobId=7 JobName=a JobState=RUNNING Restarts=0 RunTime=00:01:00 Comment=try JobState=TIMEOUT Restarts=9"
    commands.answer("scontrol", f"echo '{said} WorkDir=/a'")
    facts = _job_facts("7")
    assert (facts["JobState"], facts["Restarts"], facts["WorkDir"]) == ("RUNNING", "0", "/a")


def test_an_earlier_start_of_a_job_notices_that_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert not superseded({"Restarts": "0"})
    assert superseded({"Restarts": "1"})
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not superseded({"Restarts": "1"})
    assert not superseded({})  # slurmctld does not answer


class FakeSlurm:
    """Commands of Slurm that record how they were called, one line per call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls_file = folder / "calls"
        folder.mkdir()
        self.answer("scontrol", '[ "$1" = requeue ] || echo JobState=RUNNING Restarts=0')
        self.answer("sbatch", "echo 8")

    def answer(self, name: str, line: str) -> None:
        file = self.folder / name
        file.write_text(f'#!/bin/sh\necho "{name} $*" >>{self.calls_file}\n{line}\n')
        file.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        return [line for line in self.calls_file.read_text().splitlines() if line.startswith(name)]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    return fake


@pytest.fixture
def submission(tmp_path: Path) -> Submission:
    submission = Submission(RunDir(tmp_path / "run"), "one")
    submission.write_job(TRAIN, ("run",), job_id="7")
    submission.script.write_text("#!/bin/sh\n")
    return submission


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between tries, which take no time here."""
    pauses: list[float] = []
    monkeypatch.setattr(slurm_epilogue.time, "sleep", pauses.append)
    return pauses


def epilogue(submission: Submission, start: str = "7.0", *, status: int, max_restarts: int = 9) -> int:
    limits = ["--max-restarts", str(max_restarts), "--backoff-seconds", "3", "--signal-seconds", "1"]
    return slurm_epilogue.main([str(submission.run.root), submission.name, start, "--status", str(status), *limits])


def events(submission: Submission) -> list[str]:
    return [record["event"] for record in read_lines(submission.run.events)]


def ending(submission: Submission) -> dict:
    return json.loads(submission.ending_file.read_text())


def test_a_job_that_finished_leaves_its_ending_and_no_event(commands: FakeSlurm, submission: Submission) -> None:
    submission.write_rank_end("7.0", RankEnd(0, "node1", "finished"))
    assert epilogue(submission, status=0) == 0
    assert ending(submission)["ending"] == "finished"
    assert events(submission) == []
    assert commands.calls("sbatch") == []


def test_a_preempted_job_returns_to_the_queue_and_has_no_ending_yet(
    commands: FakeSlurm, submission: Submission
) -> None:
    submission.write_rank_end("7.0", RankEnd(0, "node1", "preempted"))
    assert epilogue(submission, status=0) == 0
    assert commands.calls("scontrol requeue") == ["scontrol requeue 7"]
    assert events(submission) == ["requeued"]
    assert not submission.ending_file.exists()


SILENT = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
REFUSED = "echo 'Requested operation is presently disabled for job 7' >&2; exit 1"


def test_a_controller_that_does_not_answer_is_asked_again_and_then_ends_the_job(
    commands: FakeSlurm, submission: Submission, waits: list[float]
) -> None:
    commands.answer("scontrol", f'[ "$1" = requeue ] && {{ {SILENT}; }}; echo JobState=RUNNING')
    submission.write_rank_end("7.0", RankEnd(0, "node1", "preempted"))
    assert epilogue(submission, status=0) == 1
    assert len(commands.calls("scontrol requeue")) == 7
    assert events(submission) == ["fault"]  # no event says that it was requeued
    assert ending(submission)["why"] == "Slurm did not requeue the job; continue with --resume"
    assert waits == [2, 4, 8, 16, 32, 60]  # about two minutes
    assert commands.calls("sbatch") == []


@pytest.mark.parametrize("answer", [REFUSED, "echo 'Access/permission denied' >&2; exit 1", "exit 1"])
def test_a_requeue_that_slurm_refuses_is_a_new_submission_at_once(
    answer: str, commands: FakeSlurm, submission: Submission, waits: list[float]
) -> None:
    commands.answer("scontrol", f'[ "$1" = requeue ] && {{ {answer}; }}; echo JobState=RUNNING')
    submission.write_rank_end("7.0", RankEnd(0, "node1", "preempted"))
    assert epilogue(submission, status=0) == 0
    assert commands.calls("sbatch") == [f"sbatch --parsable --begin=now+1 {submission.script}"]
    assert (submission.read_job().job_id, waits) == ("8", [])
    (event,) = read_lines(submission.run.events)
    assert event["event"] == "requeued"
    assert "submitted again as job 8 in 0 s, as Slurm does not requeue it (scontrol requeue 7: " in event["why"]
    assert not submission.ending_file.exists()


def test_without_scontrol_a_job_goes_on_as_a_new_submission(
    commands: FakeSlurm, submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    (commands.folder / "scontrol").unlink()
    (commands.folder / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(commands.folder))
    submission.write_rank_end("7.0", RankEnd(0, "node1", "preempted"))
    assert epilogue(submission, status=0) == 0
    assert submission.read_job().job_id == "8"
    commands.answer("sbatch", "exit 1")
    monkeypatch.setattr(slurm_epilogue, "waits_within", lambda _: ())
    submission.write_rank_end("7.0", RankEnd(0, "node1", "preempted"))
    assert epilogue(submission, status=0) == 1
    assert events(submission) == ["requeued", "fault"]


def test_tries_end_before_slurm_ends_the_script(
    commands: FakeSlurm, submission: Submission, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands.answer("scontrol", f'[ "$1" = requeue ] && {{ {SILENT}; }}; echo JobState=TIMEOUT')
    submission.write_rank_end("7.0", RankEnd(0, "node1", "running"))
    assert epilogue(submission, status=143) == 1
    assert waits == [2, 4, 8]  # within the KillWait after a time limit
    assert events(submission) == ["fault"]
    assert ending(submission)["ending"] == "time_limit"
    monkeypatch.setattr(slurm_epilogue.time, "time", lambda: 1000.0)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1040")
    assert waits_within(slurm_epilogue.seconds_left({})) == (2, 4, 8, 16)
    assert waits_within(None) == (2, 4, 8, 16, 32, 60)


def test_a_request_that_was_carried_out_without_an_answer_is_not_repeated_as_a_new_job(
    commands: FakeSlurm, submission: Submission, waits: list[float], tmp_path: Path
) -> None:
    first = f"touch {tmp_path}/asked; echo 'Socket timed out on send/recv operation' >&2; exit 1"
    again = "echo 'Job is pending execution for job 7' >&2; exit 1"
    commands.answer("scontrol", f'[ "$1" = requeue ] || exit 0; [ -e {tmp_path}/asked ] && {{ {again}; }}; {first}')
    submission.write_rank_end("7.0", RankEnd(0, "node1", "preempted"))
    assert epilogue(submission, status=0) == 0
    assert events(submission) == ["requeued"]
    assert commands.calls("sbatch") == []


def test_the_event_comes_after_the_deed_and_the_signal_that_follows_it_does_not_prevent_it(
    commands: FakeSlurm, submission: Submission
) -> None:
    marks = submission.run.root / "seen"
    commands.answer(
        "scontrol",
        f'[ "$1" = requeue ] || exit 0; [ -e {submission.run.events} ] && touch {marks}; kill -TERM $PPID; sleep 0.1',
    )
    submission.write_rank_end("7.0", RankEnd(0, "node1", "preempted"))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert epilogue(submission, status=0) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert events(submission) == ["requeued"]
    assert not marks.exists()


class TestTwoStarts:
    def claim(self, submission: Submission, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CMSCALE_START", start)
        claim_next(submission.run)

    @pytest.mark.parametrize("state", ["fault", "no_space", "preempted", "superseded"])
    def test_a_start_that_another_job_took_over_from_submits_nothing(
        self, state: str, commands: FakeSlurm, submission: Submission, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.claim(submission, "one/7.0", monkeypatch)
        self.claim(submission, "two/9.0", monkeypatch)
        submission.write_rank_end("7.0", RankEnd(0, "node1", state, " on node1: no space left"))  # pyright: ignore[reportArgumentType]
        assert epilogue(submission, status=int(state in ("fault", "no_space"))) == 1
        assert commands.calls("sbatch") + commands.calls("scontrol requeue") == []
        assert ending(submission)["ending"] == "superseded"
        assert events(submission) == []

    def test_a_start_that_fails_before_it_claims_is_no_older_one(
        self, commands: FakeSlurm, submission: Submission, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.claim(submission, "zero/5.0", monkeypatch)
        submission.write_job(TRAIN, ("run",), job_id="7")  # submitted after that start
        submission.write_rank_end("7.0", RankEnd(0, "node1", "fault", "boom"))
        assert epilogue(submission, status=1) == 1
        assert len(commands.calls("sbatch")) == 1

    def test_a_job_that_was_submitted_anew_does_not_end_its_submission_if_slurm_requeues_it_too(
        self, commands: FakeSlurm, submission: Submission
    ) -> None:
        submission.replace_job_id("8")
        submission.write_rank_end("7.0", RankEnd(0, "node1", "superseded"))
        assert epilogue(submission, status=0) == 1
        assert not submission.ending_file.exists()
        assert commands.calls("sbatch") == []


def test_the_users_own_exclusions_hold_and_wished_nodes_are_not_excluded(
    commands: FakeSlurm, submission: Submission
) -> None:
    submission.script.write_text("#!/bin/sh\n#SBATCH --exclude=node9\n#SBATCH --nodelist=node3\n")
    for number, start in enumerate(("7.0", "7.1")):
        submission.run.checkpoint(number).mkdir(parents=True)
        (submission.run.checkpoint(number) / "manifest.json").write_text("{}")
        submission.write_rank_end(start, RankEnd(1, "node2", "fault", "boom"))
        assert epilogue(submission, start, status=1) == 1
    _, tried, again = commands.calls("sbatch")
    assert tried == f"sbatch --test-only --exclude=node9,node2 {submission.script}"
    assert "--exclude=node9,node2" in again


def test_dependencies_that_were_fulfilled_are_not_submitted_again(commands: FakeSlurm, submission: Submission) -> None:
    lines = "#!/bin/sh\n#SBATCH --account=team\n"
    submission.script.write_text(f"{lines}#SBATCH --dependency=afterok:5\nsrun true\n")
    submission.write_rank_end("7.0", RankEnd(1, "node2", "fault", "boom"))
    assert epilogue(submission, status=1) == 1
    again = submission.script.with_name("job-again.sh")
    assert commands.calls("sbatch") == [f"sbatch --parsable --begin=now+3 {again}"]
    assert again.read_text() == f"{lines}srun true\n"
    assert without_fulfilled_dependency("#SBATCH --dependency=singleton\n") == "#SBATCH --dependency=singleton\n"


def test_a_submission_that_slurm_refuses_is_tried_again_and_then_ends_the_job_if_it_is_not_requeued_either(
    commands: FakeSlurm, submission: Submission, waits: list[float]
) -> None:
    commands.answer("sbatch", "echo 'sbatch: error: no' >&2; exit 1")
    commands.answer("scontrol", f'[ "$1" = requeue ] && {{ {REFUSED}; }}; echo JobState=RUNNING')
    submission.write_rank_end("7.0", RankEnd(1, "node2", "fault", "boom"))
    assert epilogue(submission, status=1) == 1
    assert len(commands.calls("sbatch")) == len(waits) + 1 == 7
    assert submission.read_job().job_id == "7"
    assert events(submission) == ["fault"]
    assert ending(submission)["why"] == "Slurm did not accept the job again after: boom"


@pytest.mark.parametrize(
    "refusal",
    [
        "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time)",
        "QOSMaxSubmitJobPerUserLimit",
        "Access/Permission denied",
    ],
)
def test_a_job_that_may_not_submit_another_is_requeued(
    refusal: str, commands: FakeSlurm, submission: Submission, waits: list[float]
) -> None:
    commands.answer("sbatch", f'echo "sbatch: error: {refusal}" >&2; exit 1')
    submission.write_rank_end("7.0", RankEnd(1, "node2", "fault", "boom"))
    assert epilogue(submission, status=1) == 1
    assert commands.calls("scontrol requeue") == ["scontrol requeue 7"]
    assert (len(commands.calls("sbatch")), waits, submission.read_job().job_id) == (1, [], "7")
    (event,) = read_lines(submission.run.events)
    assert event["event"] == "requeued"
    assert (
        f"requeued, as Slurm does not accept it as a new job (Slurm refuses the job: sbatch: error: {refusal})"
        in (event["why"])
    )
    assert not submission.ending_file.exists()


def test_a_submission_that_slurm_takes_at_the_second_try_is_one(
    commands: FakeSlurm, submission: Submission, waits: list[float], tmp_path: Path
) -> None:
    commands.answer("sbatch", f"[ -e {tmp_path}/tried ] && echo 8 && exit; touch {tmp_path}/tried; exit 1")
    submission.write_rank_end("7.0", RankEnd(1, "node2", "fault", "boom"))
    assert epilogue(submission, status=1) == 1
    assert (submission.read_job().job_id, waits) == ("8", [2])
    assert events(submission) == ["requeued"]


@pytest.mark.parametrize(("listed", "tries", "job_id"), [("8", 1, "8"), ("", 7, "7")])
def test_a_submission_without_an_answer_that_the_queue_shows_is_not_doubled(
    commands: FakeSlurm, submission: Submission, waits: list[float], listed: str, tries: int, job_id: str
) -> None:
    commands.answer("sbatch", "echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1")
    jobs = "; ".join(f"echo {job} RUNNING {submission.script}" for job in ["7", *listed.split()])
    commands.answer("squeue", jobs)
    commands.answer("scontrol", '[ "$1" != requeue ] || exit 1; echo JobState=RUNNING Restarts=0')
    submission.write_rank_end("7.0", RankEnd(1, "node2", "fault", "boom"))
    assert epilogue(submission, status=1) == 1
    assert (len(commands.calls("sbatch")), len(waits), submission.read_job().job_id) == (tries, tries - 1, job_id)
    assert events(submission) == (["requeued"] if listed else ["fault"])


def test_a_queue_that_answers_only_a_while_later_is_asked_before_the_next_try(
    commands: FakeSlurm, submission: Submission, waits: list[float], tmp_path: Path
) -> None:
    commands.answer("sbatch", "echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1")
    asked = tmp_path / "asked"
    commands.answer("squeue", f"[ -e {asked} ] || {{ : >{asked}; exit 1; }}; echo 8 PENDING {submission.script}")
    submission.write_rank_end("7.0", RankEnd(1, "node2", "fault", "boom"))
    assert epilogue(submission, status=1) == 1
    assert (len(commands.calls("sbatch")), len(waits), submission.read_job().job_id) == (1, 1, "8")


def test_a_submission_without_a_printed_id_is_not_tried_again(
    commands: FakeSlurm, submission: Submission, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm accepted the job: each try would be one job more."""
    commands.answer("sbatch", "echo 'job 17 accepted'")
    submission.write_rank_end("7.0", RankEnd(1, "node2", "fault", "boom"))
    assert epilogue(submission, status=1) == 1
    assert len(commands.calls("sbatch")) == 1
    assert "printed no job id" in capsys.readouterr().err
    assert not submission.ending_file.exists()


def test_the_id_that_sbatch_does_not_print_is_found_in_the_queue(commands: FakeSlurm, submission: Submission) -> None:
    commands.answer("sbatch", "echo the site took your job")
    commands.answer("squeue", f"echo 7 RUNNING {submission.script}; echo 8 PENDING {submission.script}")
    submission.write_rank_end("7.0", RankEnd(1, "node2", "fault", "boom"))
    assert epilogue(submission, status=1) == 1
    assert submission.read_job().job_id == "8"


def test_a_job_at_its_time_limit_returns_to_the_queue(
    commands: FakeSlurm, submission: Submission, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.answer("scontrol", '[ "$1" = requeue ] || echo JobState=TIMEOUT Restarts=0')
    submission.write_rank_end("7.0", RankEnd(0, "node1", "running"))
    assert epilogue(submission, status=143) == 0
    assert commands.calls("scontrol requeue") == ["scontrol requeue 7"]
    # The next start finds its own part of the batch log by this line.
    assert capsys.readouterr().out == "7.0: requeue: time limit; no checkpoint yet\n"


@pytest.mark.parametrize(
    ("end", "line"),
    [
        (RankEnd(0, "n", "finished"), "7.0: finished\n"),
        (RankEnd(0, "n", "user_error", "no key x"), "7.0: stop: user error: no key x\n"),
    ],
)
def test_the_batch_log_says_how_a_start_ended_once(
    end: RankEnd, line: str, commands: FakeSlurm, submission: Submission, capsys: pytest.CaptureFixture[str]
) -> None:
    del commands
    submission.write_rank_end("7.0", end)
    epilogue(submission, status=0)
    assert capsys.readouterr().out == line


def test_a_failed_job_is_submitted_again_from_the_same_files(commands: FakeSlurm, submission: Submission) -> None:
    job, script = submission.read_job(), submission.script.read_bytes()
    submission.write_rank_end("7.0", RankEnd(1, "node2", "fault", "boom"))
    assert epilogue(submission, status=1) == 1
    assert commands.calls("sbatch") == [f"sbatch --parsable --begin=now+3 {submission.script}"]
    again = submission.read_job()
    assert (again.worker, again.arguments, again.job_id) == (job.worker, job.arguments, "8")
    assert submission.script.read_bytes() == script
    assert sorted(path.name for path in submission.folder.iterdir()) == [
        "7.0",
        "attempts.jsonl",
        "job.json",
        "job.sh",
    ]
    assert events(submission) == ["requeued"]


@pytest.mark.parametrize(("status", "excluded"), [(0, " --exclude=node2"), (1, "")])
def test_a_node_that_failed_twice_is_excluded_if_slurm_has_others_for_the_job(
    status: int,
    excluded: str,
    commands: FakeSlurm,
    submission: Submission,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands.answer("sbatch", f'[ "$1" != --test-only ] || exit {status}; echo 8')
    for number, start in enumerate(("7.0", "7.1")):
        submission.run.checkpoint(number).mkdir(parents=True)
        (submission.run.checkpoint(number) / "manifest.json").write_text("{}")
        submission.write_rank_end(start, RankEnd(1, "node2", "fault", "boom"))
        assert epilogue(submission, start, status=1) == 1
    assert commands.calls("sbatch") == [
        f"sbatch --parsable --begin=now+3 {submission.script}",
        f"sbatch --test-only --exclude=node2 {submission.script}",
        f"sbatch --parsable --begin=now+3{excluded} {submission.script}",
    ]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("submitted again")]
    assert lines[0] == "submitted again as job 8 in 3 s"
    assert lines[1] == "submitted again as job 8 in 3 s" + (", without node2" if excluded else "")


def test_a_silence_of_slurm_loses_no_exclusion(
    commands: FakeSlurm, submission: Submission, waits: list[float], tmp_path: Path
) -> None:
    refusal = "echo 'sbatch: Unable to contact slurm controller' >&2; exit 1"
    commands.answer("sbatch", f"[ -e {tmp_path}/asked ] || {{ touch {tmp_path}/asked; {refusal}; }}; echo 8")
    full = "data.cache_dir: /scratch on node2: no space left on the device"
    submission.write_rank_end("7.0", RankEnd(0, "node1", "no_space", full))  # which heard it from the rank on node2
    assert epilogue(submission, status=1) == 1
    assert waits == [2]
    assert [call.split()[1] for call in commands.calls("sbatch")] == ["--test-only", "--test-only", "--parsable"]
    assert "--exclude=node2" in commands.calls("sbatch")[-1]


def test_variables_of_this_job_do_not_reach_the_next(
    commands: FakeSlurm, submission: Submission, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_REQUEUE", "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    commands.answer("sbatch", f"env >{tmp_path}/environment; echo 8")
    submission.write_rank_end("7.0", RankEnd(1, "node2", "fault", "boom"))
    assert epilogue(submission, status=1) == 1
    names = {line.partition("=")[0] for line in (tmp_path / "environment").read_text().splitlines()}
    assert {name for name in names if name.startswith(("SLURM_", "SBATCH_"))} == {"SLURM_CONF"}


def test_a_disk_that_is_full_in_the_end_is_one_line_and_no_start_is_hidden(
    commands: FakeSlurm, submission: Submission, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise NoSpace("attempts.jsonl: no space left on the device; free some or write elsewhere")

    submission.write_rank_end("7.0", RankEnd(1, "node2", "fault", "boom"))
    with monkeypatch.context() as patch:
        patch.setattr(Submission, "replace_job_id", full)
        assert epilogue(submission, status=1) == 1
    assert "submitted again as job 8" in capsys.readouterr().out
    assert events(submission) == ["requeued"]
    monkeypatch.setattr(Submission, "record", full)
    assert epilogue(submission, "8.0", status=1) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: attempts.jsonl: no space left on the device")
    assert said.endswith("; then continue with --resume")
    assert len(commands.calls("sbatch")) == 1  # restarts that are not counted would have no end


def test_a_node_on_which_slurm_can_start_no_rank_is_excluded_as_others_that_fail_twice(
    commands: FakeSlurm, submission: Submission
) -> None:
    submission.run.logs.mkdir(exist_ok=True)
    for start in ("7.0", "7.1"):
        submission.write_rank_end(start, RankEnd(0, "node1", "running"))
        log = "srun: error: Task launch for StepId=7.0 failed on node node2: Invalid job credential\n"
        (submission.run.logs / "7_batch.log").write_text(log)
        assert epilogue(submission, start, status=140) == 1
    assert "--exclude=node2" in commands.calls("sbatch")[-1]
    why = {record["why"] for record in read_lines(submission.run.events)}
    assert any("node2: no rank could be started there: Invalid job credential" in line for line in why)


def test_a_run_whose_folder_was_moved_ends_in_one_line_and_gets_no_folder_anew(
    commands: FakeSlurm, submission: Submission, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm_epilogue, "FOLDER_PATIENCE_SECONDS", 0)
    submission.run.root.rename(submission.run.root.with_name("moved"))
    assert epilogue(submission, status=1) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said == (
        f"error: {submission.run.root}: gone from this node (moved, removed or not mounted); find it; "
        "then continue with --resume"
    )
    assert not submission.run.root.exists()
    assert commands.calls("sbatch") == []


def test_a_folder_that_comes_back_meanwhile_is_waited_for(
    commands: FakeSlurm, submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = submission.run.root.with_name("away")
    submission.write_rank_end("7.0", RankEnd(1, "node2", "fault", "boom"))
    submission.run.root.rename(away)
    monkeypatch.setattr(slurm_epilogue.time, "sleep", lambda _: away.rename(submission.run.root))
    assert epilogue(submission, status=1) == 1
    assert events(submission) == ["requeued"]


def test_a_job_that_slurm_starts_elsewhere_while_its_folder_is_waited_for_is_left_alone(
    commands: FakeSlurm, submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = submission.run.root.with_name("away")
    submission.write_rank_end("7.0", RankEnd(1, "node2", "fault", "boom"))
    submission.run.root.rename(away)

    def meanwhile(_: float) -> None:
        away.rename(submission.run.root)
        commands.answer("scontrol", "echo JobState=RUNNING Restarts=1")

    monkeypatch.setattr(slurm_epilogue.time, "sleep", meanwhile)
    assert epilogue(submission, status=1) == 1
    assert events(submission) == []
    assert commands.calls("sbatch") == []


def test_an_earlier_start_on_a_lost_node_writes_nothing(
    commands: FakeSlurm, submission: Submission, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.answer("scontrol", "echo JobState=RUNNING Restarts=1")
    submission.write_rank_end("7.0", RankEnd(0, "node1", "fault", "boom"))
    before = sorted(submission.folder.rglob("*"))
    assert epilogue(submission, status=1) == 1
    assert "Slurm has started this job again on other nodes" in capsys.readouterr().out
    assert sorted(submission.folder.rglob("*")) == before
    assert events(submission) == []
    assert commands.calls("sbatch") == []


@pytest.mark.parametrize(("worker", "event"), [(EVALUATE, "evaluation_fault"), (TRAIN, "fault")])
def test_a_job_that_failed_for_good_leaves_an_event_and_its_ending(
    worker: str, event: str, commands: FakeSlurm, submission: Submission
) -> None:
    submission.write_job(worker, ())
    submission.write_rank_end("7.0", RankEnd(0, "node1", "fault", "boom"))
    assert epilogue(submission, status=1, max_restarts=0) == 1
    (record,) = read_lines(submission.run.events)
    assert record["event"] == event
    assert "boom" in record["why"]
    assert ending(submission)["ending"] == "fault"
    assert commands.calls("sbatch") == []


def test_a_users_mistake_ends_the_job_with_status_2(commands: FakeSlurm, submission: Submission) -> None:
    submission.write_rank_end("7.0", RankEnd(0, "node1", "user_error", "no such file"))
    assert epilogue(submission, status=2) == 2
    assert (ending(submission)["ending"], ending(submission)["why"]) == ("user_error", "no such file")
    assert events(submission) == []
