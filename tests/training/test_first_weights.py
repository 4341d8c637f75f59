"""Every method can start from the weights that `train.init_from` names, in every format; others are refused."""

from pathlib import Path

import pytest
import torch
from evaluation_fixtures import write_trained_run
from launch_fixtures import dataset
from networks import random_weights

from cmscale.config import Config, parse_config
from cmscale.errors import UserError
from cmscale.interop import write_diffusers, write_openai, write_safetensors
from cmscale.interop.diffusers_folder import UNET_WEIGHTS
from cmscale.source import load_source
from cmscale.training.assemble import first_weights, network_builder
from launchers.checks import check_inputs

TEXT = """
method: {{{method}}}
model: {{image_size: 8, channels: 32, channel_multipliers: [1], num_res_blocks: 1, head_channels: 32}}
data: {{path: "{data}"}}
optimizer: {{learning_rate: 1e-3}}
train: {{total_steps: 3, global_batch_size: 8, micro_batch_size: 2}}
"""
METHODS = {
    "edm": "kind: edm",
    "cd": "kind: cd, teacher: TEACHER",
    "ct": "kind: ct",
    "ict": "kind: ict",
    "scd": "kind: scd, teacher: TEACHER",
    "ect": "kind: ect",
    "pd": "kind: pd",
    "sct": "kind: sct, start: teacher",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, and a CT run of which everything else is a copy in another format."""
    folder = tmp_path_factory.mktemp("first")
    dataset(folder / "data")
    run = write_trained_run(folder / "run", data=folder / "data")
    source = load_source(str(run.root))
    write_openai(folder / "weights.pt", source.weights, model=source.config.model)
    described = {"config": source.config, "step": 7, "weights_name": "ema_0.9"}
    write_safetensors(folder / "weights.safetensors", source.weights, **described)
    write_diffusers(folder / "pipeline", source.weights, **described)
    return folder


def config(folder: Path, method: str, *overrides: str) -> Config:
    text = TEXT.format(method=METHODS.get(method, method), data=folder / "data")
    return parse_config(text.replace("TEACHER", str(folder / "run")), list(overrides))


ORIGINS = ["run", "run/checkpoints/step-000000007", "weights.pt", "weights.safetensors", "pipeline"]


@pytest.mark.parametrize("origin", ORIGINS)
def test_the_first_weights_are_those_of_the_source_in_every_format(folder: Path, origin: str) -> None:
    expected = load_source(str(folder / "run")).weights
    given = config(folder, "ct", f"train.init_from={folder / origin}")
    check_inputs(given)
    found = first_weights(given, teacher=None)
    assert found is not None
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_folder_of_diffusers_without_our_config_is_read_as_this_configs_network(folder: Path, tmp_path: Path) -> None:
    source = load_source(str(folder / "run"))
    described = {"config": source.config, "step": 7, "weights_name": "ema_0.9"}
    write_diffusers(tmp_path / "foreign", source.weights, **described)
    from safetensors.torch import load_file, save_file

    save_file(load_file(tmp_path / "foreign" / UNET_WEIGHTS), tmp_path / "foreign" / UNET_WEIGHTS)
    found = first_weights(config(folder, "ct", f"train.init_from={tmp_path / 'foreign'}"), teacher=None)
    assert found is not None
    assert all(torch.equal(found[name], source.weights[name]) for name in source.weights)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_from_them_even_where_it_has_a_teacher(folder: Path, method: str) -> None:
    given = config(folder, method, f"train.init_from={folder / 'run'}", "train.init_weights=ema_0.5")
    teacher = random_weights(given.model, seed=9)
    found = first_weights(given, teacher=teacher)
    assert found is not None
    expected = load_source(str(folder / "run"), weights="ema_0.5").weights
    network = network_builder(given)()
    network.load_state_dict({**network.state_dict(), **found})
    assert all(torch.equal(network.state_dict()[name], expected[name]) for name in expected)
    alone = METHODS[method] if "TEACHER" in METHODS[method] or not given.method.needs_first_weights else None
    without = config(folder, alone or f"{METHODS[method]}, teacher: x")
    assert first_weights(without, teacher=teacher) is teacher
    assert without.fingerprint() == given.fingerprint()  # a resumed run reads them no more


def test_a_method_that_starts_with_trained_weights_is_refused_without_any(folder: Path) -> None:
    for method in ("ect", "pd", "sct"):
        with pytest.raises(UserError, match=rf"method.teacher: method.kind {method} starts with trained weights; set"):
            config(folder, method)


def test_what_can_be_no_first_weights_is_refused_before_and_in_the_job(folder: Path) -> None:
    run = f"train.init_from={folder / 'run'}"
    for words, given in {
        "no such file or folder": ["train.init_from=/nowhere/at/all"],
        "is another network (model.channels: 32 -> 64)": [run, "model.channels=64"],
        "sigma_data 0.5, this config has 0.25": [run, "method.sigma_data=0.25"],
        "weights.pt was trained with method.sigma_data 0.5": [
            f"train.init_from={folder / 'weights.pt'}",
            "method.sigma_data=0.25",
        ],
        "holds unnamed weights": [f"train.init_from={folder / 'weights.pt'}", "train.init_weights=ema_0.9"],
    }.items():
        with pytest.raises(UserError) as refused:
            check_inputs(config(folder, "ct", *given))
        assert words in str(refused.value)
        if "no such" not in words:
            with pytest.raises(UserError) as refused:
                first_weights(config(folder, "ct", *given), teacher=None)
            assert words in str(refused.value)
    exported = [f"train.init_from={folder / 'weights.safetensors'}", "train.init_weights=master"]
    with pytest.raises(UserError, match=r"ema_0\.9"):
        first_weights(config(folder, "ct", *exported), teacher=None)
    for words, method, given in (
        ("starts with the weights of method.teacher", "kind: pd, teacher: x", [run]),
        ("train.init_from is not", "ct", ["train.init_weights=ema_0.9"]),
    ):
        with pytest.raises(UserError, match=words):
            config(folder, method, *given)
