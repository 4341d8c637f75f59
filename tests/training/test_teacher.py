"""A teacher and its student agree, so that the student follows the teacher's own denoiser exactly, or are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_fixtures import write_trained_run
from launch_fixtures import dataset
from networks import random_weights

from cmscale.config import Config, parse_config
from cmscale.consistency.grid import karras_grid
from cmscale.errors import UserError
from cmscale.evaluation.consistency_report import measure_consistency_error
from cmscale.interop import write_openai, write_safetensors
from cmscale.model.precondition import denoiser_for, teacher_denoiser_for
from cmscale.model.unet import build_unet
from cmscale.runs.folder import RunDir
from cmscale.source import Source, load_source, load_teacher
from launchers.checks import check_inputs

TEXT = """
method: {{kind: {kind}, teacher: "{teacher}"{more}}}
model: {{image_size: 8, channels: 32, channel_multipliers: [1], num_res_blocks: 1, head_channels: 32}}
data: {{path: "{data}"}}
optimizer: {{learning_rate: 1e-3}}
train: {{total_steps: 3, global_batch_size: 8, micro_batch_size: 2}}
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return dataset(tmp_path / "data")


@pytest.fixture
def teacher(tmp_path: Path, data: Path) -> RunDir:
    """A diffusion model trained with sigma_data 0.25 for noise from 0.01 to 40."""
    method = "sigma_data: 0.25, sigma_min: 0.01, sigma_max: 40"
    return write_trained_run(tmp_path / "teacher", data=data, kind="edm", method=method)


def student(teacher: object, data: Path, *, kind: str = "cd", **method: Any) -> Config:
    agreeing = {"sigma_data": 0.25, "sigma_min": 0.01, "sigma_max": 40}
    more = "".join(f", {key}: {value}" for key, value in {**agreeing, **method}.items() if value is not None)
    return parse_config(TEXT.format(kind=kind, teacher=teacher, data=data, more=more))


def without_teacher(kind: str, data: Path, *overrides: str) -> Config:
    text = TEXT.format(kind=kind, teacher="", data=data, more="").replace(', teacher: ""', "")
    return parse_config(text, list(overrides))


def error_of_target(config: Config, its_own: Source, weights: dict[str, torch.Tensor]) -> float:
    """The largest difference, over the student's grid, of the teacher that the loss follows from the teacher itself."""
    network = build_unet(config.model)
    network.load_state_dict(weights)
    network.eval()
    followed, own = teacher_denoiser_for(config.method, network), its_own.denoiser(torch.device("cpu"))
    clean = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    worst = 0.0
    with torch.no_grad():
        for sigma in karras_grid(config.method, 19):
            x, time = clean * sigma.float(), sigma.float().reshape(1)
            worst = max(worst, float((followed(x, time) - own(x, time)).abs().max() / own(x, time).abs().max()))
    return worst


@pytest.mark.parametrize("kind", ["cd", "scd"])
def test_a_student_that_agrees_follows_exactly_what_its_teacher_is(kind: str, teacher: RunDir, data: Path) -> None:
    config = student(teacher.root, data, kind=kind)
    weights, own = load_teacher(config), load_source(str(teacher.root))
    assert error_of_target(config, own, weights) < (1e-6 if kind == "cd" else 1e-5)  # TrigFlow rounds otherwise
    wrong = student(teacher.root, data, kind=kind, sigma_data=0.5)
    assert error_of_target(wrong, own, weights) > 0.1  # what would be followed if it were not refused
    check_inputs(config)


def test_pds_first_teacher_is_the_student_itself_with_the_teachers_weights(teacher: RunDir, data: Path) -> None:
    config = student(teacher.root, data, kind="pd")
    network = build_unet(config.model)
    network.load_state_dict(load_teacher(config))
    network.eval()
    x, time = torch.randn(1, 3, 8, 8), torch.tensor([3.0])
    with torch.no_grad():
        own = load_source(str(teacher.root)).denoiser(torch.device("cpu"))(x, time)
        assert torch.equal(denoiser_for(config.method, network)(x, time), own)


