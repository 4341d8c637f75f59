"""sCD and sCT learn from crops of photographs at 16 px, with the real UNet and a teacher that is trained here.

The measure is a Fréchet distance over the 64 leading pixel directions of the data, of one-step samples from sigma 80.
"""

import copy
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
import torch
from small_training import follow
from torch import Tensor, nn

from cmscale.config import EDM, SCD, SCT, Method, Model, schedules
from cmscale.consistency.distance import l2
from cmscale.consistency.losses import build_loss
from cmscale.consistency.networks import Networks
from cmscale.consistency.sampler import sample
from cmscale.evaluation.metrics.frechet import frechet_distance
from cmscale.evaluation.statistics import Moments, Sums
from cmscale.model import denoiser_for
from cmscale.model.precondition import teacher_denoiser_for
from cmscale.model.weighting import build_weighted_unet
from cmscale.rng import SampleRandomness
from data_prep.demo import View, crops

BATCH, DIRECTIONS, SAMPLES = 32, 64, 2048
VIEWS = (
    View("chelsea", left=(210, 254), top=(135, 165), side=(220, 290)),
    View("astronaut", left=(196, 256), top=(95, 145), side=(150, 230)),
    View("coffee", left=(260, 340), top=(180, 220), side=(280, 390)),
    View("flower.jpg", left=(290, 370), top=(180, 220), side=(300, 420)),
)
NOISE = {"p_mean": -0.8, "p_std": 1.6}
MODEL = Model(
    image_size=16,
    channels=32,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(8,),
    head_channels=32,
)


@cache
def photographs() -> Tensor:
    """4,000 crops of four photographs, [4000, 3, 16, 16] in [-1, 1], shuffled."""
    found = [np.asarray(crop) for view in VIEWS for crop in crops(view, count=1000, side=16, seed=0)]
    pixels = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]


class LeadingDirections:
    """The Fréchet distance to a set of images over its principal components with the largest variances."""

    def __init__(self, images: Tensor) -> None:
        flat = images.flatten(1).double()
        self.mean = flat.mean(0)
        values, vectors = torch.linalg.eigh((flat - self.mean).T.cov())
        self.axes = vectors[:, values.argsort(descending=True)[:DIRECTIONS]]
        self.reference = self._moments(images)

    def _moments(self, images: Tensor) -> Moments:
        return Sums.of(((images.flatten(1).double() - self.mean) @ self.axes).numpy()).moments()

    def distance(self, images: Tensor) -> float:
        return frechet_distance(self._moments(images), self.reference)


def batches(images: Tensor, *, seed: int) -> Iterator[tuple[Tensor, SampleRandomness]]:
    """Endless batches in random order, with the randomness of their positions."""
    source = torch.Generator().manual_seed(seed)
    position = 0
    while True:
        chosen = torch.randint(len(images), (BATCH,), generator=source)
        yield images[chosen], SampleRandomness(seed, tuple(range(position, position + BATCH)), torch.device("cpu"))
        position += BATCH


def trained(
    method: Method,
    network: nn.Module,
    networks: Networks,
    images: Tensor,
    *,
    steps: int,
    rate: float,
    average: float,
    seen: Callable[[int, nn.Module], None] = lambda step, network: None,
) -> nn.Module:
    """Minimises the method's loss with Adam; returns the EMA of the weights."""
    loss, mean = build_loss(method, l2), copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate, betas=(0.9, 0.99))
    for step, (clean, random) in zip(range(steps), batches(images, seed=steps), strict=False):
        optimizer.zero_grad()
        loss(networks, clean, schedules.ScheduleValues(step, rate), random).mean().backward()
        optimizer.step()
        follow(mean, network, average)
        seen(step + 1, mean)
    return mean


@cache
def teacher_of(time_embedding: str, *, steps: int) -> nn.Module:
    method = EDM(kind="edm", time_embedding=time_embedding, **NOISE)  # pyright: ignore[reportArgumentType]
    network = build_weighted_unet(MODEL, seed=0)
    networks = Networks(denoiser_for(method, network))
    mean = trained(method, network, networks, photographs(), steps=steps, rate=1e-3, average=0.99)
    return mean.requires_grad_(False)


def student_of(kind: str, time_embedding: str, *, warmup: int = 100) -> SCD | SCT:
    keys = {"teacher": "t", "teacher_time_embedding": time_embedding, "tangent_warmup_steps": warmup, **NOISE}
    return SCD(kind="scd", **keys) if kind == "scd" else SCT(kind="sct", start="teacher", **keys)


def distances_over_training(
    method: SCD | SCT, teacher: nn.Module, images: Tensor, *, steps: int, every: int, rate: float = 3e-4
) -> list[float]:
    """The Fréchet distance of one-step samples before training and after every `every` steps."""
    scale = LeadingDirections(images)
    found: list[float] = []

    def measure(step: int, network: nn.Module) -> None:
        if step % every == 0:
            common = {"seed": 0, "indices": range(SAMPLES), "shape": (3, 16, 16), "steps": 1}
            found.append(scale.distance(sample(method, denoiser_for(method, network), **common)))

    network = copy.deepcopy(teacher).requires_grad_(True)
    measure(0, network)
    networks = Networks(denoiser_for(method, network), None, teacher_denoiser_for(method, teacher))
    trained(method, network, networks, images, steps=steps, rate=rate, average=0.98, seen=measure)
    return found


@pytest.mark.parametrize("kind", ["scd", "sct"])
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_400_steps_bring_samples_within_45_percent_of_the_distance_at_the_start(kind: str):
    """It is 85 at the start, where f is a denoiser; that of the teacher's samples by Heun's solver is about 5."""
    teacher = teacher_of("angle", steps=1000)
    found = distances_over_training(student_of(kind, "angle"), teacher, photographs(), steps=400, every=400)
    assert found[-1] < 0.45 * found[0], found
