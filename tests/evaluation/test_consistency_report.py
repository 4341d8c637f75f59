"""The consistency-error command: the mean of the measured curves, along the right trajectories, where it belongs."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from commands import run
from data_fixtures import encoded_images, write_lmdb
from networks import random_weights
from run_folder import write_run

from cmscale.config import Config, parse_config
from cmscale.consistency import grid
from cmscale.consistency.consistency_curve import ErrorCurve, error_curve
from cmscale.consistency.consistency_error import consistency_error
from cmscale.consistency.grid import off_grid_times
from cmscale.data.first_images import first_images
from cmscale.errors import UserError
from cmscale.evaluation import consistency_report
from cmscale.evaluation.consistency_report import measure_consistency_error
from cmscale.interop import write_safetensors
from cmscale.report import build_report
from cmscale.rng import normal_like_samples
from cmscale.source import load_source
from data_prep.prepare import main as prepare

TEXT = """
method: METHOD
model: {image_size: 8, channels: 32, channel_multipliers: [1], num_res_blocks: 1, head_channels: 32}
data: {path: DATA}
optimizer: {learning_rate: 1e-3}
train: {total_steps: 10, global_batch_size: 8, micro_batch_size: 2}
"""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    source = write_lmdb(folder / "photos_lmdb", encoded_images(6))
    assert (
        prepare(["--source", f"lsun:{source}", "--format", "mds", "--image-size", "8", "--out", str(folder / "set")])
        == 0
    )
    return folder / "set"


def saved(folder: Path, method: str, data: Path, *, seed: int = 0) -> Path:
    config: Config = parse_config(TEXT.replace("METHOD", method).replace("DATA", str(data)))
    path = folder / f"{config.method.kind}.safetensors"
    write_safetensors(path, random_weights(config.model, seed=seed), config=config, step=10, weights_name="ema_0.9")
    return path


@pytest.mark.long
def test_the_command_writes_mean_curves_of_straight_trajectories_and_a_plot(data, tmp_path, monkeypatch):
    model, out = saved(tmp_path, "{kind: ct, distance: l2}", data), tmp_path / "error.json"
    plot = tmp_path / "error.png"
    assert (
        run(
            monkeypatch,
            *("consistency-error", model, "--data", data, "--samples", 5, "--batch-size", 2),
            *("--out", out, "--plot", plot),
        )
        == 0
    )
    result = json.loads(out.read_text())
    source = load_source(str(model))
    clean = first_images(str(data), count=5, size=8)
    assert clean.shape == (5, 3, 8, 8)
    noise = normal_like_samples(0, range(5), (3, 8, 8), purpose="held-out")
    expected = consistency_error(source.config.method, source.denoiser(CPU), clean, noise=noise)
    assert (len(result["times"]), result["num_samples"], result["trajectories"]) == (100, 5, "x + t z")
    assert result["neighbours"] == pytest.approx(expected.neighbours.mean(1).tolist(), rel=1e-4)
    assert result["to_start"] == pytest.approx(expected.to_start.mean(1).tolist(), rel=1e-4, abs=1e-6)
    assert result["mean"] == pytest.approx(float(expected.neighbours.mean()), rel=1e-4)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves have 10 times and not 100, where it does not matter how many."""
    monkeypatch.setattr(grid, "off_grid_times", lambda method, count: off_grid_times(method, min(count, 10)))


