"""Tests that an exported safetensors file holds everything that is needed to use it."""

import random
import shutil

import pytest
import torch
from networks import random_weights, small_config, small_model
from safetensors import safe_open
from safetensors.torch import save_file

from cmscale.config import parse_config
from cmscale.errors import UserError
from cmscale.interop import (
    read_diffusers,
    read_openai,
    read_safetensors,
    write_diffusers,
    write_openai,
    write_safetensors,
)

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
        metadata = {name: value for name, value in file.metadata().items() if name != "sha256"}
    save_file({"out.2.bias": torch.zeros(3)}, tmp_path / "x", metadata=metadata)
    with pytest.raises(UserError, match=r"missing: time_embed\.0\.weight"):
        read_safetensors(tmp_path / "x")


def _with_another_bit(path, at: int):
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)


def test_a_changed_bit_of_an_exported_file_is_refused(tmp_path):
    what = {"config": small_config(MODEL), "step": 70, "weights_name": "master"}
    write_safetensors(tmp_path / "x.safetensors", random_weights(MODEL), **what)
    write_diffusers(tmp_path / "x", random_weights(MODEL), **what)
    write_openai(tmp_path / "x.pt", random_weights(MODEL), model=MODEL)
    where = random.Random(0)
    for name, read in (
        ("x.safetensors", read_safetensors),
        ("x/unet/diffusion_pytorch_model.safetensors", lambda _: read_diffusers(tmp_path / "x")),
        ("x.pt", lambda path: read_openai(path, MODEL)),
    ):
        path, whole = tmp_path / name, tmp_path / "whole"
        shutil.copy(path, whole)
        read(path)
        size = path.stat().st_size
        for at in [where.randrange(size // 10, size * 9 // 10) for _ in range(3)]:  # among the tensors
            _with_another_bit(path, at)
            with pytest.raises(UserError, match="damaged"):
                read(path)
            shutil.copy(whole, path)
        if name.endswith(".safetensors"):
            _with_another_bit(path, whole.read_bytes().index(b"sigma_data: 0.") + len("sigma_data: 0."))
            with pytest.raises(UserError, match="damaged"):
                read(path)


def test_a_file_of_an_older_release_holds_no_hash_and_is_read(tmp_path):
    write_safetensors(tmp_path / "x", random_weights(MODEL), config=small_config(MODEL), step=1, weights_name="master")
    with safe_open(tmp_path / "x", framework="pt") as file:
        metadata = file.metadata()
    del metadata["sha256"]
    save_file(random_weights(MODEL, seed=1), tmp_path / "x", metadata=metadata)
    assert torch.equal(read_safetensors(tmp_path / "x")[0]["out.2.bias"], random_weights(MODEL, seed=1)["out.2.bias"])
