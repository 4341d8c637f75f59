"""Tests of class-conditional networks: which classes the network gets, and one-line errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from networks import random_weights, small_config, small_model

from cmscale.generation.draw import SampleRequest, class_labels
from cmscale.interop import write_safetensors
from cmscale.source import load_source

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = small_model("as ImageNet 64")
    path = tmp_path_factory.mktemp("conditional") / "model.safetensors"
    write_safetensors(path, random_weights(model), config=small_config(model), step=1, weights_name="ema_0.9")
    return path


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = small_model()
    path = tmp_path_factory.mktemp("unconditional") / "model.safetensors"
    weights = {name: 10 * value if name == "out.2.weight" else value for name, value in random_weights(model).items()}
    write_safetensors(path, weights, config=small_config(model), step=1, weights_name="ema_0.9")
    return path


def test_samples_are_those_of_their_classes_in_turn(conditional, tmp_path, monkeypatch):
    noise = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "noise.npy", noise.numpy())
    arguments = ["--samples", 3, "--noise", tmp_path / "noise.npy", "--raw", "--classes", "1,4", "--batch-size", 2]
    assert run(monkeypatch, "sample", conditional, *arguments, "--out", tmp_path / "samples.npz") == 0
    denoise = load_source(str(conditional)).denoiser(CPU)
    expected = denoise(80 * noise, torch.full((3,), 80.0), labels=torch.tensor([1, 4, 1]))
    found = torch.from_numpy(np.load(tmp_path / "samples.npz")["arr_0"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    others = denoise(80 * noise, torch.full((3,), 80.0), labels=torch.tensor([2, 2, 2]))
    assert (found - others).abs().flatten(1).max(1).values.min() > 1e-3


def test_random_classes_depend_on_seed_and_index_alone_and_are_all_drawn(conditional):
    source = load_source(str(conditional))
    request = SampleRequest(num=200, seed=3, classes="random")
    whole = class_labels(source, request, indices=range(200))
    assert whole is not None
    part = class_labels(source, request, indices=range(50, 60))
    assert part is not None
    assert torch.equal(part, whole[50:60])
    assert set(whole.tolist()) == set(range(5))


@pytest.mark.parametrize(
    ("which", "classes", "message"),
    [
        ("conditional", [], "is class-conditional; give --classes random, or numbers from 0 to 4"),
        ("conditional", ["--classes", "1,7"], "--classes: 7 is not a class of"),
        ("conditional", ["--classes", "cats"], "got 'cats'; write random, or whole numbers such as 1,2"),
        ("unconditional", ["--classes", "1"], "--classes: has no effect on an unconditional model"),
    ],
)
def test_a_mistake_is_one_line(which, classes, message, request, tmp_path, monkeypatch, capsys):
    model = request.getfixturevalue(which)
    assert run(monkeypatch, "sample", model, "--samples", 2, *classes, "--out", tmp_path / "s.npz") == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_editing_a_conditional_model_is_one_line(conditional, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "edit", "interpolate", conditional, "--out", tmp_path / "e.png") == 2
    assert "is class-conditional; give an unconditional model" in capsys.readouterr().err


def test_unclipped_samples_differ_where_estimates_leave_the_range(unconditional, tmp_path, monkeypatch):
    for name, more in (("clipped", []), ("unclipped", ["--no-clip"])):
        where = tmp_path / f"{name}.npz"
        assert run(monkeypatch, "sample", unconditional, "--samples", 2, "--steps", 3, *more, "--out", where) == 0
    clipped, unclipped = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("clipped", "unclipped"))
    assert (clipped != unclipped).any()
