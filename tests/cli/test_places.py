"""Where outputs go and inputs come from: local paths and S3 alike; what can't be there is refused before any work."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from evaluation_fixtures import TEXT, build_cheap_features, write_dataset
from PIL import Image

from cmscale.config import parse_config
from cmscale.interop import write_safetensors
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
    arguments = ["--samples", 2, "--noise", f"{s3}/noise.npy", "--out", f"{s3}/x.npz", "--grid", f"{s3}/grid.png"]
    assert run(monkeypatch, "sample", f"{s3}/model.safetensors", *arguments) == 0
    assert np.load(io.BytesIO(storage.read("x.npz")))["arr_0"].shape == (2, 8, 8, 3)
    assert Image.open(io.BytesIO(storage.read("grid.png"))).size == (2 * 66 + 2, 66 + 2)
    edited = ["edit", "colorize", model, f"{s3}/grid.png", "--out", f"{s3}/edited/x.png", "--steps", 3]
    assert run(monkeypatch, *edited) == 0
    assert storage.read("edited/x.png").startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache"]


def test_reference_statistics_are_written_to_s3(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "made", count=8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reference, "build_features", build_cheap_features)
    assert reference.main([str(data), "--out", f"{s3}/stats/r.npz"]) == 0
    assert f"{s3}/stats/r.npz: 8 images of 8 px" in capsys.readouterr().out
    assert np.load(io.BytesIO(open_storage(s3).read("stats/r.npz")))["arr_0"].shape == (8, 8, 8, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_place_that_can_not_be_written_is_refused_before_anything_is_drawn(
    model: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cmscale.source.build_unet", lambda *_, **__: pytest.fail("began to work"))
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "photo.png").write_bytes(b"")
    for words, line in (
        (["sample", model, "--out", "folder.npz"], "--out folder.npz: is a folder"),
        (["sample", model, "--out", "photo.png/x.npz"], "a file is where a folder is needed"),
        (["sample", model, "--out", "/proc/x.npz"], "--out /proc/x.npz: "),
        (["sample", model, "--out", "s3://nobody-has-this/x.npz"], "no bucket 'nobody-has-this'"),
        (["sample", model, "--out", "x.npz", "--grid", f"{s3}/"], "--grid"),
        (["edit", "colorize", model, "photo.png", "--out", "photo.png"], "would replace the image photo.png"),
        (["export", model, "--to", model], "is the source itself"),
        (["export", model, "--to", "photo.png", "--format", "diffusers"], "is a file; a diffusers export is a folder"),
        (["evaluate", model, "--out", "result.txt"], "must end in .json"),
    ):
        assert run(monkeypatch, *words) == 2, words
        said = capsys.readouterr().err
        assert line in said
        assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.npz", "photo.png"]
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
    for name in ("one/checkpoints/step-000000001/x", "one/samples/step-000000001.png", "x.npy", "x.png", "empty/.x"):
        (tmp_path / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / name).touch()
    (tmp_path / "runs" / "one" / "config.yaml").touch()
    torch.save({}, tmp_path / "x.pt")
    for source, line in (
        ("runs", "is a folder of runs (one); give one of them"),
        ("runs/one/samples", f"is a folder in the run {tmp_path}/runs/one; give the run"),
        ("runs/one/checkpoints/step-000000001", "is no complete checkpoint"),
        ("runs/one", "the run has no complete checkpoint yet"),
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
