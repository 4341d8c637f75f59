"""What enters the network for a sample depends on (seed, index) to the bit, what leaves it up to its rounding."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import random_weights, small_config, small_model

from cmscale.generation.draw import SampleRequest, draw_batch, draw_samples
from cmscale.io.image_tensors import to_uint8
from cmscale.source import Source

CPU = torch.device("cpu")
BATCHES = (1, 3, 8)
ROUNDING = {"ct": 2e-5, "edm": 1.5e-4}  # a solver's x begins at 80 z, up to 320: four roundings of float32
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "one step": ("as LSUN 256", {"kind": "ct"}, {"steps": 1}),
    "two steps": ("sampling by convolution", {"kind": "ct"}, {"steps": 2}),
    "classes": ("as ImageNet 64", {"kind": "ct"}, {"steps": 2, "classes": "random"}),
    "Heun": ("as LSUN 256", {"kind": "edm"}, {"steps": 3}),
    "ancestral": ("older qkv", {"kind": "edm"}, {"steps": 3, "sampler": "ancestral"}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Source, SampleRequest]:
    variant, method, options = CASES[request.param]
    config = small_config(small_model(variant), method)
    source = Source("here", config, random_weights(config.model), "master", 0)
    return source, SampleRequest(num=8, seed=4, **options)


def elementwise(x: torch.Tensor, sigma: torch.Tensor, *, labels: torch.Tensor | None = None) -> torch.Tensor:
    """A denoiser whose arithmetic is the same in a batch of any size."""
    shift = torch.zeros(len(x)) if labels is None else labels / 10
    return x / (1 + sigma.float().view(-1, 1, 1, 1)) + shift.view(-1, 1, 1, 1)


def test_what_enters_the_network_depends_on_seed_and_index_to_the_bit(case: tuple[Source, SampleRequest]) -> None:
    """Start noise, the noise of every step and the class: in batches of any size and order, and for any number."""
    source, request = case

    def drawn(*indices: int, num: int = 8) -> torch.Tensor:
        return draw_batch(source, elementwise, replace(request, num=num), indices=indices, device=CPU)

    whole = drawn(*range(8))
    for size in BATCHES:
        parts = [drawn(*range(at, min(at + size, 8))) for at in range(0, 8, size)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(drawn(7, 2, num=9), whole[[7, 2]])
    other = draw_batch(source, elementwise, replace(request, seed=5), indices=[0], device=CPU)
    assert not torch.equal(other, whole[:1])


def test_what_leaves_it_differs_between_batches_by_rounding_alone(case: tuple[Source, SampleRequest]) -> None:
    """At most one of 255 levels; batches of one size give the same bits."""
    source, request = case
    drawn = {size: draw_samples(source, replace(request, batch_size=size), device=CPU) for size in BATCHES}
    again = draw_samples(source, replace(request, batch_size=3), device=CPU)
    assert torch.equal(again, drawn[3])
    assert 0.1 < drawn[8].abs().max() < 1.001
    for size, images in drawn.items():
        torch.testing.assert_close(
            images, drawn[8], rtol=0, atol=ROUNDING[source.config.method.kind], msg=f"batches of {size}"
        )
        levels = to_uint8(images).int() - to_uint8(drawn[8]).int()
        assert levels.abs().max() <= 1
