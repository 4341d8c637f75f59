"""A run that is given by its name alone, without the folder of runs, is found by the message."""

from pathlib import Path

import pytest
from commands import run


@pytest.mark.parametrize(
    "command",
    [
        ("compare", "a", "b"),
        ("report", "a"),
        ("report", "runs/b", "--beside", "a"),
        ("mirror", "a"),
        ("verify", "a"),
        ("sample", "a", "--out", "x.npz"),
        ("evaluate", "a", "--reference", "x.npz"),
        ("export", "a", "--to", "x.safetensors"),
        ("config", "diff", "a", "runs/b"),
    ],
    ids=" ".join,
)
def test_the_folder_of_runs_is_named(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("did you mean runs/a?")


@pytest.mark.parametrize(
    "command", [("sample", "--out", "x.npz"), ("evaluate", "--reference", "x.npz"), ("export", "--to", "x.pt")]
)
def test_the_step_of_a_run_as_a_branch_names_it_is_answered_by_its_folder(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.yaml").write_text("")
    (tmp_path / "runs" / "a" / "checkpoints" / "step-000000020").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "checkpoints" / "step-000000020" / "manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for given, said in (
        ("20", "given by its folder: runs/a/checkpoints/step-000000020"),
        ("7", "of step 7, but of 20"),
    ):
        assert run(monkeypatch, command[0], f"runs/a@{given}", *command[1:]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(said)
