"""`prepare.py --slurm`: what it tells sbatch, from flags, keys, the environment and the site file."""

import os
from pathlib import Path

import pytest

from cmscale.errors import NoSpace, UserError
from cmscale.io.local import LocalStorage
from data_prep.making import slurm_array
from data_prep.making.preparation import Preparation
from data_prep.making.slurm_array import ArrayPlacement, ArrayTask
from data_prep.prepare import array_placement, command_parser, main

COMMON = ["--source", "folder:x", "--format", "mds", "--out", "out", "--workers", "3", "--slurm"]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMSCALE_SITE", "")
    for name in os.environ:
        if name.startswith("SBATCH_"):
            monkeypatch.delenv(name)


def placement(*arguments: str) -> ArrayPlacement:
    return array_placement(command_parser().read([*COMMON, *arguments])[0])


def test_flags_lie_over_keys_over_the_environment_over_the_site(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "site.yaml").write_text(
        "slurm: {account: team, partition: cpu, time: 90, cpus_per_task: 16, mem_per_gpu: 8G, gres: 'gpu:4'}"
    )
    monkeypatch.setenv("CMSCALE_SITE", str(tmp_path / "site.yaml"))
    monkeypatch.setenv("SBATCH_QOS", "long")
    found = placement("slurm.extra={nice: 5}", "slurm.partition=big")
    assert (found.partition, found.minutes, found.cpus, found.nodes) == ("big", 90, 3, 1)
    assert found.slurm.options() == {"account": "team", "qos": "long", "mem": "0", "nice": "5"}
    found = placement("--partition", "mine", "--time", "2-00", "--nodes", "4", "slurm.partition=big")
    assert (found.partition, found.minutes, found.nodes) == ("mine", 2880, 4)
    monkeypatch.delenv("CMSCALE_SITE")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert (placement().minutes, placement().partition) == (1440, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["slurm.acount=x"], "did you mean slurm.account"),
        (["train.seed=1"], "only keys of the section slurm can be given here"),
        (["slurm.cpus_per_task=4"], "say it with --workers"),
        (["slurm.gpus_per_node=4"], "tasks of an array use no GPU"),
        (['slurm.account="a\\nb"'], "line breaks and control characters"),
        (["--partition", "a\nb"], "--partition: got 'a\\\\nb'; line breaks"),
        (["--time", "soon"], "--time or --partition: got 'soon'"),
    ],
)
def test_mistakes_are_named(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        placement(*arguments)


def test_keys_without_slurm_are_refused() -> None:
    with pytest.raises(UserError, match="--slurm"):
        command_parser().read([*COMMON[:-1], "slurm.account=x"])


def test_the_arrays_script_has_all_of_it_and_sbatch_a_clean_environment(tmp_path: Path, monkeypatch) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        f'#!/bin/sh\ncat "$1" >{tmp_path}/script; /usr/bin/env >{tmp_path}/seen; echo Submitted batch job 17\n'
    )
    sbatch.chmod(0o755)
    (tmp_path / "srun").symlink_to(sbatch)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("SLURM_MEM_PER_CPU", "SLURM_ARRAY_TASK_ID", "SBATCH_EXPORT"):
        monkeypatch.setenv(name, "1")

    class Stand:
        num_shards = 5

    monkeypatch.setattr(slurm_array, "_log_folder", lambda _: tmp_path / "logs")
    monkeypatch.setattr(slurm_array, "ArrayTask", lambda **values: type("T", (), {"model_dump_json": lambda _: "{}"})())
    stand = Stand()
    stand.source = stand.storage = type("S", (), {"name": "s", "url": "u"})()  # pyright: ignore[reportAttributeAccessIssue]
    stand.settings = None  # pyright: ignore[reportAttributeAccessIssue]
    keys = ("slurm.account=team", "slurm.setup=[module load x]", "slurm.srun_args=[--mpi=none]", "slurm.python=py3")
    job = slurm_array._submit(stand, placement("--nodes", "2", *keys), max_bad=0)  # pyright: ignore[reportArgumentType]
    assert job == "17"
    script = (tmp_path / "script").read_text()
    for line in ("#SBATCH --account=team", "#SBATCH --cpus-per-task=3", "#SBATCH --array=0-1%2", "module load x"):
        assert f"{line}\n" in script
    assert "wckey" not in script
    assert " --mpi=none py3 -u -m submitit.core._submit" in script
    assert "SLURM_" not in (tmp_path / "seen").read_text().replace("SLURM_CONF", "")


@pytest.mark.parametrize(("error", "status"), [(NoSpace("x: no space left"), 1), (UserError("x: not an image"), 2)])
def test_what_ends_a_task_ends_the_command_as_without_slurm(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, error: UserError, status: int
) -> None:
    def submit(preparation: Preparation, _: ArrayPlacement, *, max_bad: int) -> str:
        plan = {"source": preparation.source.name, "settings": preparation.settings, "out": preparation.storage.url}
        task = ArrayTask(**plan, task=0, tasks=1, workers=1, max_bad=max_bad)
        slurm_array.run_task(task.model_dump_json())
        return "17"

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(slurm_array, "_submit", submit)
    monkeypatch.setattr(slurm_array, "_active", lambda _: False)
    monkeypatch.setattr(Preparation, "make", fail)
    command = ["--source", f"lsun:{source}", "--format", "mds", "--out", str(tmp_path / "out"), "--slurm"]
    assert main(command) == status
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_array_that_cannot_be_recorded_does_not_go_on_unknown(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled: list[str] = []

    def interrupted(storage: LocalStorage, key: str, data: bytes) -> None:
        if key.endswith("array.json"):
            raise KeyboardInterrupt
        write(storage, key, data)

    write = LocalStorage.write
    monkeypatch.setattr(slurm_array, "_submit", lambda *_, **__: "17")
    monkeypatch.setattr(slurm_array, "_cancel", lambda array: cancelled.append(array.job_id))
    monkeypatch.setattr(LocalStorage, "write", interrupted)
    command = ["--source", f"lsun:{source}", "--format", "webdataset", "--out", str(tmp_path / "out"), "--slurm"]
    assert main(command) == 130
    assert cancelled == ["17"]
