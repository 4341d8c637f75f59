"""Where jobs run: flags over keys over what the run recorded over the site; and what the plan says about it."""

import json
import os
import sys
from pathlib import Path

import pytest
from launch_fixtures import CONFIG, dataset

from cmscale.runs.folder import RunDir
from launchers import evaluate, submit
from launchers.clusters import CLUSTERS
from launchers.clusters import slurm as slurm_cluster
from launchers.clusters.slurm import SlurmCluster
from launchers.command_line import guarded
from launchers.jobs import JobSpec
from launchers.submission import submissions_of


class Recorder(SlurmCluster):
    """Slurm, of which every job that it would get is kept."""

    def __init__(self) -> None:
        self.jobs: list[JobSpec] = []

    def run(self, job: JobSpec, *, wait: bool) -> int:
        self.jobs.append(job)
        job.taken()
        return 0


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """A login node with sbatch and squeue, a config `tiny.yaml`, and no site file."""
    for name in ("sbatch", "squeue"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CMSCALE_SITE", "")
    for name in os.environ:
        if name.startswith("SBATCH_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG.format(data=dataset(tmp_path / "data")))
    recorder = Recorder()
    monkeypatch.setitem(CLUSTERS, "slurm", recorder)
    return recorder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, program=submit) -> int:
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *arguments])
    return guarded(program.main)


def rows(printed: str) -> dict[str, tuple[str, str]]:
    """The plan's table of origins: name -> (value, origin)."""
    table = printed.partition("where the values come from:\n")[2].partition("\n\n")[0]
    found = [[part.strip() for part in line.split("  ") if part.strip()] for line in table.splitlines()]
    return {row[0]: (row[1], row[2]) for row in found if len(row) == 3}


STARTED = ("--name", "a", "--nodes", "2", "--gpus-per-node", "4", "--partition", "gpu", "--time", "2:00:00")


class TestResume:
    def test_a_run_goes_on_where_it_ran(self, slurm: Recorder, monkeypatch, capsys) -> None:
        every = ("--evaluate-every", "3", "checkpoint.every_steps=3")
        assert run(monkeypatch, *STARTED, *every, "tiny.yaml", "slurm.account=team", "train.micro_batch_size=1") == 0
        capsys.readouterr()
        assert run(monkeypatch, "--resume", "a") == 0
        first, again = slurm.jobs
        assert again.placement == first.placement
        assert again.evaluations == first.evaluations != ()
        assert (again.placement.nodes, again.placement.ranks_per_node, again.placement.minutes) == (2, 4, 120)
        assert again.placement.slurm.account == "team"
        printed = capsys.readouterr()
        said = rows(printed.out)
        for name, value in (("nodes", "2"), ("gpus per node", "4"), ("partition", "gpu"), ("time", "120")):
            assert said[name] == (value, "placement.json of the run")
        assert said["cluster"] == ("slurm", "placement.json of the run")
        assert said["evaluate every"] == ("3", "placement.json of the run")
        assert "note:" not in printed.err

    def test_flags_and_keys_say_otherwise_and_are_recorded_in_turn(self, slurm: Recorder, monkeypatch, capsys) -> None:
        assert run(monkeypatch, *STARTED, "--evaluate-every", "1000", "tiny.yaml", "train.micro_batch_size=1") == 0
        more = ("--nodes", "1", "--evaluate-every", "0", "slurm.partition=short", "slurm.nodes=7")
        assert run(monkeypatch, "--resume", "a", *more) == 0
        capsys.readouterr()
        assert run(monkeypatch, "--resume", "a", "--dry-run") == 0
        said = rows(capsys.readouterr().out)
        assert (said["nodes"][0], said["partition"][0], said["time"][0]) == ("1", "short", "120")
        assert "evaluate every" not in said
        assert slurm.jobs[1].evaluations == ()

    def test_on_another_cluster_nothing_recorded_holds(self, slurm: Recorder, monkeypatch, capsys) -> None:
        assert run(monkeypatch, *STARTED, "tiny.yaml", "train.micro_batch_size=1") == 0
        capsys.readouterr()
        assert run(monkeypatch, "--resume", "a", "--cluster", "local", "--dry-run") == 0
        said = rows(capsys.readouterr().out)
        assert (said["cluster"], said["nodes"]) == (("local", "flag"), ("1", "default"))
        (Path("sbatch")).unlink()
        assert run(monkeypatch, "--resume", "a") == 2  # and not on this machine, silently
        assert "there is no sbatch on the PATH" in capsys.readouterr().err

    def test_a_run_of_an_earlier_release_goes_on_as_it_did_and_says_so(self, slurm, monkeypatch, capsys) -> None:
        assert run(monkeypatch, *STARTED, "tiny.yaml", "train.micro_batch_size=1") == 0
        placement = RunDir(Path("runs/a")).placement
        placement.unlink()
        capsys.readouterr()
        assert run(monkeypatch, "--resume", "a") == 0
        assert "note: run a does not record where it ran" in capsys.readouterr().err
        assert slurm.jobs[1].placement.num_ranks == 1
        good = (
            '{"cluster": "slurm", "nodes": 1, "gpus_per_node": 1, "partition": null, "minutes": 6, "evaluate_every": 5}'
        )
        other = (("1,", "-1,"), ("6,", "[],"), ("5}", '"x"}'))
        for text in (good[:14], "[" * 10_000, *(good.replace(*each) for each in other)):
            placement.write_text(text)
            assert run(monkeypatch, "--resume", "a") == 2
            assert "placement.json: damaged" in capsys.readouterr().err

    def test_taking_over_needs_a_run(self, slurm, monkeypatch, capsys) -> None:
        assert run(monkeypatch, "--take-over", "tiny.yaml") == 2
        assert "--take-over: " in capsys.readouterr().err


