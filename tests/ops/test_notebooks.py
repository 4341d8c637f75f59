"""The notebooks work from the top: on runs as the demo leaves them, and (slow) from the pictures on."""

import json
import shutil
from pathlib import Path

import pytest
from evaluation_fixtures import write_checkpoint, write_dataset, write_trained_run
from notebooks import execute as notebooks

from cmscale.config import parse_config

CHECKOUT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((CHECKOUT / "ops" / "notebooks").glob("*.ipynb"))
LARGEST = 200_000  # bytes of a notebook with its outputs


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the parts of the checkout that notebooks use, and nothing in runs/."""
    for name in ("launchers", "data_prep", "configs", "cmscale"):
        (tmp_path / name).symlink_to(CHECKOUT / name)
    (tmp_path / "ops" / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "ops" / "notebooks")  # where Jupyter starts them
    return tmp_path


def outputs(notebook: dict) -> str:
    return json.dumps([cell.get("outputs") for cell in notebook["cells"]])


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_its_outputs_and_is_small(file: Path) -> None:
    notebook = json.loads(file.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert file.stat().st_size < LARGEST
    assert "Traceback" not in outputs(notebook)
    assert "/tmp/" not in outputs(notebook)


def test_a_long_output_keeps_its_first_lines_whole(tmp_path: Path) -> None:
    cell = {"cell_type": "code", "source": ["print('head')\n", "for i in range(999): print('row', i)"]}
    (tmp_path / "long.ipynb").write_text(json.dumps({"cells": [cell]}))
    (output,) = notebooks.execute(tmp_path / "long.ipynb")["cells"][0]["outputs"]
    rows = [f"row {i}\n" for i in range(999)]
    assert output["text"] == ["head\n", *rows[: len(output["text"]) - 2], "..."]
    assert sum(map(len, output["text"])) < 3010
    cell["source"] = ["print('x' * 9999)"]
    (tmp_path / "long.ipynb").write_text(json.dumps({"cells": [cell]}))
    (output,) = notebooks.execute(tmp_path / "long.ipynb")["cells"][0]["outputs"]
    assert output["text"] == ["x" * 3000 + "\n", "..."]


@pytest.mark.long
def test_samples_edits_and_comparisons_work_on_the_runs_of_the_demo(checkout: Path, monkeypatch) -> None:
    demo = checkout / "runs" / "demo"
    data = write_dataset(demo, count=12)
    for name, method in (("cd", "distance: l2"), ("ct", "distance: l2")):
        run = write_trained_run(demo / name, data=data, method=method)
        write_checkpoint(run, parse_config(run.config.read_text()), step=9)
    (demo / "images").rename(demo / "reference.npz")  # a folder serves as well
    commands: list[str] = []
    monkeypatch.setattr(notebooks, "_shell", lambda command, names: commands.append(command.format_map(names)))
    sampled = notebooks.execute(NOTEBOOKS[1])
    assert outputs(sampled).count("image/png") == 4
    result = {"fid": {"mean": 3.0}, "nfe": 1, "score_name": "FD-EfficientNet", "num_samples": 64}
    (demo / "cd" / "evaluations").mkdir()
    (demo / "cd" / "evaluations" / "step-n64-x.json").write_text(json.dumps(result))
    compared = notebooks.execute(NOTEBOOKS[2])
    assert "NFE 1: FD-EfficientNet 3.0 over 64 samples" in outputs(compared)
    assert commands[0].startswith("cmscale evaluate runs/demo/cd --samples 64 --steps 1,2 --features efficientnet")


@pytest.mark.slow
def test_all_notebooks_work_from_the_pictures_on(checkout: Path) -> None:
    for file in NOTEBOOKS:
        notebooks.execute(file)
    assert (checkout / "runs" / "notebook" / "ct" / "checkpoints" / "step-000000020").is_dir()
    assert len(list((checkout / "runs" / "notebook" / "ct" / "evaluations").glob("*-n64-*.json"))) == 2
    shutil.rmtree(checkout / "runs")
