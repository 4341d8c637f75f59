"""What a worker would refuse is refused before a job is queued, and leaves no run behind."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_fixtures import write_trained_run
from launch_fixtures import CONFIG, dataset

from cmscale.commands.ending import guarded
from cmscale.config import dump_config, parse_config, read_config
from cmscale.distributed.compat import cpu_has_bf16
from cmscale.errors import UserError
from cmscale.interop import write_openai, write_safetensors
from cmscale.io import published
from cmscale.model.unet import build_unet
from cmscale.training import inputs
from launchers import evaluate, submit
from launchers.clusters import CLUSTERS
from launchers.clusters.local import LocalMachine
from launchers.try_inputs import try_inputs


@pytest.fixture(autouse=True)
def queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    jobs: list[object] = []

    class Recorder(LocalMachine):
        def run(self, job, *, wait: bool) -> int:
            jobs.append(job)
            return 0

    monkeypatch.setitem(CLUSTERS, "local", Recorder())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    dataset(tmp_path / "data")
    return jobs


def submitted(*arguments: object) -> int:
    return guarded(submit.main, ["--cluster", "local", "--name", "new", *map(str, arguments)])


EVALUATING = ("--evaluate-every", "10", "checkpoint.every_steps=10")
STUDENT = CONFIG.replace("kind: edm", "{{kind: cd, distance: l2, teacher: '{teacher}'{more}}}").replace(
    "method:\n  {", "method: {"
)


def write_student(teacher: object, *, more: str = "") -> Path:
    file = Path("student.yaml")
    file.write_text(STUDENT.format(data="data", teacher=teacher, more=more))
    return file


@pytest.mark.long
def test_a_teacher_without_a_config_is_tried_by_the_workers_own_code(queued, capsys, tmp_path: Path) -> None:
    other = parse_config(CONFIG.format(data="data"), ["model.channel_multipliers=[1,2]"])
    write_openai(tmp_path / "other.pt", build_unet(other.model).state_dict(), model=other.model)
    assert submitted(write_student("other.pt")) == 2
    said = capsys.readouterr().err
    assert "other.pt" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    assert not queued


@pytest.mark.slow
def test_lpips_weights_are_tried(queued, capsys, tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    config = tmp_path / "ct.yaml"
    config.write_text(CONFIG.format(data="data").replace("kind: edm", "kind: ct\n  lpips_weights: vgg.pth"))
    assert submitted(config) == 2
    said = capsys.readouterr().err
    assert "vgg.pth" in said
    assert said.count("\n") == 1
    assert not queued
    assert not (tmp_path / "runs").exists()


def test_a_precision_that_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(CONFIG.format(data="data"), ["engine.precision=fp16"])
    monkeypatch.setattr("cmscale.engine.settings.cpu_has_fp16", lambda: False)
    with pytest.raises(UserError, match=r"engine\.precision: fp16 does not run on this machine's CPU"):
        inputs.try_inputs(config, on_this_cpu=True)
    inputs.try_inputs(config, on_this_cpu=False)


@pytest.mark.parametrize(
    ("precision", "has_bf16", "is_said"), [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)]
)
def test_bf16_on_a_processor_without_it_is_cautioned_against(
    precision: str, has_bf16: bool, is_said: bool, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    config = parse_config(CONFIG.format(data="data"), [f"engine.precision={precision}"])
    monkeypatch.setattr("cmscale.engine.settings.cpu_has_bf16", lambda: has_bf16)
    monkeypatch.setattr("sys.stdin", io.StringIO(dump_config(config)))
    inputs.main(["cpu"])
    assert ("caution: engine.precision: bf16 is emulated" in capsys.readouterr().out) == is_said


def test_the_launcher_passes_a_caution_of_its_process_on(capsys) -> None:
    try_inputs(parse_config(CONFIG.format(data="data"), ["engine.precision=bf16"]), on_this_cpu=True)
    said = capsys.readouterr().err
    assert said.startswith("caution: engine.precision: bf16 is emulated") == (not cpu_has_bf16())
    assert said.count("\n") == (not cpu_has_bf16())


def test_of_the_output_of_that_process_the_cautions_alone_are_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\ncat >/dev/null\necho a line of a library\necho caution: slow\n")
    script.chmod(0o755)
    monkeypatch.setattr("launchers.try_inputs.sys.executable", str(script))
    try_inputs(parse_config(CONFIG.format(data="data"), ["engine.precision=bf16"]), on_this_cpu=True)
    assert capsys.readouterr() == ("", "caution: slow\n")


def test_a_machine_without_torch_says_that_nothing_was_tried(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    config = parse_config(CONFIG.format(data="data"), ["engine.precision=fp16"])
    monkeypatch.setattr(sys, "executable", "false")
    monkeypatch.setattr("launchers.try_inputs.sys.executable", "/bin/false")
    try_inputs(config, on_this_cpu=True)
    assert "were not tried here: exit status 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (", teacher_weights: ema_0.7", "method.teacher_weights ema_0.7: no such weights; choose from"),
        (", sigma_max: 90", "asks it about noise of 90"),
    ],
)
def test_an_exported_teacher_and_a_run_are_checked_by_their_configs(more: str, words: str, capsys) -> None:
    run = write_trained_run(Path("teacher"), data=Path("data"), kind="edm", method="sigma_data: 0.5")
    model = read_config(run.config).model
    state = build_unet(model).state_dict()
    write_safetensors("teacher.safetensors", state, config=read_config(run.config), step=7, weights_name="ema_0.9")
    for teacher in ("teacher", "teacher.safetensors")[: 1 if "weights" in more else 2]:
        student = write_student(teacher, more=more)
        assert submitted(student, *[f"model.{key}={value}" for key, value in overrides_of(model).items()]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.init_from=ct.yaml"], "train.init_from: .*ct.yaml: no SOURCE; a config holds no weights"),
        (["train.init_from=data"], "train.init_from: .*data: is a prepared data set, not a model"),
        (["train.init_from=other"], "train.init_from: .*other: finished samples or other files, no model"),
        (["method.distance=lpips", "method.lpips_weights=ct.yaml"], "lpips_weights: .*ct.yaml: is no file of weights"),
        ([*EVALUATING, "evaluate.features_weights=ct.yaml"], "features_weights: .*ct.yaml: is no file of weights"),
        ([*EVALUATING, "evaluate.reference=ct.yaml"], "evaluate.reference: .*ct.yaml: no reference; give a data set"),
        (EVALUATING, "data.path: .*data: 10 images are too many to measure in every evaluation"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_its_name(
    arguments: list[str], words: str, queued, capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmscale.runs.named_files.MAX_REFERENCE_IMAGES", 9)
    (tmp_path / "ct.yaml").write_text(CONFIG.format(data="data").replace("kind: edm", "kind: ct"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("no model")
    assert submitted("ct.yaml", *arguments) == 2
    said = capsys.readouterr().err
    assert re.search(words, said), said
    assert said.count("\n") == 1
    assert not queued
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["method.distance=lpips"], "VGG16 for LPIPS: not in .*can't be downloaded from .*no internet.*lpips_weights"),
        (EVALUATING, "Inception for FID: not in .*no internet.*or set evaluate.inception_weights to a copy"),
        ([*EVALUATING, "evaluate.features=dinov2"], "features dinov2: their weights are not downloaded; name a copy"),
    ],
)
def test_weights_that_nodes_could_not_fetch_are_missed_before_the_queue(
    arguments: list[str], words: str, queued, capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no internet")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(published, "_download", refuse)
    config = CONFIG.format(data="data").replace("kind: edm", "kind: ct\n  distance: l2")
    (tmp_path / "ct.yaml").write_text(config)
    assert submitted("ct.yaml", *arguments) == 2
    said = capsys.readouterr()
    assert re.search(words, said.err), said.err
    assert said.out == ""  # what is refused has no plan
    assert not (tmp_path / "runs").exists()
    assert not queued
    run = write_trained_run(Path("trained"), data=Path("data"))
    features = [each.partition(".")[2].replace("=", " ").split() for each in arguments if each.startswith("evaluate")]
    asked = ["--features", features[0][1]] if features else ["--features", "inception"]
    assert guarded(evaluate.main, ["--cluster", "local", str(run.root), *asked]) == 2
    said = capsys.readouterr()
    assert "features dinov2" in said.err if features else "Inception for FID: not in" in said.err
    assert said.out == ""
    assert not queued


def overrides_of(model) -> dict[str, object]:
    names = (
        "image_size",
        "channels",
        "channel_multipliers",
        "num_res_blocks",
        "attention_resolutions",
        "head_channels",
    )
    values = {name: getattr(model, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--weights", "ema_0.7"], "--weights ema_0.7: no such weights; choose from ema_0.9, "),
        (["run", "--checkpoint", "8"], "no checkpoint of step 8; choose from 7"),
        (["run", "--sampling-times", "absent.json"], "absent.json: no such file"),
        (["exported.safetensors", "--sampling-times", "500"], "500 is outside the model's times"),
        (["exported.safetensors", "--weights", "master"], "--weights: has no effect on an exported file"),
        (["run", "--reference", "damaged.npz"], "damaged.npz: damaged, or not an .npz"),
        (["run", "--reference", "other.npz"], "other.npz: holds x; give statistics or images"),
        (["run", "--features-weights", "page.pth"], "page.pth: is a web page, not weights"),
        (["run", "--features-weights", "empty.pth"], "empty.pth: is empty"),
    ],
)
def test_an_evaluation_that_would_be_refused_is_not_queued(arguments, words: str, queued, capsys) -> None:
    run = write_trained_run(Path("run"), data=Path("data"))
    config = read_config(run.config)
    state = build_unet(config.model).state_dict()
    write_safetensors("exported.safetensors", state, config=config, step=7, weights_name="ema_0.9")
    Path("damaged.npz").write_bytes(b"PK\x03\x04")
    Path("page.pth").write_text("<html>not found</html>")
    Path("empty.pth").touch()
    np.savez("other.npz", x=np.zeros(3))
    assert guarded(evaluate.main, ["--cluster", "local", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not queued
    assert not Path("runs").exists()
