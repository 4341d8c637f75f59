"""What `cmscale.load` promises to programs around it: settings of torch, other processes and copies change nothing."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import random_weights, small_config, small_model
from PIL import Image

import cmscale
from cmscale.interop import write_safetensors
from cmscale.library.surroundings import _default_dtype
from cmscale.source import load_source


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_config(small_model("as LSUN 256"), {"kind": "ct"})
    path = tmp_path_factory.mktemp("models") / "ct.safetensors"
    write_safetensors(path, random_weights(config.model), config=config, step=7, weights_name="ema_0.9")
    return path


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "another default device": lambda: torch.device("meta"),
    "another default dtype": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
}


@pytest.mark.parametrize("around", SURROUNDINGS)
def test_what_a_program_sets_in_torch_changes_no_result(
    around: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmscale.consistency.zero_shot.find_noise.__kwdefaults__", {"iterations": 2, "rate": 0.05})

    photograph = Image.effect_noise((32, 32), 50).convert("RGB")
    hole = np.eye(32) > 0

    def results(model: cmscale.Model) -> list[torch.Tensor]:
        return [
            model.sample(2, steps=2, tensors=True),
            model.inpaint(photograph, hole, steps=2, tensors=True),
            model.interpolate(photograph, photograph, count=2, tensors=True),
        ]

    expected = results(cmscale.load(file, device="cpu"))
    with SURROUNDINGS[around]():
        model = cmscale.load(file, device="cpu")
        inside = results(model)
    assert not any(result.is_inference() for result in inside)
    for found in (inside, results(model)):  # the network that was made inside serves outside
        assert all(map(torch.equal, found, expected))


def test_a_default_dtype_that_all_threads_share_stays_away_until_the_last_has_ended() -> None:
    first, second = _default_dtype(torch.float32), _default_dtype(torch.float32)
    with default_dtype(torch.bfloat16):
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.ones(1).dtype == torch.float32
        second.__exit__(None, None, None)


FILTERS = """
import sys, warnings, torch, sympy.utilities.exceptions
before = list(warnings.filters)
import cmscale
model = cmscale.load(sys.argv[1], device="cpu")
model.sample(1)[0].save(sys.argv[2])
model.colorize(sys.argv[2], steps=2)
from_torch = [each for each in warnings.filters if each not in before and "torch" in str(each)]
assert [each for each in warnings.filters if each not in from_torch] == before, warnings.filters
"""


def test_what_a_program_is_warned_of_stays_its_own_choice(file: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FILTERS, file, tmp_path / "a.png"], check=True, timeout=300)


def test_the_device_is_chosen_when_loading(file: Path) -> None:
    with pytest.raises(AttributeError):
        cmscale.load(file, device="cpu").device = "cuda"  # type: ignore[misc]


FORKED = """
import multiprocessing, sys, torch, cmscale
torch.set_num_threads(2)
model = cmscale.load(sys.argv[1], device="cpu")
expected = model.sample(1, tensors=True)

def compare(results):
    found = [each.sample(1, tensors=True) for each in (model, cmscale.load(sys.argv[1], device="cpu"))]
    results.put(all(torch.allclose(each, expected, atol=1e-5) for each in found))

fork = multiprocessing.get_context("fork")
results = fork.Queue()
child = fork.Process(target=compare, args=(results,), daemon=True)
child.start()
assert results.get(timeout=60)
"""


def test_a_forked_process_samples_too(file: Path) -> None:
    subprocess.run([sys.executable, "-c", FORKED, file], check=True, timeout=300)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_samples_the_same_and_holds_its_weights_alone(
    copied: Callable[[cmscale.Model], cmscale.Model], file: Path
) -> None:
    source = load_source(str(file))
    flat = torch.cat([tensor.flatten() for tensor in source.weights.values()])  # as a checkpoint is read
    parts = flat.split([tensor.numel() for tensor in source.weights.values()])
    names = source.weights.items()
    views = {name: part.view(tensor.shape) for (name, tensor), part in zip(names, parts, strict=True)}
    model = cmscale.Model(replace(source, weights=views), device=torch.device("cpu"))
    expected = model.sample(1, tensors=True)
    assert torch.equal(copied(model).sample(1, tensors=True), expected)
    assert len(pickle.dumps(model)) < 1.5 * flat.nbytes
    assert flat.nbytes < len(ForkingPickler.dumps(model)) < 1.5 * flat.nbytes  # to a spawned process: no shared memory
