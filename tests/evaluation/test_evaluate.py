"""`cmscale evaluate` and `search-times`: what they leave, what they refuse in one line, where they go on."""

import hashlib
import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_fixtures import build_cheap_features, write_checkpoint, write_dataset, write_trained_run
from PIL import Image
from safetensors.torch import load_file, save_file

from cmscale.cli import main as cli
from cmscale.config import read_config
from cmscale.consistency.grid import indexed_sigmas
from cmscale.engine.preemption import Preemption
from cmscale.errors import UserError
from cmscale.evaluation import finished_samples, progress, search_times
from cmscale.evaluation import session as measuring
from cmscale.evaluation.blocks import BlockStore
from cmscale.generation.draw import draw_batch
from cmscale.io.fetch import UNUSED_DAYS
from cmscale.runs.folder import RunDir
from cmscale.runs.manifests import CheckpointManifest, read_document
from cmscale.runs.results import EvaluationResult, TimeSearch


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    root = tmp_path_factory.mktemp("trained")
    return write_trained_run(root / "run", data=write_dataset(root))


@pytest.fixture
def run(trained: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run of one's own, measured by cheap features."""
    monkeypatch.setattr(measuring, "build_features", build_cheap_features)
    return RunDir(shutil.copytree(trained.root, tmp_path / "run"))


def cmscale(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["cmscale", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def result(path: Path) -> EvaluationResult:
    return read_document(EvaluationResult, path.read_bytes(), origin=path.name)


def test_every_weights_at_every_number_of_steps_gets_its_file_with_all_that_repeats_it(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--weights", "ema_0.9,ema_0.5,master", "--steps", "1,2", "--samples", 20, "--seeds", 2]
    assert cmscale(monkeypatch, "evaluate", run.root, *arguments, "--device", "cpu") == 0
    found = {(each.weights, each.nfe): each for each in map(result, run.evaluations.glob("*.json"))}
    assert set(found) == {(weights, nfe) for weights in ("ema_0.9", "ema_0.5", "master") for nfe in (1, 2)}
    assert len({each.fid.mean for each in found.values()}) == 6
    two = found["ema_0.9", 2]
    assert two.seeds == (0, 1)
    assert two.protocol["sampler"] == "multistep"
    assert two.protocol["sigmas"] == pytest.approx([80, 3.991], rel=1e-3)  # the authors' second time for CT
    assert two.protocol["data"]["preprocess"] == two.reference["preprocess"] == "adm"
    assert two.protocol["data"]["encoding"] == two.reference["encoding"] == "png"
    assert set(two.protocol) >= {
        "weights_sha256",
        "features_sha256",
        "clip",
        "quantisation",
        "torch",
        "cmscale",
        "device",
    }
    assert two.reference["count"] == 40
    assert two.warnings == (
        "IS (ADM) takes parts of 5,000 samples; all 20 are one smaller part",
        "every subset of KID holds all 20 samples, so kid_subset_std does not show how much KID varies",
        "no sFID: the reference or the feature network has no spatial features",
    )
    assert two.settings == {
        "inception_score": {"splits": 10, "shuffle_seed": 2020},
        "inception_score_adm": {"splits": 1, "split_size": 5000},
        "kid": {"subsets": 100, "subset_size": 20, "seed": 2020},
        "precision": {"k": 3, "reference_images": 40},
        "recall": {"k": 3, "reference_images": 40},
        "density": {"k": 5, "reference_images": 40},
        "coverage": {"k": 5, "reference_images": 40},
    }
    assert two.names["kid"] == "KID-EfficientNet"
    assert two.names["inception_score_adm"] == "IS-EfficientNet (ADM)"
    assert two.date is not None
    told = capsys.readouterr()
    assert [f"warning: {line}" for line in two.warnings] == told.err.splitlines()[:3]
    assert "KID-EfficientNet" in told.out
    assert "IS-EfficientNet (torch-fidelity)" in told.out
    assert cmscale(monkeypatch, "report", run.root) == 0
    assert "against the EMA" in run.report.read_text()


@pytest.mark.parametrize("has_run", [False, True])
def test_what_a_killed_evaluation_left_is_removed_after_a_month(
    has_run: bool, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMSCALE_CACHE", str(tmp_path / "cache"))
    model = run.root if has_run else tmp_path / "model.safetensors"
    measured = ["--device", "cpu", "--samples", 20, "--reference", read_config(run.config, resolved=True).data.path]
    if not has_run:
        assert cmscale(monkeypatch, "export", run.root, "--to", model) == 0
    with monkeypatch.context() as killed:
        killed.setattr(BlockStore, "read", lambda _: sys.exit(9))
        for steps in (1, 2):
            assert (
                cmscale(monkeypatch, "evaluate", model, *measured, "--steps", steps, "--out", tmp_path / "r.json") == 9
            )
    home = run.evaluation_progress if has_run else tmp_path / "cache" / "evaluations"
    left = sorted(path for path in home.iterdir() if path.is_dir())
    assert len(left) == 2
    month_ago = time.time() - 86_400 * (UNUSED_DAYS + 1)
    for path in (left[0], *left[0].iterdir(), left[1]):
        os.utime(path, (month_ago, month_ago))
    assert cmscale(monkeypatch, "evaluate", model, *measured, "--steps", 3, "--out", tmp_path / "r.json") == 0
    assert [path for path in left if path.exists()] == left[1:]


def test_the_same_evaluation_again_gives_the_same_numbers(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    values = []
    for name in ("a.json", "b.json"):
        out = run.root / name
        shutil.rmtree(run.evaluations, ignore_errors=True)  # the seed's metrics are kept there
        assert cmscale(monkeypatch, "evaluate", run.root, "--samples", 150, "--out", out, "--device", "cpu") == 0
        values.append(result(out).model_copy(update={"seconds": 0.0, "date": None}))
    assert values[0] == values[1]


def test_a_processor_counts_with_one_thread_however_many_a_lone_process_has(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process on two processors would have two threads, two have one each: other last digits."""
    threads = set()

    def noted(*arguments: object, **more: object) -> torch.Tensor:
        threads.add(torch.get_num_threads())
        return draw_batch(*arguments, **more)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(measuring, "draw_batch", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert cmscale(monkeypatch, "evaluate", run.root, "--samples", 20, "--device", "cpu") == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert threads == {1}


def test_what_another_version_or_protocol_measured_is_measured_again(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    commit, distributions = BlockStore.commit, measuring.measure_distributions
    monkeypatch.setattr(BlockStore, "commit", lambda *args: [made.append("block"), commit(*args)])
    monkeypatch.setattr(
        measuring, "measure_distributions", lambda *a, **k: made.append("set") or distributions(*a, **k)
    )

    def evaluated() -> list[str]:
        made.clear()
        assert cmscale(monkeypatch, "evaluate", run.root, "--samples", 20, "--device", "cpu") == 0
        return list(made)

    assert evaluated() == ["block", "set"]
    assert evaluated() == []
    monkeypatch.setattr(measuring, "PROTOCOL", measuring.PROTOCOL + 1)
    assert evaluated() == ["block", "set"]
    monkeypatch.setattr(measuring, "__version__", "next")
    assert evaluated() == ["block", "set"]
    assert evaluated() == []
    found = [result(path) for path in run.evaluations.glob("*.json")]
    versions = {(each.protocol["protocol"], each.protocol["cmscale"]) for each in found}
    assert len(found) == len(versions) == 3
    assert (measuring.PROTOCOL, "next") in versions


def test_another_preprocessing_of_the_reference_is_a_warning_in_the_result(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statistics = {"mu": np.zeros(16), "sigma": np.eye(16)}
    np.savez(tmp_path / "theirs.npz", **statistics, preprocess=np.array("edm"))
    out = tmp_path / "out.json"
    arguments = ["--reference", tmp_path / "theirs.npz", "--samples", 10, "--out", out, "--device", "cpu"]
    assert cmscale(monkeypatch, "evaluate", run.root, *arguments) == 0
    assert "reference and training data differ in preprocessing: edm against adm" in result(out).warnings


@pytest.mark.long
def test_finished_samples_are_measured_against_a_folder_with_real_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path, count=8)
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "images").iterdir())])
    np.savez(tmp_path / "samples.npz", arr_0=pixels)
    for samples in (tmp_path / "samples.npz", tmp_path / "images"):
        out = tmp_path / "out.json"
        arguments = ["--reference", tmp_path / "images", "--features", "efficientnet", "--out", out, "--device", "cpu"]
        assert cmscale(monkeypatch, "evaluate", samples, *arguments) == 0
        found = result(out)
        assert found.score_name == "FD-EfficientNet"
        assert found.fid.mean < 1e-6  # the same images
        assert found.metrics["precision"].mean == 1.0


def test_a_folder_of_jpegs_with_copies_is_measured_with_a_warning_in_the_result_and_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "build_features", build_cheap_features)
    images, out = tmp_path / "images", tmp_path / "out.json"
    (images / ".ipynb_checkpoints").mkdir(parents=True)
    for number in range(20):
        picture = Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8))
        picture.save(images / f"{number}.jpg")
        picture.save(images / ".ipynb_checkpoints" / f"{number}-checkpoint.jpg")
    np.savez(tmp_path / "reference.npz", mu=np.zeros(16), sigma=np.eye(16))
    arguments = ["--reference", tmp_path / "reference.npz", "--out", out, "--device", "cpu"]
    assert cmscale(monkeypatch, "evaluate", images, *arguments) == 0
    found, told = result(out), capsys.readouterr().err
    assert found.num_samples == 20
    for words in ("20 JPEG of 20 images are stored with loss", "left out: hidden files and folders: 1"):
        assert any(words in line for line in found.warnings)
        assert words in told


def test_bad_input_is_one_line_and_status_2(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "wide.npz", mu=np.zeros(17), sigma=np.eye(17))
    np.savez(tmp_path / "big.npz", mu=np.zeros(16), sigma=np.eye(16), image_size=np.array(256))
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((9, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "nan.npz", mu=np.full(16, np.nan), sigma=np.eye(16))
    np.savez(tmp_path / "few.npz", mu=np.zeros(16), sigma=np.eye(16), features_0=np.zeros((9, 17), np.float32))
    np.savez(tmp_path / "holes.npz", mu=np.zeros(16), sigma=np.eye(16), features_0=np.full((9, 16), np.nan))
    np.savez(tmp_path / "floats.npz", arr_0=np.full((9, 8, 8, 3), np.nan, np.float32))
    (tmp_path / "sizes").mkdir()
    for size in (8, 16):
        Image.new("RGB", (size, size)).save(tmp_path / "sizes" / f"{size:02}.png")
    data = read_config(run.config).data.path
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"PK other")
    out = ["--out", tmp_path / "out.json", "--device", "cpu"]
    cases = {
        "features of width 17, efficientnet gives 16": [run.root, "--reference", tmp_path / "wide.npz"],
        "the mean or the covariance holds NaN": [run.root, "--reference", tmp_path / "nan.npz"],
        "features_0 [9, 17], efficientnet gives width 16": [run.root, "--reference", tmp_path / "few.npz"],
        "features_0 holds NaN": [run.root, "--reference", tmp_path / "holes.npz"],
        "must be uint8 [N, H, W, 3], it is float32": [tmp_path / "floats.npz", "--reference", data],
        "images of different sizes": [tmp_path / "sizes", "--reference", data],
        "1 sample(s); it needs at least 2": [tmp_path / "one.npz", "--reference", data],
        "of 8 x 8 px (height x width), ": [tmp_path / "large.npz", "--reference", data],
        "of 256 x 256 px (height x width), the model has 8 x 8": [run.root, "--reference", tmp_path / "big.npz"],
        "as the URL": [
            run.root,
            "--features",
            "inception",
            "--inception-weights",
            f"{weights}#sha256={'0' * 64}",
        ],
        "no checkpoint of step 8": [run.root, "--checkpoint", 8],
        "leave out one of them": [run.root, "--steps", 2, "--sampling-times", "80,4"],
        "must descend": [run.root, "--sampling-times", "4,80"],
        "can't hold 2 evaluations": [run.root, "--steps", "1,2"],
        "whole numbers": [run.root, "--steps", "0"],
    }
    for said, arguments in cases.items():
        assert cmscale(monkeypatch, "evaluate", *arguments, *out) == 2, said
        told = capsys.readouterr().err
        assert said in told, told
        assert told.count("\n") == 1, told
    assert not (tmp_path / "out.json").exists()


def test_weights_of_features_that_are_not_what_their_name_or_kind_says_are_refused(
    trained: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    published.write_bytes(b"PK other")
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"PK other")
    for said, weights in (("expected 6726825d", published), ("not the weights of inception", damaged)):
        arguments = ["--features", "inception", "--inception-weights", weights, "--device", "cpu"]
        assert cmscale(monkeypatch, "evaluate", trained.root, *arguments) == 2
        told = capsys.readouterr().err
        assert said in told
        assert told.count("\n") == 1, told


def test_samples_that_are_not_finite_are_refused_in_a_line(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = read_config(run.config)
    write_checkpoint(run, config, step=9)
    path = next(run.checkpoint(9).glob("*.safetensors"))
    broken = {name: value.fill_(float("nan")) for name, value in load_file(path).items()}
    save_file(broken, path)
    assert cmscale(monkeypatch, "evaluate", run.root, "--samples", 8, "--device", "cpu") == 2
    assert "SHA-256 differs" in capsys.readouterr().err  # weights that do not match their hash
    _sign(run, step=9)
    assert cmscale(monkeypatch, "evaluate", run.root, "--samples", 8, "--device", "cpu") == 2
    told = capsys.readouterr().err
    assert "8 of 8 hold NaN or infinity" in told
    assert told.count("\n") == 1


def _sign(run: RunDir, *, step: int) -> None:
    """Makes a changed checkpoint's manifest true again."""
    manifest = run.checkpoint(step) / "manifest.json"
    document = json.loads(manifest.read_text())
    del document["sha256"]
    entry = document["parts"][0]["file"]
    data = (run.checkpoint(step) / entry["name"]).read_bytes()
    entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest.write_bytes(CheckpointManifest.model_validate(document).to_bytes())


@pytest.mark.parametrize(
    ("command", "meanwhile"),
    [
        ("evaluate", "session.draw_block"),
        ("evaluate", "session.measure_distributions"),
        ("evaluate", "session.measure_neighbours"),
        ("evaluate", "evaluate.make_result"),
        ("search-times", "session.draw_block"),
    ],
)
def test_a_run_that_is_moved_away_meanwhile_is_not_made_anew(
    command: str, meanwhile: str, run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _, name = meanwhile.rpartition(".")
    patched = importlib.import_module(f"cmscale.evaluation.{module}")
    work, moved = getattr(patched, name), run.root.with_name("moved")
    monkeypatch.setattr(progress, "AWAY_SECONDS", 0.0)

    def moving(*arguments: Any, **keywords: Any) -> Any:
        if run.root.exists():
            run.root.rename(moved)
        return work(*arguments, **keywords)

    monkeypatch.setattr(patched, name, moving)
    assert cmscale(monkeypatch, command, run.root, "--samples", 150, "--device", "cpu") == 2
    assert f"{run.root}: is gone: was it moved or removed" in capsys.readouterr().err.splitlines()[-1]
    assert not run.root.exists()
    monkeypatch.undo()


def test_a_run_that_is_away_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def back_at_the_third(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            RunDir(tmp_path).checkpoints.mkdir()

    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: sum(waits), sleep=back_at_the_third))
    progress.must_be_there(tmp_path)
    assert len(waits) == 3
    RunDir(tmp_path).checkpoints.rmdir()
    with pytest.raises(UserError, match="is gone"):
        progress.must_be_there(tmp_path)
    assert sum(waits) == 3 + progress.AWAY_SECONDS


def test_a_search_is_interrupted_goes_on_without_a_trial_made_twice_and_its_times_are_taken(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search = ["search-times", run.root, "--steps", 2, "--samples", 20, "--device", "cpu"]
    flags = iter([False] * 2 + [True] * 100)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(Preemption, "requested", lambda _: next(flags))
        assert cmscale(monkeypatch, *search) == 130
    assert "the same command continues" in capsys.readouterr().err
    (path,) = (run.evaluations / "times").iterdir()
    begun = read_document(TimeSearch, path.read_bytes(), origin="begun")
    assert (begun.complete, len(begun.trials)) == (False, 2)
    assert begun.trials[0].indices == (0, 67)  # the authors'
    assert cmscale(monkeypatch, *search) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    found = read_document(TimeSearch, path.read_bytes(), origin="found")
    assert found.trials[:2] == begun.trials
    assert len({trial.indices for trial in found.trials}) == len(found.trials)
    assert found.complete
    assert found.score == min(trial.score for trial in found.trials)
    assert found.times == tuple(indexed_sigmas(read_config(run.config).method, found.indices, last=150).tolist())

    before = path.read_bytes()
    assert cmscale(monkeypatch, *search) == 0  # nothing is left to measure
    assert path.read_bytes() == before
    assert cmscale(monkeypatch, "evaluate", run.root, "--sampling-times", path, "--samples", 20, "--device", "cpu") == 0
    (measured,) = (result(each) for each in run.evaluations.glob("*-nfe2-at-80-*.json"))
    assert (measured.times, measured.nfe) == (found.times, 2)
    assert measured.fid.mean == found.score
    out = tmp_path / "samples.npz"
    assert (
        cmscale(
            monkeypatch, "sample", run.root, "--sampling-times", path, "--samples", 2, "--out", out, "--device", "cpu"
        )
        == 0
    )


def test_a_search_in_a_diffusion_model_or_of_too_many_steps_is_refused(
    trained: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(read_config(trained.config).data.path)
    teacher = write_trained_run(tmp_path / "edm", data=data, kind="edm", method="sampler_steps: 3")
    assert cmscale(monkeypatch, "search-times", teacher.root) == 2
    assert cmscale(monkeypatch, "search-times", trained.root, "--steps", 151) == 2
    told = capsys.readouterr().err
    assert "a diffusion model has no multistep times" in told
    assert "--steps 151" in told
    assert told.count("\n") == 2


def test_a_teachers_evaluation_counts_heuns_calls(
    trained: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "build_features", build_cheap_features)
    data = Path(read_config(trained.config).data.path)
    teacher = write_trained_run(tmp_path / "edm", data=data, kind="edm", method="sampler_steps: 3")
    assert cmscale(monkeypatch, "evaluate", teacher.root, "--samples", 10, "--device", "cpu") == 0
    (found,) = map(result, teacher.evaluations.glob("step-000000007-ema_0.9-nfe5-*.json"))
    assert found.protocol["sampler"] == "heun"
    assert found.protocol["sigmas"][-1] == 0.0


def other_reference(folder: Path) -> Path:
    """A reference that is not the training data."""
    pixels = np.random.default_rng(5).integers(0, 256, size=(30, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "other.npz", arr_0=pixels)
    return folder / "other.npz"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.json")}


@pytest.mark.long
def test_no_evaluation_replaces_another_and_asked_again_it_is_returned(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every option that changes the numbers makes a file of its own; `report` and `runs` choose the largest."""
    run.evaluations.mkdir(exist_ok=True)
    (run.evaluations / "step-000000007-ema_0.9-nfe1.json").write_text(json.dumps(OLD))  # as 0.1.0 named it
    evaluate = ["evaluate", run.root, "--device", "cpu"]
    write_checkpoint(run, read_config(run.config), step=9)
    others: list[list[object]] = [
        [],
        ["--seeds", 2],
        ["--features", "inception"],
        ["--reference", other_reference(tmp_path)],
        ["--weights", "ema_0.5"],
        ["--checkpoint", 7],
        ["--steps", 2],
        ["--sampling-times", "80,3"],
        ["--sampling-times", "80,3.0000001"],
        ["--sampling-times", ",".join(str(80 - each / 2) for each in range(60))],  # more than fit a file's name
    ]
    options = [["--samples", 40], *(["--samples", 20, *other] for other in others)]
    for number, option in enumerate(options, start=2):
        before = contents(run.evaluations)
        assert cmscale(monkeypatch, *evaluate, *option) == 0, option
        after = contents(run.evaluations)
        assert len(after) == number, option
        assert before.items() < after.items(), option
    everything = contents(run.evaluations)
    monkeypatch.setattr(measuring, "draw_batch", None)  # nothing is drawn again
    for option in options:
        capsys.readouterr()
        assert cmscale(monkeypatch, *evaluate, *option) == 0, option
        told = capsys.readouterr()
        assert "--force measures anew" in told.err
        assert Path(told.out.splitlines()[-1]).name in everything
    assert contents(run.evaluations) == everything

    assert cmscale(monkeypatch, "runs", run.root.parent) == 0
    assert "step 9, 1 NFE, 40 samples against" in " ".join(capsys.readouterr().out.split())
    assert cmscale(monkeypatch, "report", run.root) == 0
    page = run.report.read_text()
    assert page.count("<table>") >= 2  # FD-EfficientNet over both networks' features
    assert "other.npz" in page


OLD = {
    "step": 7, "weights": "ema_0.9", "nfe": 1, "num_samples": 20, "seeds": [0], "features": "efficientnet",
    "score_name": "FD-EfficientNet", "reference": {"name": "old"}, "seconds": 1.0,
    "fid": {"mean": 1.0, "std": 0.0, "values": [1.0]},
}  # fmt: skip


@pytest.mark.long
def test_with_force_it_is_measured_anew_and_an_interrupted_one_goes_on_without_what_was_there_before(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = ["evaluate", run.root, "--samples", 300, "--seeds", 2, "--device", "cpu"]
    assert cmscale(monkeypatch, *evaluate) == 0
    (path,) = run.evaluations.glob("*.json")
    first = result(path)
    broken = json.loads(path.read_text())
    broken["fid"]["mean"] = -1.0  # a mark
    path.write_text(json.dumps(broken))
    stored = {each: {"fid": -2.0} for each in run.evaluation_progress.glob("*.json")}
    assert len(stored) == 2  # the metrics of each seed
    for each, metrics in stored.items():
        each.write_text(json.dumps(metrics))
    drawn: list[int] = []
    commit = BlockStore.commit

    def noted(store: BlockStore, block: range, features: dict[str, np.ndarray]) -> None:
        drawn.append(block.start)
        commit(store, block, features)

    monkeypatch.setattr(BlockStore, "commit", noted)
    flags = iter([False, False, False, False, True] + [True] * 9)  # in the second seed's second block
    with monkeypatch.context() as interrupted:
        interrupted.setattr(Preemption, "flagged", property(lambda _: next(flags)), raising=False)
        interrupted.setattr(Preemption, "requested", lambda _: len(drawn) > 3)
        assert cmscale(monkeypatch, *evaluate, "--force") == 130
    assert drawn == [0, 128, 256, 0]
    assert result(path).fid.mean == -1.0
    assert cmscale(monkeypatch, *evaluate, "--force") == 0
    assert drawn == [0, 128, 256, 0, 128, 256]  # it continued
    assert result(path).fid == first.fid
    assert all(json.loads(each.read_text())["fid"] > 0 for each in stored)  # what other requests would reuse
    assert not list(run.evaluation_progress.glob("anew-*"))
    assert cmscale(monkeypatch, *evaluate, "--force") == 0
    assert len(drawn) == 12  # once more from the start


def test_a_command_whose_blocks_another_one_finished_and_removed_takes_its_metrics(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finished_meanwhile(store: BlockStore) -> Iterator[None]:
        store.finish({"fid": 5.0})
        yield from read(store)

    read = BlockStore.read
    monkeypatch.setattr(BlockStore, "read", finished_meanwhile)
    assert cmscale(monkeypatch, "evaluate", run.root, "--samples", 20, "--device", "cpu") == 0
    (path,) = run.evaluations.glob("*.json")
    assert result(path).fid.mean == 5.0
    assert [each.suffix for each in run.evaluation_progress.iterdir()] == [".json"]


def test_a_file_that_holds_something_else_is_not_written_over(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    evaluate = ["evaluate", run.root, "--out", out, "--device", "cpu"]
    assert cmscale(monkeypatch, *evaluate, "--samples", 20) == 0
    before = out.read_bytes()
    capsys.readouterr()
    assert cmscale(monkeypatch, *evaluate, "--samples", 21) == 2
    told = capsys.readouterr().err
    assert "holds another evaluation" in told
    assert told.count("\n") == 1
    assert out.read_bytes() == before
    assert cmscale(monkeypatch, *evaluate, "--samples", 21, "--force") == 0
    assert result(out).num_samples == 21
    out.write_text('{"notes": "mine"}')
    for force in ([], ["--force"]):
        assert cmscale(monkeypatch, *evaluate, "--samples", 21, *force) == 2
    assert out.read_text() == '{"notes": "mine"}'


def test_finished_samples_are_known_by_their_pixels_and_their_result_says_what_they_are(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(6)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "samples.npz", arr_0=random.integers(0, 256, size=(12, 8, 8, 3), dtype=np.uint8))
    common = ["--reference", read_config(run.config).data.path, "--device", "cpu"]
    evaluate = ["evaluate", "one/samples.npz", *common]
    assert cmscale(monkeypatch, *evaluate) == 0
    told = capsys.readouterr()
    (path,) = tmp_path.glob("*.json")
    found, pixels = result(path), np.load(tmp_path / "one" / "samples.npz")["arr_0"]
    assert found.samples == {
        "name": "one/samples.npz",
        "sha256": hashlib.sha256(pixels.transpose(0, 3, 1, 2).tobytes()).hexdigest(),
        "image_size": [8, 8],
        "encoding": None,
    }
    assert [f"warning: {line}" for line in found.warnings] == told.err.splitlines()
    assert found.warnings[0].startswith("preprocessing and encoding of reference and samples could not be compared")
    assert found.warnings[1].startswith("12 samples for 16 feature dimensions: their covariance is singular")
    before = path.read_bytes()
    assert cmscale(monkeypatch, "evaluate", "two/samples.npz", *common) == 0  # another file of that name
    assert cmscale(monkeypatch, *evaluate, "--features", "efficientnet") == 0
    other = ["--reference", other_reference(tmp_path), "--device", "cpu"]
    assert cmscale(monkeypatch, "evaluate", "one/samples.npz", *other) == 0
    assert len(list(tmp_path.glob("*.json"))) == 4
    assert path.read_bytes() == before
    monkeypatch.setattr(finished_samples, "measure", None)
    capsys.readouterr()
    assert cmscale(monkeypatch, *evaluate) == 0
    assert capsys.readouterr().out.splitlines()[-1] == path.name


def test_sets_that_are_not_square_are_compared_with_their_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "build_features", build_cheap_features)
    random = np.random.default_rng(6)
    for name, sides in (("wide", (32, 48)), ("wider", (32, 64)), ("square", (32, 32))):
        pixels = random.integers(0, 256, size=(20, *sides, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=pixels)
        (tmp_path / name).mkdir()
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / name / f"{number:02}.png")
    out = tmp_path / "out.json"
    for samples, reference in (("wide", "wide.npz"), ("wide.npz", "wide")):
        where = [tmp_path / samples, "--reference", tmp_path / reference]
        assert cmscale(monkeypatch, "evaluate", *where, "--out", out, "--force", "--device", "cpu") == 0
        assert result(out).fid.mean < 1e-9 * 48
        assert result(out).samples["image_size"] == result(out).reference["image_size"] == [32, 48]
    capsys.readouterr()
    for samples, reference in (("square", "wider"), ("wider", "square"), ("wide", "square"), ("square", "wide")):
        where = [tmp_path / samples, "--reference", tmp_path / reference]
        assert cmscale(monkeypatch, "evaluate", *where, "--out", tmp_path / "no.json", "--device", "cpu") == 2
        assert "compare images of one size" in capsys.readouterr().err


def test_searches_that_differ_have_files_of_their_own(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search_times, "search", lambda score, *, steps, **_: score(tuple(range(steps))))

    def search(*more: str, **other: object) -> int:
        options = {"steps": 2, "samples": 20, "device": "cpu", **other}
        words = (word for name, value in options.items() for word in (f"--{name}", value))
        return cmscale(monkeypatch, "search-times", run.root, *words, *more)

    folder = run.evaluations / "times"
    others: tuple[dict[str, object], ...] = (
        {},
        {"samples": 21},
        {"seed": 1},
        {"features": "inception"},
        {"steps": 3},
        {"weights": "ema_0.5"},
        {"reference": other_reference(tmp_path)},
    )
    for number, other in enumerate(others, start=1):
        before = contents(folder)
        assert search(**other) == 0
        after = contents(folder)
        assert len(after) == number, other
        assert before.items() <= after.items()
    path = sorted(folder.iterdir())[0]
    out = tmp_path / "search.json"
    shutil.copy(path, out)
    capsys.readouterr()
    assert search(samples=22, out=out) == 2
    assert "holds another search" in capsys.readouterr().err
    assert out.read_bytes() == path.read_bytes()
    assert search("--force", samples=22, out=out) == 0
    assert read_document(TimeSearch, out.read_bytes(), origin="out").num_samples == 22
    assert not list(run.evaluation_progress.glob("anew-*"))
