"""The check of a GPU machine runs on a CPU as a dry run, in parts; its wheels are named without downloading."""

import json
import os
import subprocess
from pathlib import Path

import gpu_check
import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(CHECKOUT / "ops" / script), *arguments]
    # The tests' own Python, whichever one was named for their installation.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_dry_run_of_a_part_writes_its_result(tmp_path: Path) -> None:
    done = run("gpu_check.sh", "--dry-run", "--only", "attention", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(document["checks"]) == ["attention"]
    assert document["checks"]["attention"]["status"] == "passed"
    found = json.loads(document["checks"]["attention"]["output"])
    assert {entry["kernel"] for entry in found.values()} == {"sdpa"}


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_dry_run_of_everything_passes(tmp_path: Path) -> None:
    done = run("gpu_check.sh", "--dry-run", "--minutes", "30", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads((tmp_path / "gpu_check.json").read_text())["checks"]
    assert [check["status"] for check in checks.values()] == ["passed"] * len(checks)
    parts = {"attention", "tests", "step", "step, checkpointing", "memory", "sampling"}
    parts |= {"step, compiled", "step, channels last", "step, compiled, channels last", "step, LPIPS in fp16"}
    assert parts == set(checks)


def test_a_check_that_fails_or_takes_too_long_is_reported_and_the_time_is_kept(tmp_path: Path) -> None:
    def check(*command: str) -> gpu_check.Check:
        return gpu_check.Check("step", "one", list(command), 10, tmp_path / "result.json")

    failed = gpu_check.run(check("bash", "-c", "echo out; echo why >&2; exit 3"), seconds=60)
    assert (failed["status"], failed["output"]) == ("failed (status 3)", "out\nwhy\n")
    slow = gpu_check.run(check("sleep", "100"), seconds=6)
    assert slow["status"] == "took more than 6 s"
    ranks = gpu_check.run(check("bash", "-c", "echo begun; sleep 1000 & sleep 1000"), seconds=6)
    assert (ranks["status"], ranks["output"]) == ("took more than 6 s", "begun\n")
    assert ranks["seconds"] < 300  # the processes that it started hold nothing up
    assert gpu_check.run(check("true"), seconds=1)["status"] == "no time left"
    (tmp_path / "result.json").write_text("{}")
    assert "result" not in gpu_check.run(check("true"), seconds=60)  # that of an earlier run does not count


@pytest.mark.parametrize("dry_run", [True, False])
def test_only_files_with_tests_for_a_gpu_are_imported(dry_run: bool, tmp_path: Path) -> None:
    (check,) = (each for each in gpu_check.checks(tmp_path, dry_run=dry_run, original=None) if each.part == "tests")
    files = [Path(word) for word in check.command if word.endswith(".py")]
    assert {"test_attention.py", "test_dropout.py"} <= {file.name for file in files}
    assert all(gpu_check.CUDA in file.read_text() for file in files)
    assert str(CHECKOUT / "tests") not in check.command
    assert ("cuda" in check.command) is not dry_run


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_dry_run_computes_in_what_the_processor_has(
    has_bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmscale.distributed.compat.cpu_has_bf16", lambda: has_bf16)
    for dry_run in (True, False):
        found = gpu_check.checks(tmp_path, dry_run=dry_run, original=None)
        said = {word for check in found for word in check.command if word.startswith("engine.precision=")}
        assert said == {f"engine.precision={'fp32' if dry_run and not has_bf16 else 'bf16'}"}


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("gpu_check.sh", ("--wheels",), "--wheels: give a folder"),
        ("gpu_check.sh", ("--wheels", "/nowhere"), "--wheels /nowhere: no such folder"),
        ("gpu_wheels.sh", (), "--out: give the folder"),
        ("gpu_wheels.sh", ("--whatever",), "--whatever: unknown"),
    ],
)
def test_a_mistake_is_one_line_with_status_2(script: str, arguments: tuple[str, ...], words: str) -> None:
    done = run(script, *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr


def test_the_wheels_are_those_that_training_needs() -> None:
    named = run("gpu_wheels.sh", "--dry-run").stdout.split()
    assert {"deepspeed", "pydantic", "safetensors", "lpips", "pytest"} <= set(named)
    assert not {"torch", "wandb", "diffusers", "xformers", "numpy"} & set(named)