def test_each_value_of_the_plan_says_where_it_came_from(slurm, monkeypatch, capsys, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(
        "slurm: {partition: gpu, account: team, extra: {switches: 1}}\n"
        f"flags: {{runs_dir: {tmp_path}/theirs, cluster: slurm, gpus_per_node: 4}}\n"
    )
    monkeypatch.setenv("CMSCALE_SITE", str(tmp_path / "site.yaml"))
    monkeypatch.setenv("SBATCH_QOS", "long")
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    with Path("tiny.yaml").open("a") as file:
        file.write("slurm: {constraint: nvlink, nodes: 2}\n")
    keys = ("slurm.extra.nice=5", "train.micro_batch_size=1")
    assert run(monkeypatch, "--dry-run", "--time", "90", "tiny.yaml", *keys) == 0
    printed = capsys.readouterr()
    site = f"site file {tmp_path}/site.yaml"
    expected = {
        "cluster": ("slurm", site),
        "nodes": ("2", "slurm.nodes, tiny.yaml"),
        "gpus per node": ("4", f"slurm.gpus_per_node, {site}"),
        "partition": ("gpu", f"slurm.partition, {site}"),
        "time": ("90", "flag"),
        "slurm.account": ("team", site),
        "slurm.qos": ("long", "SBATCH_QOS"),
        "slurm.constraint": ("nvlink", "tiny.yaml"),
        "slurm.extra.switches": ("1", site),
        "slurm.extra.nice": ("5", "command line"),
        "train.micro_batch_size": ("1", "command line"),
    }
    said = rows(printed.out)
    assert {name: said[name] for name in expected} == expected
    assert printed.out.startswith(f"run           {tmp_path}/theirs/")
    assert "SBATCH_EXPORT" in printed.err
    for line in ("partition=gpu", "account=team", "qos=long", "constraint=nvlink", "switches=1", "nice=5", "nodes=2"):
        assert f"#SBATCH --{line}\n" in printed.out


def test_a_type_of_gpu_and_gpus_by_gres_reach_the_script(slurm, monkeypatch, capsys) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    common = ("--dry-run", "tiny.yaml", "engine.device=cuda")
    assert run(monkeypatch, *common, "--gpus-per-node", "a100:4") == 0
    script = capsys.readouterr().out
    assert "#SBATCH --gpus-per-node=a100:4\n" in script
    assert "#SBATCH --ntasks-per-node=4\n" in script
    assert run(monkeypatch, *common, "slurm.gres=gpu:h100:2") == 0
    script = capsys.readouterr().out
    assert "#SBATCH --gres=gpu:h100:2\n" in script
    assert "#SBATCH --ntasks-per-node=2\n" in script
    assert "--gpus-per-node=" not in script
    for arguments, words in (
        (("--gpus-per-node", "4", "slurm.gres=gpu:2"), "requests 2 GPUs per node, --gpus-per-node 4"),
        (("--gpus-per-node", "a100:4", "--cluster", "local"), "only Slurm knows types of GPUs"),
        (("--runs-dir", "a\nb"), "--runs-dir: got 'a\\\\nb'; line breaks"),
    ):
        assert run(monkeypatch, *common, *arguments) == 2
        assert words.replace("\\\\", "\\") in capsys.readouterr().err
    assert run(monkeypatch, *common[:-1], "engine.device=cpu", "--gpus-per-node", "a100:4") == 2
    assert "engine.device is cpu; give a number of ranks" in capsys.readouterr().err


class TestEvaluate:
    @pytest.mark.parametrize("source", ["exported.safetensors", "runs/a", "weights.pt"])
    def test_keys_of_launching_reach_slurm_for_every_source(
        self, source: str, slurm, monkeypatch, capsys, tmp_path: Path
    ) -> None:
        if source == "runs/a":
            lines = ["slurm.nodelist=node[1-2]", "slurm.dependency=afterok:1", "slurm.qos=long"]
            assert run(monkeypatch, *STARTED, "tiny.yaml", "train.micro_batch_size=1", *lines) == 0
        else:
            Path(source).touch()
        config = ("--config", "tiny.yaml", "train.seed=4") if source == "weights.pt" else ()
        keys = ("slurm.account=team", "slurm.partition=eval", "slurm.extra={switches: 1}")
        assert run(monkeypatch, source, "--device", "cpu", "--dry-run", *config, *keys, program=evaluate) == 0
        script = capsys.readouterr().out
        for line in ("account=team", "partition=eval", "switches=1", "nodes=1"):
            assert f"#SBATCH --{line}\n" in script
        assert ("#SBATCH --qos=long\n" in script) == (source == "runs/a")
        assert "nodelist" not in script.partition("#!/bin/bash")[2]
        assert "dependency" not in script.partition("#!/bin/bash")[2]

    def test_other_keys_are_refused_as_before(self, slurm, monkeypatch, capsys) -> None:
        Path("exported.safetensors").touch()
        assert run(monkeypatch, "exported.safetensors", "train.seed=1", program=evaluate) == 2
        assert "has no effect on the config that SOURCE has" in capsys.readouterr().err
        assert run(monkeypatch, "exported.safetensors", "slurm.acount=x", program=evaluate) == 2
        assert "did you mean slurm.account?" in capsys.readouterr().err


def test_a_new_run_whose_job_slurm_refuses_leaves_no_folder_and_one_that_is_resumed_stays(
    slurm, monkeypatch, capsys, tmp_path: Path
) -> None:
    monkeypatch.setitem(CLUSTERS, "slurm", SlurmCluster())
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid account' >&2; exit 1\n")
    arguments = (*STARTED, "tiny.yaml", "train.micro_batch_size=1")
    for _ in range(2):
        assert run(monkeypatch, *arguments) == 2
        assert "Slurm refuses the job: sbatch: error: invalid account" in capsys.readouterr().err
        assert list(Path("runs").iterdir()) == []
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 17\n")
    assert run(monkeypatch, *arguments) == 0
    (tmp_path / "sbatch").write_text("#!/bin/sh\nexit 1\n")
    assert run(monkeypatch, "--resume", "a") == 2
    assert Path("runs/a/config.yaml").exists()


NO_ANSWER = "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1"


def test_a_new_run_whose_job_slurm_may_have_taken_stays_and_is_not_submitted_twice(
    slurm, monkeypatch, capsys, tmp_path: Path
) -> None:
    monkeypatch.setitem(CLUSTERS, "slurm", SlurmCluster())
    monkeypatch.setattr(slurm_cluster, "_LOOKS_AFTER_SECONDS", (0, 0))
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\n{NO_ANSWER}\n")
    assert run(monkeypatch, *STARTED, "tiny.yaml", "train.micro_batch_size=1") == 1
    said = capsys.readouterr().err
    assert "may have taken the job all the same" in said
    assert "see squeue --name=a; without a job there, continue with --resume" in said
    (submission,) = submissions_of(RunDir(tmp_path / "runs" / "a"))
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho 17 PENDING {submission.script}\n")
    assert run(monkeypatch, "--resume", "a") == 2
    assert "job 17 of this run is PENDING; end it first: scancel 17" in capsys.readouterr().err
    (tmp_path / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert run(monkeypatch, "--resume", "a") == 1
    assert "Slurm does not answer; try again later" in capsys.readouterr().err
    (tmp_path / "squeue").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 18\n")
    assert run(monkeypatch, "--resume", "a") == 0


@pytest.mark.parametrize("said", [NO_ANSWER, "echo the site took your job"])
def test_a_job_of_which_sbatch_says_no_id_is_found_in_the_queue(
    slurm, monkeypatch, capsys, tmp_path: Path, said: str
) -> None:
    monkeypatch.setitem(CLUSTERS, "slurm", SlurmCluster())
    monkeypatch.setattr(slurm_cluster, "_LOOKS_AFTER_SECONDS", (0, 0))
    listed = "for script in runs/a/logs/submissions/*/job.sh; do echo 17 PENDING $script; done"
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n[ -e asked ] || {{ : >asked; exit 1; }}\n{listed}\n")
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\n{said}\n")
    assert run(monkeypatch, *STARTED, "tiny.yaml", "train.micro_batch_size=1") == 0
    assert "job 17 submitted" in capsys.readouterr().out
    (submission,) = submissions_of(RunDir(tmp_path / "runs" / "a"))
    assert submission.read_job().job_id == "17"


def test_a_new_run_about_which_slurm_was_not_asked_leaves_no_folder(slurm, monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setitem(CLUSTERS, "slurm", SlurmCluster())
    said = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\necho '{said}' >&2; exit 1\n")
    assert run(monkeypatch, *STARTED, "tiny.yaml", "train.micro_batch_size=1") == 1
    assert "give the same command again later" in capsys.readouterr().err
    assert list(Path("runs").iterdir()) == []


def test_a_full_queue_is_no_mistake_and_leaves_nothing(slurm, monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setitem(CLUSTERS, "slurm", SlurmCluster())
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: AssocMaxSubmitJobLimit' >&2; exit 1\n")
    assert run(monkeypatch, *STARTED, "tiny.yaml", "train.micro_batch_size=1") == 1
    assert "AssocMaxSubmitJobLimit; give the same command again once fewer jobs" in capsys.readouterr().err
    assert list(Path("runs").iterdir()) == []


def test_what_was_recorded_is_a_small_document(slurm, monkeypatch) -> None:
    assert run(monkeypatch, *STARTED, "tiny.yaml", "train.micro_batch_size=1") == 0
    assert json.loads(Path("runs/a/placement.json").read_text()) == {
        "cluster": "slurm",
        "nodes": 2,
        "gpus_per_node": 4,
        "partition": "gpu",
        "minutes": 120,
        "evaluate_every": None,
    }
