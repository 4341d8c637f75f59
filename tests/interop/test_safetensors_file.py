"""Tests that an exported safetensors file holds everything that is needed to use it."""

import pytest
import torch
from networks import random_weights, small_config, small_model
from safetensors import safe_open
from safetensors.torch import save_file

from cmscale.config import parse_config
from cmscale.errors import UserError
from cmscale.interop import read_safetensors, write_safetensors

MODEL = small_model("as ImageNet 64")


def test_weights_config_step_and_name_come_back_as_written(tmp_path):
    config, weights = small_config(MODEL), random_weights(MODEL)
    write_safetensors(tmp_path / "x.safetensors", weights, config=config, step=70, weights_name="ema_0.999943")
    found, card = read_safetensors(tmp_path / "x.safetensors")
    assert list(found) == list(weights)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert parse_config(card["config"]) == config
    assert (card["step"], card["weights"]) == ("70", "ema_0.999943")


def test_a_file_on_s3_is_written_and_read(s3):
    weights = random_weights(MODEL)
    write_safetensors(f"{s3}/x.safetensors", weights, config=small_config(MODEL), step=1, weights_name="master")
    found, _ = read_safetensors(f"{s3}/x.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_the_header_says_what_it_is_to_any_reader(tmp_path):
    write_safetensors(tmp_path / "x", random_weights(MODEL), config=small_config(MODEL), step=1, weights_name="master")
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_files_without_config_or_damaged_are_one_line(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="holds no config, as cmscale did not write it"):
        read_safetensors(tmp_path / "foreign.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match="damaged, or not a safetensors file"):
        read_safetensors(tmp_path / "damaged.safetensors")
    with pytest.raises(UserError, match="no such file"):
        read_safetensors(tmp_path / "none.safetensors")


def test_weights_that_are_not_its_configs_are_refused(tmp_path):
    config = small_config(MODEL)
    write_safetensors(tmp_path / "x", random_weights(MODEL), config=config, step=1, weights_name="master")
    with safe_open(tmp_path / "x", framework="pt") as file:
        metadata = file.metadata()
    save_file({"out.2.bias": torch.zeros(3)}, tmp_path / "x", metadata=metadata)
    with pytest.raises(UserError, match=r"missing: time_embed\.0\.weight"):
        read_safetensors(tmp_path / "x")
