"""A comparison shows the runs' sample grids side by side, of comparable steps, and refuses a run given twice."""

from pathlib import Path

import pytest
from commands import run
from PIL import Image
from run_folder import write_run

from cmscale.report.grids_beside import grid_rows
from cmscale.runs.folder import RunDir


def run_with_grids(folder: Path, *steps: int, side: int = 12) -> RunDir:
    made = RunDir(folder)
    made.samples.mkdir(parents=True)
    for step in steps:
        Image.new("RGB", (side, side), (step % 256, 0, 0)).save(made.sample_grid(step))
    return made


def shown(*runs: RunDir) -> dict[str, list[int | None]]:
    return {row.title: [each.step for each in row.grids] for row in grid_rows(runs, [each.name for each in runs])}


def test_rows_are_of_steps_that_all_runs_have_reached(tmp_path: Path) -> None:
    long = run_with_grids(tmp_path / "long", 0, 100, 200, 300, 900)
    short = run_with_grids(tmp_path / "short", 0, 150, 350)
    none = run_with_grids(tmp_path / "none")
    assert shown(long, short, none) == {
        "At step 350 or the last grid before it": [300, 350, None],
        "At step 175 or the last grid before it": [100, 150, None],
        "Newest of each run": [900, 350, None],
    }
    assert shown(short, none) == {
        "At step 350 or the last grid before it": [350, None],
        "At step 175 or the last grid before it": [150, None],
    }
    assert shown(none) == {}


def test_a_damaged_grid_is_left_out_and_a_large_one_is_scaled(tmp_path: Path) -> None:
    damaged, large = run_with_grids(tmp_path / "damaged", 0), run_with_grids(tmp_path / "large", 0, side=2000)
    damaged.sample_grid(0).write_bytes(b"\x89PNG")
    (row,) = grid_rows([damaged, large], ["damaged", "large"])
    assert row.grids[0].source is None
    assert row.grids[1].source is not None
    assert row.grids[1].source.startswith("data:image/png;base64,")


def test_a_run_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    write_run(tmp_path / "one")
    write_run(tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    for again in ("one/", "./one", str(tmp_path / "one")):
        beside = ("report", "one", "--beside", "two", "--beside", again)
        for command in (("compare", "one", again), beside, (*beside, "--serve")):
            assert run(monkeypatch, *command) == 2
            said = capsys.readouterr().err
            assert "is the same run as one; name each run once" in said
            assert said.count("\n") == 1
