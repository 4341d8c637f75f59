"""Where outputs go and inputs come from: local paths and S3 alike; what can't be there is refused before any work."""

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from evaluation_fixtures import TEXT, build_cheap_features, write_dataset, write_trained_run
from fault_proxy import FaultProxy
from PIL import Image
from safetensors.torch import save_file

from cmscale.config import parse_config
from cmscale.interop import read_safetensors, write_safetensors
from cmscale.io.storage import open_storage
from cmscale.model.unet import build_unet
from data_prep import reference


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = parse_config(TEXT.format(kind="ct", method="distance: l2", data=folder / "absent", samples=12))
    weights = build_unet(config.model, seed=3).state_dict()
    write_safetensors(folder / "model.safetensors", weights, config=config, step=7, weights_name="ema_0.9")
    return folder / "model.safetensors"


def test_samples_pictures_and_inputs_may_be_on_s3(
    model: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CMSCALE_CACHE", str(tmp_path / ".cache"))
    storage = open_storage(s3)
    storage.upload("model.safetensors", model)
    noise = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    buffer = io.BytesIO()
    np.save(buffer, noise)
    storage.write("noise.npy", buffer.getvalue())
    grid = f"{s3}/step=7/grid.png"
    arguments = ["--samples", 2, "--noise", f"{s3}/noise.npy", "--out", f"{s3}/x.npz", "--grid", grid]
    assert run(monkeypatch, "sample", f"{s3}/model.safetensors", *arguments) == 0
    assert np.load(io.BytesIO(storage.read("x.npz")))["arr_0"].shape == (2, 8, 8, 3)
    assert Image.open(io.BytesIO(storage.read("step=7/grid.png"))).size == (2 * 66 + 2, 66 + 2)
    edited = ["edit", "colorize", model, grid, "--out", f"{s3}/edited/x.png", "--steps", 3]
    assert run(monkeypatch, *edited) == 0
    assert storage.read("edited/x.png").startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache"]


def test_what_a_source_on_s3_is_is_asked_once_before_torch_is_imported_and_once_to_read_it(
    model: Path, proxy: FaultProxy, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMSCALE_CACHE", str(tmp_path / "cache"))
    assert run(monkeypatch, "export", model, "--to", f"{s3}/hub") == 0
    proxy.log.clear()
    assert run(monkeypatch, "sample", f"{s3}/hub", "--samples", 1, "--out", tmp_path / "x.npz") == 0
    assert sum("model_index.json" in request for request, _ in proxy.log) == 2


def test_evaluations_and_plots_may_be_on_s3(
    model: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "made", count=12)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("CMSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("cmscale.evaluation.session.build_features", build_cheap_features)
    storage = open_storage(s3)
    for name, seed in (("samples #1.npz", 1), ("reference.npz", 2)):
        buffer = io.BytesIO()
        np.savez(buffer, arr_0=np.random.default_rng(seed).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8))
        storage.write(name, buffer.getvalue())
    measured = ["--reference", f"{s3}/reference.npz", "--features", "inception"]
    finished = ["evaluate", f"{s3}/samples #1.npz", *measured, "--out", f"{s3}/results/finished.json"]
    assert run(monkeypatch, *finished) == 0
    found = storage.read("results/finished.json")
    result = json.loads(found)
    assert result["samples"]["name"] == result["protocol"]["source"] == f"{s3}/samples #1.npz"
    assert result["reference"]["name"] == f"{s3}/reference.npz"
    assert run(monkeypatch, *finished) == 0
    assert "already; --force measures anew" in capsys.readouterr().err
    assert storage.read("results/finished.json") == found
    assert run(monkeypatch, "evaluate", f"{s3}/samples #1.npz", *measured) == 0  # its default place is here
    (here,) = work.iterdir()
    assert here.name.startswith("samples__1-evaluation-inception-n12-")
    here.unlink()
    drawn = ["evaluate", model, *measured, "--samples", 12, "--out", f"{s3}/results/drawn.json"]
    assert run(monkeypatch, *drawn) == 0
    assert json.loads(storage.read("results/drawn.json"))["num_samples"] == 12
    curve = ["consistency-error", model, "--data", data, "--samples", 2, "--batch-size", 2]
    assert run(monkeypatch, *curve, "--out", f"{s3}/curve.json", "--plot", f"{s3}/curve.png") == 0
    assert json.loads(storage.read("curve.json"))["num_samples"] == 2
    assert storage.read("curve.png").startswith(b"\x89PNG")
    assert list(work.iterdir()) == []
    for words, line in (
        (["evaluate", f"{s3}/pictures", *measured, "--out", "x.json"], "no run, checkpoint or exported weights"),
        (["evaluate", model, *measured[2:], "--reference", f"{s3}/pictures", "--out", "x.json"], "a folder of images"),
        (["search-times", model, *measured, "--out", f"{s3}/times.json"], "the result of a search"),
    ):
        capsys.readouterr()
        assert run(monkeypatch, *words) == 2
        said = capsys.readouterr().err
        assert line in said
        assert said.count("\n") == 1


def test_a_default_place_that_can_not_be_written_is_refused_before_anything_is_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cmscale.evaluation.session.build_features", build_cheap_features)
    for module in ("finished_samples.measure", "session.draw_block", "consistency_report.error_curve"):
        monkeypatch.setattr(f"cmscale.evaluation.{module}", lambda *_, **__: pytest.fail("began to work"))
    data = write_dataset(tmp_path / "made", count=12)
    trained = write_trained_run(tmp_path / "run", data=data, samples=12)
    trained.evaluations.write_text("a file where a folder is needed")
    monkeypatch.chdir("/proc")
    images = tmp_path / "made" / "images"
    for words in (
        ["evaluate", images, "--reference", images, "--features", "inception"],
        ["evaluate", trained.root, "--reference", images],
        ["search-times", trained.root, "--reference", images],
        ["consistency-error", trained.root, "--samples", 2],
    ):
        assert run(monkeypatch, *words) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_reference_statistics_are_written_to_s3(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "made", count=8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cmscale.evaluation.features.extractor.build_features", build_cheap_features)
    assert reference.main([str(data), "--out", f"{s3}/stats/r.npz"]) == 0
    assert f"{s3}/stats/r.npz: 8 images of 8 px" in capsys.readouterr().out
    assert np.load(io.BytesIO(open_storage(s3).read("stats/r.npz")))["arr_0"].shape == (8, 8, 8, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_place_that_can_not_be_written_is_refused_before_anything_is_drawn(
    model: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cmscale.source.source.build_unet", lambda *_, **__: pytest.fail("began to work"))
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "photo.png").write_bytes(b"")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    for words, line in (
        (["sample", model, "--out", "folder.npz"], "--out folder.npz: is a folder"),
        (["sample", model, "--out", "photo.png/x.npz"], "a file is where a folder is needed"),
        (["sample", model, "--out", "/proc/x.npz"], "--out /proc/x.npz: "),
        (["sample", model, "--out", "s3://nobody-has-this/x.npz"], "no bucket 'nobody-has-this'"),
        (["sample", model, "--out", "x.npz", "--grid", f"{s3}/"], "--grid"),
        (["edit", "colorize", model, "photo.png", "--out", "photo.png"], "would replace the image photo.png"),
        (["export", model, "--to", model], "is the source itself"),
        (["export", model, "--to", "photo.png", "--format", "diffusers"], "is a file; name a folder"),
        (["export", model, "--to", "run", "--format", "diffusers"], "is a run, a checkpoint or a data set"),
        (["evaluate", model, "--out", "result.txt"], "must end in .json"),
    ):
        assert run(monkeypatch, *words) == 2, words
        said = capsys.readouterr().err
        assert line in said
        assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.npz", "photo.png", "run"]
    assert list(open_storage(s3).list()) == []


def test_a_home_folder_is_expanded(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run(monkeypatch, "sample", model, "--samples", 1, "--out=~/deep/x.npz") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert (tmp_path / "home" / "deep" / "x.npz").is_file()


def test_a_source_that_is_none_is_refused_with_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["one/checkpoints/step-000000001/x", "one/samples/step-000000001.png", "x.npy", "x.png", "empty/.x"]
    for name in (*names, "export/README.md", "export/samples.png", "export/model.safetensors"):
        (tmp_path / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / name).touch()
    (tmp_path / "runs" / "one" / "config.yaml").touch()
    torch.save({}, tmp_path / "x.pt")
    for source, line in (
        ("runs", "is a folder of runs (one); give one of them"),
        ("runs/one/samples", f"is a folder in the run {tmp_path}/runs/one; give the run"),
        ("runs/one/checkpoints/step-000000001", "is no complete checkpoint"),
        ("runs/one", "the run has no complete checkpoint yet"),
        ("runs/export", "runs/export/model.safetensors: damaged, or not a safetensors file"),
        ("runs/x.npy", "numpy.savez(FILE, arr_0=...)"),
        ("runs/x.png", "finished samples are a folder of images"),
        ("someone/some-model", "download it first"),
        ("x.pt", "holds weights without a config; give --config"),
    ):
        assert run(monkeypatch, "sample", source, "--out", "y.npz") == 2
        said = capsys.readouterr().err
        assert line in said, source
        assert "has its own config" not in said
        assert said.count("\n") == 1


def test_a_name_counts_in_either_case_and_with_a_hash_behind_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(model, "MODEL.SAFETENSORS")
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    assert run(monkeypatch, "export", f"MODEL.SAFETENSORS#sha256={digest}", "--format", "openai", "--to", "X.PT") == 0
    config = read_safetensors(model)[1]["config"]
    Path("config.yaml").write_text(config)
    assert run(monkeypatch, "sample", "X.PT", "--config", "config.yaml", "--samples", 2, "--out", "X.NPZ") == 0
    monkeypatch.setattr("cmscale.evaluation.session.build_features", build_cheap_features)
    evaluate = ["evaluate", "X.NPZ", "--reference", "X.NPZ", "--features", "inception", "--out", "X.JSON"]
    assert run(monkeypatch, *evaluate) == 0
    capsys.readouterr()
    assert run(monkeypatch, "sample", f"X.PT#sha256={digest}", "--config", "config.yaml", "--out", "Y.NPZ") == 2
    assert "it is another file" in capsys.readouterr().err


def test_a_foreign_safetensors_file_that_has_a_config_of_its_own_kind_is_one_without_ours(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, card = read_safetensors(model)
    foreign = tmp_path / "foreign.safetensors"
    save_file(weights, foreign, metadata={"config": "{}", "modelspec.architecture": "x"})
    (tmp_path / "config.yaml").write_text(card["config"])
    to = tmp_path / "own.safetensors"
    assert run(monkeypatch, "import", foreign, "--to", to) == 2
    assert "give --config CONFIG" in capsys.readouterr().err
    assert run(monkeypatch, "import", foreign, "--config", tmp_path / "config.yaml", "--to", to) == 0
    assert read_safetensors(to)[1]["weights"] == "imported"