@pytest.mark.long
@pytest.mark.usefixtures("few_times")
def test_a_distilled_source_is_followed_along_its_teachers_ode(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the teacher is named by a relative path, which exported weights keep
    teacher = saved(tmp_path, "{kind: edm}", data, seed=1)
    source = load_source(str(saved(tmp_path, f"{{kind: cd, teacher: {teacher.name}, distance: l2}}", data)))
    common = {"data": str(data), "num": 2, "seed": 0, "plot": None, "batch_size": 2, "device": CPU}
    own, named = tmp_path / "own.json", tmp_path / "named.json"
    measure_consistency_error(source, teacher=None, out=own, **common)
    measure_consistency_error(source, teacher=teacher.name, out=named, **common)
    result = json.loads(own.read_text())
    other = json.loads(named.read_text())
    assert {**result, "date": ""} == {**other, "date": ""}
    assert teacher.name in result["trajectories"]
    curve = error_curve(
        source.config.method,
        source.denoiser(CPU),
        first_images(str(data), count=2, size=8),
        indices=range(2),
        teacher=load_source(str(teacher)).denoiser(CPU),
        device=CPU,
    )
    assert result["neighbours"] == pytest.approx(curve.neighbours, rel=1e-6)


def test_a_runs_result_lies_in_its_folder_and_on_its_page(data, tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", kind="ct")
    folder.checkpoints.mkdir(exist_ok=True)
    model = load_source(str(saved(tmp_path, "{kind: ict}", data)))
    source = dataclasses.replace(model, run_dir=folder.root)
    asked = {"data": str(data), "seed": 0, "teacher": None, "out": None, "plot": None, "batch_size": 2, "device": CPU}
    path = Path(measure_consistency_error(source, num=2, **asked))
    assert path.parent == folder.root / "evaluations" / "consistency"
    assert path.name.startswith("step-000000010-ema_0.9-n2-seed0-")
    before = path.read_bytes()
    curve = ErrorCurve(times=[2.0, 1.0], neighbours=[0.5], to_start=[0.0, 0.5])
    monkeypatch.setattr(consistency_report, "error_curve", lambda *_, **__: curve)  # the names are what matters
    others = [
        Path(measure_consistency_error(source, num=num, **{**asked, "seed": seed})) for num, seed in ((3, 0), (2, 1))
    ]
    teacher = str(saved(tmp_path, "{kind: edm}", data, seed=1))
    others.append(measure_consistency_error(source, num=2, **{**asked, "teacher": teacher}))
    assert len({path, *others}) == len(list(path.parent.iterdir())) == 4
    assert path.read_bytes() == before
    page = build_report(folder).read_text()
    assert "Consistency error against time, step 10, ema_0.9, 3 images" in page
    monkeypatch.setattr(consistency_report, "error_curve", lambda *_, **__: folder.root.rename(tmp_path / "moved"))
    monkeypatch.setattr("cmscale.evaluation.progress.AWAY_SECONDS", 0.0)
    with pytest.raises(UserError, match="is gone: was it moved or removed"):
        measure_consistency_error(source, num=4, **asked)
    assert not folder.root.exists()


@pytest.mark.usefixtures("few_times")
def test_asked_again_a_result_is_returned_and_with_force_measured_anew(data, tmp_path, monkeypatch, capsys):
    model, out, plot = saved(tmp_path, "{kind: ict}", data), tmp_path / "error.json", tmp_path / "error.png"
    command = ["consistency-error", model, "--data", data, "--samples", 1, "--out", out]
    assert run(monkeypatch, *command) == 0
    first = json.loads(out.read_text())
    out.write_text(json.dumps({**first, "mean": -1.0}))  # a mark
    assert run(monkeypatch, *command, "--plot", plot) == 0
    assert json.loads(out.read_text())["mean"] == -1.0
    assert plot.exists()
    assert "--force measures anew" in capsys.readouterr().err
    assert run(monkeypatch, *command, "--seed", 1) == 2
    assert "holds another measurement" in capsys.readouterr().err
    assert json.loads(out.read_text())["mean"] == -1.0
    assert run(monkeypatch, *command, "--force") == 0
    assert json.loads(out.read_text())["mean"] == first["mean"]
    out.write_text("a note")
    assert run(monkeypatch, *command, "--force") == 2
    assert out.read_text() == "a note"


def test_what_has_no_consistency_function_and_what_is_not_there_are_one_line(data, tmp_path, monkeypatch, capsys):
    for arguments, message in (
        ([saved(tmp_path, "{kind: edm}", data), "--out", tmp_path / "e.json"], "is a diffusion model (edm)"),
        ([saved(tmp_path, "{kind: ict}", data), "--data", data], "say where the result goes with --out"),
        (
            [saved(tmp_path, "{kind: ict}", data), "--out", tmp_path / "e.json"],
            f"the name alone, (elsewhere)/{data.name}; give --data",
        ),
        ([saved(tmp_path, "{kind: ict}", data), "--data", tmp_path / "no", "--out", tmp_path / "e.json"], "no"),
    ):
        assert run(monkeypatch, "consistency-error", *arguments) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
