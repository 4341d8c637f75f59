"""Tests that `auto` takes an attention that is right and fast, judged by running it, and says why."""

import logging
import time

import pytest
import torch
from networks import small_model
from torch import Tensor

from cmscale.config import Model
from cmscale.model import attention_choice
from cmscale.model.attention import attend, reference_attention
from cmscale.model.attention_choice import Shape, best, choose, largest_attention, quietly

CPU = torch.device("cpu")
SHAPE = Shape(length=16, heads=2, dim=32)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    time.sleep(0.003)
    return attend(query, key, value, kind="sdpa")


def faster(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend(query, key, value, kind="sdpa")


def slower(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    time.sleep(0.03)
    return attend(query, key, value, kind="sdpa")


def without_scale(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return reference_attention(query * query.shape[-1] ** 0.5, key, value)


def without_gradient_of_keys(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (reference_attention(query, key, value) + reference_attention(query, key.detach(), value)) / 2


def missing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\nmore lines")


@pytest.mark.parametrize(
    ("xformers", "taken", "words"),
    [
        (faster, "xformers", "16 positions, 2 heads of 32, float32, forward and backward"),
        (slower, "sdpa", "xformers "),
        (without_scale, "sdpa", "xformers is wrong (output differs by"),
        (without_gradient_of_keys, "sdpa", "xformers is wrong (key's gradient differs by 0.5)"),
        (missing, "sdpa", "xformers does not run (NotImplementedError: No operator found for"),
    ],
)
def test_what_is_right_and_faster_is_taken(xformers, taken: str, words: str) -> None:
    choice = best({"sdpa": sdpa, "xformers": xformers}, SHAPE, CPU, torch.float32)
    assert choice.kind == taken
    assert words in choice.why
    assert "\n" not in choice.why


def test_if_nothing_is_right_the_reference_is_taken() -> None:
    choice = best({"sdpa": without_scale, "xformers": missing}, SHAPE, CPU, torch.float32)
    assert choice.kind == "reference"
    assert "sdpa is wrong" in choice.why
    assert "xformers does not run" in choice.why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_tried_in_the_dtype_of_the_network_also_in_inference_mode(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        assert best({"sdpa": sdpa}, SHAPE, CPU, dtype).kind == "sdpa"


def test_the_shape_is_that_of_the_networks_largest_attention() -> None:
    keys = {"image_size": 256, "channels": 256, "channel_multipliers": [1, 1, 2, 2, 4, 4], "num_res_blocks": 2}
    lsun = Model.model_validate({**keys, "attention_resolutions": [32, 16, 8]})
    assert largest_attention(lsun) == Shape(length=1024, heads=8, dim=64)
    assert largest_attention(Model.model_validate(keys)) == Shape(length=64, heads=16, dim=64)


def test_a_choice_of_the_config_is_taken_as_it_is() -> None:
    assert choose(small_model(attention="reference"), CPU, torch.float32).kind == "reference"
    assert choose(small_model(attention="auto"), CPU, torch.float32).kind == "sdpa"


def test_the_warnings_of_an_import_are_not_shown(caplog, recwarn) -> None:
    def imported() -> str:
        logging.getLogger("xformers").warning("built for another torch")
        torch.tensor([1.0]).numpy()
        return "module"

    assert quietly(imported) == "module"
    assert not caplog.records
    logging.getLogger("xformers").warning("later")
    assert [record.message for record in caplog.records] == ["later"]


def test_without_xformers_sdpa_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "xformers_ops", lambda: None)
    choice = attention_choice.try_out(SHAPE, CPU, torch.float32)
    assert (choice.kind, choice.why) == ("sdpa", "xformers can't be imported")
