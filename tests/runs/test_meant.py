"""Where no run is, the message says what is there and what to give."""

import os
from pathlib import Path

import pytest
from commands import run

from cmscale.runs.meant import no_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b", "c", "d"):
        (tmp_path / name / "logs").mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "other.yaml").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("", "not a run but a folder of runs (a, b, c, ...); give one of them"),
        ("a/config.yaml", "not a run but a config; give {}/a, or use cmscale config diff for configs"),
        ("other.yaml", "not a run but a config; give a run's folder, or use cmscale config diff for configs"),
        ("a/logs", "not a run but in the run {}/a; give that"),
        ("nowhere", "not a run (no config.yaml)"),
    ],
)
def test_what_is_there_is_said(path: str, said: str, folder: Path) -> None:
    assert str(no_run(folder / path)) == f"{folder / path}: {said.format(folder)}"


def test_a_run_that_another_user_hides_hides_no_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = os.stat

    def refuse(path: str | Path, **given: bool) -> os.stat_result:
        if Path(path) == folder / "b" / "config.yaml":
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **given)

    monkeypatch.setattr(os, "stat", refuse)
    assert "not a run but a folder of runs (a, c, d)" in str(no_run(folder))


def test_a_folder_without_runs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "runs", tmp_path) == 0
    assert capfd.readouterr() == ("", f"{tmp_path}: holds no runs\n")
    assert run(monkeypatch, "runs", tmp_path, "--json") == 0
    assert capfd.readouterr() == ("[]\n", f"{tmp_path}: holds no runs\n")
