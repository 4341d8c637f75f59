"""The launcher of evaluations: whose config and folder it takes, what it asks for, what it refuses."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from launch_fixtures import CONFIG, dataset

from cmscale.commands.ending import guarded
from cmscale.config.request_fields import options_of
from cmscale.config.requests import EvaluateRequest
from launchers import evaluate
from launchers.clusters import CLUSTERS
from launchers.clusters.local import LocalMachine
from launchers.jobs import JobSpec


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What would have been launched: (request, run, placement)."""
    launched: list[tuple] = []

    class Recorder(LocalMachine):
        def run(self, job: JobSpec, *, wait: bool) -> int:
            assert job.worker == "evaluate"
            launched.append((job.arguments[0], job.run, job.placement))
            return 0

    monkeypatch.setitem(CLUSTERS, "local", Recorder())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(CONFIG.format(data="data"))
    checkpoint = run / "checkpoints" / "step-000000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (tmp_path / "weights.pt").write_text("")
    dataset(tmp_path / "data")
    return launched


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--cluster", "local", *arguments])
    return guarded(evaluate.main)


@pytest.mark.parametrize("source", ["runs/one", "runs/one/checkpoints/step-000000003"])
def test_a_run_is_evaluated_in_its_own_folder_with_its_own_config(
    source: str, asked: list, monkeypatch, tmp_path: Path
):
    step = ["--checkpoint", "3,latest"] if source == "runs/one" else []
    assert run(monkeypatch, source, "--samples", "100", "--steps", "1,2", "--seeds", "3", *step) == 0
    ((request, where, placement),) = asked
    assert where.root == tmp_path / "runs" / "one"
    assert request["source"] == str(tmp_path / source)
    assert (request["samples"], request["steps"], request["seeds"]) == (100, "1,2", 3)
    assert (request.get("checkpoints"), request["device"]) == ("3,latest" if step else None, "cpu")
    assert placement.restart.signal_seconds == 5


def test_foreign_weights_get_a_folder_of_their_own_and_the_given_config(asked: list, monkeypatch, tmp_path: Path):
    assert run(monkeypatch, "weights.pt", "--name", "theirs", "--config", "runs/one/config.yaml", "train.seed=4") == 0
    ((request, where, _),) = asked
    assert where.root == tmp_path / "runs" / "theirs"
    assert (request["config"], request["overrides"]) == (
        str(tmp_path / "runs/one/config.yaml"),
        ["train.seed=4"],
    )


def test_the_jobs_argument_is_the_request(asked: list, monkeypatch):
    assert run(monkeypatch, "runs/one") == 0
    assert EvaluateRequest.model_validate(asked[0][0]).model_dump(mode="json", exclude_unset=True) == asked[0][0]


def test_every_option_of_the_request_reaches_the_job(asked: list, monkeypatch, tmp_path: Path):
    (tmp_path / "there").write_bytes(b"PK\x03\x04")
    values = {"steps": "3", "times": "80,2", "weights": "master", "checkpoints": "3", "features": "efficientnet"}
    values |= {"keep_samples": "kept", "format": "tar"}
    for option in options_of(EvaluateRequest):
        if not option.flag or option.name in ("config", "device"):
            continue
        path = "there.json" if option.output else "there"
        value = values.get(option.name, path if option.is_path else "3")
        words = [option.flag] if option.kind is bool else [option.flag, value]
        beside = {"dinov2_weights": ["--features", "dinov2"], "format": ["--keep-samples", "kept"]}.get(option.name, [])
        assert run(monkeypatch, "runs/one", *words, *beside, "--device", "cpu") == 0, option.name
        expected = str(tmp_path / value) if option.is_path and option.name != "times" else value
        expected = "True" if option.kind is bool else expected
        assert str(asked.pop()[0][option.name]) == expected, option.name


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("{reference: gone.npz}", "evaluate.reference: gone.npz: no such file or folder"),
        ("{inception_weights: gone.pth}", "evaluate.inception_weights: gone.pth: no such file or folder"),
        ("{features: dinov2, dinov2_weights: gone.pth}", "evaluate.dinov2_weights: gone.pth: no such file or folder"),
        ("{features: efficientnet, features_weights: gone.pth}", "evaluate.features_weights: gone.pth: no such file"),
    ],
)
def test_what_the_runs_config_names_must_be_there_before_a_job_is_queued(
    section: str, words: str, asked: list, monkeypatch, capsys, tmp_path: Path
):
    with (tmp_path / "runs" / "one" / "config.yaml").open("a") as file:
        file.write(f"evaluate: {section}\n")
    assert run(monkeypatch, "runs/one") == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert asked == []
    np.savez(tmp_path / "gone.npz", mu=np.zeros(2), sigma=np.eye(2))
    (tmp_path / "gone.pth").write_bytes(b"PK\x03\x04")
    assert run(monkeypatch, "runs/one") == 0


def test_the_training_data_must_be_there_where_nothing_else_is_named(asked: list, monkeypatch, capsys, tmp_path: Path):
    shutil.rmtree(tmp_path / "data")
    assert run(monkeypatch, "runs/one") == 2
    assert "data.path: data: no such folder" in capsys.readouterr().err
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(2), sigma=np.eye(2))
    assert run(monkeypatch, "runs/one", "--reference", "theirs.npz") == 0


def test_weights_that_the_features_do_not_need_are_not_asked_for(asked: list, monkeypatch, tmp_path: Path):
    with (tmp_path / "runs" / "one" / "config.yaml").open("a") as file:
        file.write("evaluate: {inception_weights: gone.pth}\n")
    assert run(monkeypatch, "runs/one", "--features", "efficientnet") == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: no run, checkpoint or exported weights there; no such file or folder"),
        (["runs/one", "--name", "two"], "--name: has no effect on a run in --runs-dir"),
        (["runs/one", "train.seed=1"], "train.seed=1: has no effect on the config that SOURCE has"),
        (["weights.pt"], "weights.pt: holds weights without a config; give --config"),
        (["runs/one", "--steps", "1,2", "--out", "r.json"], "one file can't hold 2 evaluations"),
        (["runs/one", "more"], "more: one argument too many"),
        (["runs/one", "--weights", ""], "--weights: got an empty text"),
        (["weights.pt", "train.seed=1"], "train.seed=1: has no effect on the config that SOURCE has"),
        (["runs/one", "--reference", "gone.npz"], "--reference: "),
        (["runs/one", "--device", "cuda"], "no CUDA device"),
    ],
)
def test_mistake_is_one_line_with_status_2(arguments: list[str], words: str, asked: list, monkeypatch, capsys):
    assert run(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert asked == []
