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