REFUSED = {
    "sigma_data 0.25, this config has 0.5; set method.sigma_data=0.25": {"sigma_data": 0.5},
    "method.sigma_max 40, the student asks it about noise of 80": {"sigma_max": 80},
    "method.sigma_min 0.01, the student asks it about noise of 0.002": {"sigma_min": 0.002},
}


@pytest.mark.parametrize("kind", ["cd", "pd", "scd", "sct"])
@pytest.mark.parametrize(("words", "method"), REFUSED.items())
def test_a_student_that_differs_is_refused_by_every_method_before_and_in_the_job(
    kind: str, words: str, method: dict[str, float], teacher: RunDir, data: Path
) -> None:
    more = {"start": "teacher"} if kind == "sct" else {}
    config = student(teacher.root, data, kind=kind, **method, **more)
    for check in (check_inputs, load_teacher):
        with pytest.raises(UserError) as refused:
            check(config)
        assert str(refused.value).startswith(f"method.teacher: {teacher.root}")
        assert words in str(refused.value)


def test_noise_within_the_teachers_range_is_right(teacher: RunDir, data: Path) -> None:
    config = student(teacher.root, data, sigma_min=0.1, sigma_max=10)
    assert error_of_target(config, load_source(str(teacher.root)), load_teacher(config)) < 1e-6


def test_an_openai_file_means_the_sigma_data_and_range_of_its_code(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "teacher.pt"
    defaults: dict[str, Any] = {"sigma_data": None, "sigma_min": None, "sigma_max": None}
    right = student(path, data, **defaults)
    write_openai(path, random_weights(right.model), model=right.model)
    load_teacher(right)
    check_inputs(right)
    for words, method in {
        "sigma_data 0.5, this config has 0.25": {"sigma_data": 0.25},
        "sigma_max 80, the student asks it about noise of 100": {"sigma_max": 100},
        "holds unnamed weights": {"teacher_weights": "ema_0.9"},
    }.items():
        for check in (check_inputs, load_teacher):
            with pytest.raises(UserError) as refused:
                check(student(path, data, **{**defaults, **method}))
            assert words in str(refused.value)


def test_weights_that_an_exported_teacher_does_not_hold_are_refused(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    defaults: dict[str, Any] = {"sigma_data": None, "sigma_min": None, "sigma_max": None}
    config = without_teacher("edm", data)
    write_safetensors(path, random_weights(config.model), config=config, step=1, weights_name="master")
    load_teacher(student(path, data, **defaults, teacher_weights="master"))
    with pytest.raises(UserError, match=r"ema_0\.9"):
        load_teacher(student(path, data, **defaults, teacher_weights="ema_0.9"))
    with pytest.raises(UserError, match=r"sigma_data 0\.5, this config has 0\.25"):
        load_teacher(student(path, data))


def test_the_consistency_error_follows_a_named_teacher_with_its_own_sigma_data_and_within_its_range(
    teacher: RunDir, data: Path, tmp_path: Path
) -> None:
    config = parse_config(
        TEXT.format(kind="ct", teacher="", data=data, more=", distance: l2").replace(', teacher: ""', "")
    )
    path = tmp_path / "ct.safetensors"
    write_safetensors(path, random_weights(config.model), config=config, step=1, weights_name="ema_0.9")
    common: dict[str, Any] = {"data": str(data), "num": 1, "seed": 0, "out": tmp_path / "e.json", "plot": None}
    with pytest.raises(UserError, match=r"--teacher: .*sigma_min 0.01, the student asks it about noise of 0.002"):
        measure_consistency_error(
            load_source(str(path)), teacher=str(teacher.root), batch_size=1, device=torch.device("cpu"), **common
        )


def test_another_set_for_the_consistency_error_is_checked_before_the_job(tmp_path: Path, data: Path) -> None:
    probing = ["train.consistency_error_every=1", f"train.consistency_error_data={tmp_path / 'none'}"]
    with pytest.raises(UserError, match=r"train.consistency_error_data: .*none: no such folder"):
        check_inputs(without_teacher("ct", data, *probing))
    check_inputs(without_teacher("ct", data, probing[0], f"train.consistency_error_data={data}"))
