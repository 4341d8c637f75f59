"""Tests of prepare.py --slurm on a real Slurm: the same bytes as on one machine, refusals, a killed submitter."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from data_fixtures import encoded_images, tree, write_lmdb

from cmscale.io.process import CHECKOUT
from cmscale.io.storage import open_storage
from data_prep import prepare, verify

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


def arguments(source: Path, out: Path | str, *more: str) -> list[str]:
    common = ["--source", f"lsun:{source}", "--out", str(out), "--format", "webdataset", "--image-size", "16"]
    return [*common, "--samples-per-shard", "4", "--workers", "1", *more]


def test_an_array_makes_the_bytes_of_one_machine_and_a_killed_submitter_is_taken_over(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lmdb(tmp_path / "lmdb", encoded_images(23))
    assert prepare.main(arguments(source, tmp_path / "here")) == 0
    command = arguments(source, tmp_path / "there", "--slurm", "--nodes", "2", "--partition", "low")
    first = subprocess.Popen(
        [sys.executable, str(CHECKOUT / "data_prep" / "prepare.py"), *command], stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdout.readline().startswith("array ")
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    capsys.readouterr()
    assert prepare.main(command) == 0
    assert "is still running" in capsys.readouterr().out
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


def test_an_image_that_a_task_refuses_ends_the_array_in_one_line_and_leaves_nothing(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lmdb(tmp_path / "lmdb", {"0" * 40: b"no image"})
    assert prepare.main(arguments(source, tmp_path / "out", "--slurm", "--nodes", "2")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "0" * 40 in error
    assert not (tmp_path / "out").exists()


def test_an_array_fills_a_bucket_with_the_bytes_of_one_machine_and_leaves_no_notes_there(
    slurm: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # the folder of the tasks' logs
    source = write_lmdb(tmp_path / "lmdb", encoded_images(23))
    assert prepare.main(arguments(source, tmp_path / "here")) == 0
    assert prepare.main(arguments(source, f"{s3}/there", "--slurm", "--nodes", "2")) == 0
    assert ".cmscale-prepare/" in capsys.readouterr().out
    assert not (tmp_path / ".cmscale-prepare").exists()
    bucket = open_storage(f"{s3}/there")
    assert {entry.key: bucket.read(entry.key) for entry in bucket.list()} == tree(tmp_path / "here")
    assert verify.main([f"{s3}/there"]) == 0


def test_a_task_that_refuses_leaves_nothing_in_a_bucket(
    slurm: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_lmdb(tmp_path / "lmdb", {"0" * 40: b"no image"})
    assert prepare.main(arguments(source, f"{s3}/out", "--slurm", "--nodes", "2")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "0" * 40 in error
    assert list(open_storage(f"{s3}/out").list()) == []


def test_an_array_that_slurm_refuses_is_one_line(slurm: Path, tmp_path: Path, capsys) -> None:
    source = write_lmdb(tmp_path / "lmdb", encoded_images(3))
    assert prepare.main(arguments(source, tmp_path / "out", "--slurm", "--partition", "nowhere")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "partition" in error
    assert not (tmp_path / "out").exists()
