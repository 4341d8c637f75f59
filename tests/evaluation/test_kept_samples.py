"""`--keep-samples` keeps what was measured, and the result names it."""

import json
import shutil
from pathlib import Path

import pytest
from commands import run
from evaluation_fixtures import build_cheap_features, write_dataset, write_trained_run

from cmscale.evaluation.sample_files import open_images


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return write_trained_run(folder / "run", data=write_dataset(folder, count=12), samples=140).root


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmscale.evaluation.session.build_features", build_cheap_features)
    monkeypatch.chdir(tmp_path)


def evaluated(monkeypatch: pytest.MonkeyPatch, *words: object) -> dict:
    assert run(monkeypatch, "evaluate", *words, "--out", "r.json", "--force") == 0
    return json.loads(Path("r.json").read_text())


@pytest.mark.parametrize("place", ["kept.npz", "kept"])
def test_kept_samples_give_the_numbers_of_their_evaluation(place: str, trained: Path, monkeypatch) -> None:
    images = trained.parent / "images"
    drawn = evaluated(monkeypatch, trained, "--reference", images, "--keep-samples", place)
    measured = evaluated(monkeypatch, place, "--reference", images, "--features", "efficientnet")
    assert drawn["kept_samples"] == [{"seed": 0, "place": place, "sha256": measured["samples"]["sha256"]}]
    assert measured["num_samples"] == 140
    assert drawn["fid"] == measured["fid"]
    assert drawn["recall"] == measured["recall"]


@pytest.mark.long
def test_several_sets_get_folders_and_a_set_that_is_gone_is_drawn_again(trained: Path, monkeypatch, capsys) -> None:
    words = ["evaluate", trained, "--seeds", 2, "--steps", "1,2", "--keep-samples", "sets", "--format", "tar"]
    assert run(monkeypatch, *words) == 0
    folders = sorted(path.name for path in Path("sets").iterdir())
    assert folders == [f"step-000000007-ema_0.9-nfe{nfe}-seed{seed}" for nfe in (1, 2) for seed in (0, 1)]
    results = [json.loads(Path(line).read_text()) for line in capsys.readouterr().out.splitlines() if ".json" in line]
    assert len(results) == 2
    hashes = {each["sha256"] for result in results for each in result["kept_samples"]}
    assert len(hashes) == 4
    shutil.rmtree("sets/" + folders[3])
    assert run(monkeypatch, *words) == 0
    said = capsys.readouterr()
    assert said.err.count("already; --force measures anew") == 1
    assert open_images("sets/" + folders[3]).count == 140
    assert [json.loads(Path(line).read_text())["fid"] for line in said.out.splitlines() if ".json" in line] == [
        result["fid"] for result in results
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--keep-samples", "x.npz", "--seeds", "2"], "--keep-samples x.npz: one file can't hold 2 sets of samples"),
        (["--keep-samples", "x.npz", "--format", "png"], "--format png: --keep-samples x.npz is a file"),
        (
            ["--keep-samples", "r.bin", "--format", "png"],
            "--keep-samples r.bin: is a file; name a folder, or a file that ends in .npz",
        ),
        (["--keep-samples", "full"], "full: is not empty"),
    ],
)
def test_a_place_that_can_not_keep_them_is_refused(words: list[str], line: str, trained: Path, monkeypatch, capsys):
    Path("r.bin").touch()
    Path("full").mkdir()
    Path("full/file").touch()
    assert run(monkeypatch, "evaluate", trained, *words) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
    assert not Path("x.npz.parts").exists()
