"""How Slurm's commands are called, and what their answers mean."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cmscale.commands.ending import guarded
from cmscale.errors import UserError
from cmscale.io.job_environment import outside_of_jobs, outside_of_this_job
from cmscale.io.slurm import (
    MaybeTaken,
    NoAnswer,
    NoJobIdError,
    QueueFull,
    Refused,
    common_parameters,
    exports,
    is_silence,
    options_in,
    python_path,
    refusal,
    submit,
)
from cmscale.io.slurm_jobs import (
    ACTIVE_STATES,
    cancel_command,
    clusters_of,
    job_of_script,
    job_states,
    reason_to_wait,
    states_of_jobs,
    why_it_waits,
)


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def install(folder: Path, name: str, lines: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{lines}\n")
    file.chmod(0o755)


@pytest.mark.parametrize("printed", ["17", "17;cluster1", "note of the site\n17", "17;cluster1\nnote 3"])
def test_a_submission_gives_the_job_id(printed: str, bin_folder: Path) -> None:
    install(bin_folder, "sbatch", f"[ \"$*\" = '--parsable --begin=now+3 job.sh' ] && echo '{printed}'")
    assert submit(Path("job.sh"), "--begin=now+3") == "17"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("echo noise >&2; echo 'sbatch: error: no partition' >&2; exit 1", "job: sbatch: error: no partition$"),
        ("echo one >&2; echo two >&2; exit 1", "job: one; two$"),
        ("exit 1", "sbatch gave no reason"),
    ],
)
def test_a_job_that_slurm_refuses_is_one_line(lines: str, reason: str, bin_folder: Path) -> None:
    install(bin_folder, "sbatch", lines)
    with pytest.raises(UserError, match=f"Slurm refuses the {reason}" if reason.startswith("job") else reason):
        submit(Path("job.sh"))


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("Unable to contact slurm controller", 1),
        ("QOSMaxSubmitJobPerUserLimit", 1),
        ("AssocMaxSubmitJobLimit", 1),
        ("AssocGrpSubmitJobsLimit", 1),
        ("QOSMaxNodePerUserLimit", 2),
        ("Invalid account", 2),
    ],
)
def test_a_slurm_that_does_not_answer_or_whose_queue_is_full_is_a_fault_and_a_refusal_a_mistake(
    said: str, status: int, bin_folder: Path
) -> None:
    """`launchers.evaluate_checkpoints` asks again after the one, and not after the other."""
    install(bin_folder, "sbatch", f"echo 'sbatch: error: Batch job submission failed: {said}' >&2; exit 1")
    assert guarded(lambda _: submit(Path("job.sh")) and None, []) == status


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("Unable to contact slurm controller (connect failure)", NoAnswer),
        ("Slurm temporarily unable to accept job", NoAnswer),
        ("Socket timed out on send/recv operation", MaybeTaken),
        ("Zero Bytes were transmitted or received", MaybeTaken),
        ("Unable to create job record, try again", NoAnswer),
        ("Slurm temporarily unable to accept job\nsbatch: error: AssocMaxSubmitJobLimit", QueueFull),
        ("Slurm temporarily unable to accept job, sleeping and retrying\nsbatch: error: Socket timed out", MaybeTaken),
    ],
)
def test_a_job_that_was_sent_may_have_been_taken(said: str, error: type[Refused], bin_folder: Path) -> None:
    install(bin_folder, "sbatch", f"echo 'sbatch: error: Batch job submission failed: {said}' >&2; exit 1")
    with pytest.raises(Refused) as raised:
        submit(Path("job.sh"))
    assert type(raised.value) is error


def test_a_job_is_found_by_its_script_if_it_waits_or_runs(bin_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "logs" / "one two" / "job.sh"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/bash\n#SBATCH --job-name=a\n#SBATCH --clusters=c1\n")
    listed = (
        "CLUSTER: c1",
        "7 RUNNING /elsewhere/three/job.sh",
        "8 CANCELLED /elsewhere/one two/job.sh",
        "9 PENDING /elsewhere/one two/job.sh",
    )
    printed = "; ".join(f"echo '{line}'" for line in listed)
    options = "--noheader --states=all --format=%F %T %o --name a --clusters=c1"
    install(bin_folder, "squeue", f"[ \"$*\" = '{options}' ] && {{ {printed}; }}")
    assert job_of_script(script) == "9"
    install(bin_folder, "squeue", f"echo '{listed[2]}'")
    assert job_of_script(script) == ""
    install(bin_folder, "squeue", "exit 1")
    assert job_of_script(script) is None


def test_a_job_that_slurm_accepts_without_an_id_is_another_error(bin_folder: Path) -> None:
    install(bin_folder, "sbatch", "echo 'job 17 accepted'")
    with pytest.raises(NoJobIdError, match="printed no job id: job 17 accepted"):
        submit(Path("job.sh"))


def test_without_sbatch_a_submission_is_refused(bin_folder: Path) -> None:
    with pytest.raises(UserError, match="no sbatch on the PATH"):
        submit(Path("job.sh"))


def test_sbatch_gets_the_environment_that_is_given(bin_folder: Path) -> None:
    install(bin_folder, "sbatch", 'echo "$NUMBER"')
    assert submit(Path("job.sh"), environment={"NUMBER": "4", "PATH": str(bin_folder)}) == "4"


@pytest.mark.parametrize(
    ("lines", "states"),
    [
        ("echo 7 RUNNING None", {"RUNNING": "None"}),
        (
            "printf '7 COMPLETED None\\n7 PENDING job requeued in held state\\n7 COMPLETED None\\n'",
            {"COMPLETED": "None", "PENDING": "job requeued in held state"},
        ),
        ("", {}),
        ("printf 'CLUSTER: C1\\n7 RUNNING None\\n\\nCLUSTER: C2\\n'", {"RUNNING": "None"}),
        ("printf 'CLUSTER: C1\\n'", {}),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", {}),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", None),
    ],
)
def test_states_of_a_job_or_of_an_arrays_tasks(lines: str, states: dict[str, str] | None, bin_folder: Path) -> None:
    install(bin_folder, "squeue", lines)
    assert job_states("7") == states


def test_a_job_of_another_cluster_is_asked_about_and_ended_there(bin_folder: Path) -> None:
    install(bin_folder, "squeue", '[ "$5 $6" = "7 --clusters=c1" ] && echo 7 RUNNING None')
    assert job_states("7", "c1") == {"RUNNING": "None"}
    (bin_folder / "job.sh").write_text("#!/bin/sh\n#SBATCH --clusters=c1\n")
    assert clusters_of(bin_folder / "job.sh") == "c1"
    assert clusters_of(bin_folder / "none.sh") is None
    assert cancel_command("7", "c1") == ["scancel", "--clusters=c1", "7"]
    assert cancel_command("7") == ["scancel", "7"]


def test_without_squeue_there_is_no_answer(bin_folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        job_states("7")


def test_a_job_waits_if_it_is_pending_or_held_in_any_of_its_tasks_and_none_runs() -> None:
    assert reason_to_wait({"PENDING": "Priority"}) == "Priority"
    assert reason_to_wait({"SPECIAL_EXIT": "job requeued in held state"}) == "job requeued in held state"
    assert reason_to_wait({"PENDING": "JobHeldUser", "RUNNING": "None"}) is None
    assert reason_to_wait({"COMPLETING": "None", "COMPLETED": "None"}) is None


@pytest.mark.parametrize("first", ["JobHeldUser", "Priority"])
def test_one_held_task_of_an_array_is_enough(first: str, bin_folder: Path) -> None:
    second = {"JobHeldUser": "Priority", "Priority": "JobHeldUser"}[first]
    install(bin_folder, "squeue", f"echo 7 PENDING {first}; echo 7 PENDING {second}")
    assert job_states("7") == {"PENDING": "JobHeldUser"}


def test_a_refusal_that_sounds_like_silence_is_none() -> None:
    assert is_silence("sbatch: error: Batch job submission failed: Unable to contact slurm controller")
    assert is_silence("sbatch: error: Socket timed out on send/recv operation")
    assert not is_silence("sbatch: error: invalid partition specified: standby")


def test_of_a_job_that_is_held_it_is_said_how_it_goes_on() -> None:
    assert why_it_waits("7", "Priority") == "Priority"
    assert why_it_waits("7", "") == "Slurm gives no reason"
    assert why_it_waits("7", "JobHeldUser") == "JobHeldUser; scontrol release 7 lets it go on"
    assert why_it_waits("7", "JobHeldAdmin", "c1").endswith("; scontrol --cluster=c1 release 7 lets it go on")


def test_jobs_that_are_over_are_not_active() -> None:
    over = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}
    assert not over & ACTIVE_STATES
    assert {"PENDING", "RUNNING", "COMPLETING"} <= ACTIVE_STATES


def test_the_reason_of_a_refusal_is_in_sbatchs_own_lines() -> None:
    assert refusal("Traceback\nsbatch: error: a\nsbatch: error: b\n") == "sbatch: error: a; sbatch: error: b"


def test_a_jobs_own_variables_do_not_reach_another_job() -> None:
    given = {"SLURM_JOB_ID": "1", "SLURM_CONF": "2", "SBATCH_REQUEUE": "3", "HOME": "4", "SLURM_JWT": "5"}
    assert outside_of_jobs(given) == {"SLURM_CONF": "2", "HOME": "4", "SLURM_JWT": "5"}


def test_the_submitting_shell_does_not_reach_the_job(bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_a_job = ("SLURM_CPU_BIND", "SLURM_MEM_PER_CPU", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID", "SLURMD_NODENAME")
    of_ranks = ("RANK", "MASTER_ADDR", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "SUBMITIT_LOCAL_NTASKS", "CMSCALE_START")
    of_ranks += ("TORCHELASTIC_USE_AGENT_STORE", "GROUP_RANK")
    left_out = (*of_a_job, *of_ranks, "SBATCH_EXPORT", "SBATCH_PARTITION", "SRUN_CPUS_PER_TASK", "CUDA_VISIBLE_DEVICES")
    for name in left_out:
        monkeypatch.setenv(name, "1")
    for name in ("SLURM_CONF", "SLURM_CONF_SERVER", "MY_SLURM_JOB_ID"):
        monkeypatch.setenv(name, "kept")
    install(bin_folder, "sbatch", f"/usr/bin/env >{bin_folder}/seen; echo 17")
    assert submit(Path("job.sh")) == "17"
    seen = dict(line.split("=", 1) for line in (bin_folder / "seen").read_text().splitlines() if "=" in line)
    assert not seen.keys() & set(left_out)
    assert {name for name, value in seen.items() if value == "kept"} == {
        "SLURM_CONF",
        "SLURM_CONF_SERVER",
        "MY_SLURM_JOB_ID",
    }
    with outside_of_this_job():
        assert not os.environ.keys() & set(left_out)
    assert os.environ["SLURM_CPU_BIND"] == os.environ["RANK"] == "1"
    outside = outside_of_jobs({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_CONF": "x"})
    assert outside["CUDA_VISIBLE_DEVICES"] == "0,1"  # the user's own choice


def test_a_job_is_asked_about_whatever_the_users_squeue_shows(
    bin_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    install(bin_folder, "squeue", '[ -z "$SQUEUE_PARTITION" ] && echo 7 RUNNING None')
    assert job_states("7") == {"RUNNING": "None"}


def test_the_options_of_a_script_are_read_as_sbatch_reads_them() -> None:
    script = (
        "#!/bin/bash\n#SBATCH --comment='it'\"'\"'s mine'\n#SBATCH --exclusive\n#SBATCH --exclude=a,b\necho #SBATCH\n"
    )
    assert options_in(script) == {"comment": "it's mine", "exclusive": "", "exclude": "a,b"}


def test_set_up_lines_come_first_and_cannot_end_the_script() -> None:
    where = {"job_name": "a", "nodes": 1, "tasks_per_node": 1, "cpus_per_task": None, "minutes": 5, "partition": None}
    shared = common_parameters(**where, mem_gb=None, setup=["set -eu", "false || true"], options={"export": "NONE"})
    assert shared["setup"][:3] == ["set -eu", "false || true", "set +eu +o pipefail"]
    assert shared["setup"][3] == "export SLURM_EXPORT_ENV=ALL"
    ran = subprocess.run(
        ["/bin/bash", "-c", "\n".join([*shared["setup"], "false", "echo $unset on"])], capture_output=True, text=True
    )
    assert ran.stdout == "on\n"
    assert "cpus_per_task" not in shared
    assert "mem" not in shared
    assert shared["wckey"] is None
    assert shared["srun_args"] == []
    lines = exports({"A": "it's $HOME", "B": "2"})
    ran = subprocess.run(
        ["/bin/bash", "-c", "\n".join([*lines, 'echo "$A $B"'])], env={"B": "mine"}, capture_output=True, text=True
    )
    assert ran.stdout == "it's $HOME mine\n"


def test_a_batch_script_finds_the_checkout_before_the_users_own_path() -> None:
    shown = subprocess.run(
        ["/bin/bash", "-c", f'{python_path()}; echo "$PYTHONPATH"'],
        env={**os.environ, "PYTHONPATH": "/theirs"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == f"{Path(__file__).resolve().parents[2]}:/theirs\n"


def test_a_job_without_a_memory_limit_requests_all_memory_of_a_node() -> None:
    where = {"job_name": "a", "nodes": 1, "tasks_per_node": 1, "cpus_per_task": 3, "minutes": 5}
    assert common_parameters(**where, partition=None)["mem"] == "0"
    limited = common_parameters(**where, partition="gpu", mem_gb=7)
    assert (limited["mem"], limited["partition"], limited["srun_args"]) == ("7GB", "gpu", ["--cpus-per-task=3"])
    assert limited["additional_parameters"] == {"requeue": True}


@pytest.mark.parametrize(
    ("lines", "states"),
    [
        (
            "printf '12 RUNNING None\\n7 PENDING Priority\\n7 COMPLETED None\\n'",
            {"7": {"PENDING": "Priority", "COMPLETED": "None"}, "12": {"RUNNING": "None"}, "9": {}},
        ),
        ("printf 'CLUSTER: C1\\n9 RUNNING\\n'", {"7": {}, "12": {}, "9": {"RUNNING": ""}}),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", {"7": {}, "12": {}, "9": {}}),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", {"7": None, "12": None, "9": None}),
    ],
)
def test_states_of_many_jobs_are_one_question(lines: str, states: dict[str, Any], bin_folder: Path) -> None:
    install(bin_folder, "squeue", f'[ "$5" = 7,12,9 ] && {{ echo asked >>{bin_folder}/asked; {lines}; }}')
    assert states_of_jobs(["7", "12", "9"]) == states
    assert (bin_folder / "asked").read_text() == "asked\n"
