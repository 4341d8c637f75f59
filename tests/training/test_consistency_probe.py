"""The consistency probe: along a teacher's trajectories where the method follows one, straight where it does not."""

import contextlib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from data_fixtures import encoded_images, write_lmdb
from networks import random_weights
from torch import nn

from cmscale.config import parse_config
from cmscale.consistency.consistency_curve import error_curve
from cmscale.data.first_images import first_images
from cmscale.distributed.world import World
from cmscale.model.precondition import denoiser_for
from cmscale.model.unet import UNet
from cmscale.training.consistency_probe import PROBE_IMAGES, Probe
from data_prep.prepare import main as prepare

TEXT = """
method: METHOD
model: {image_size: 8, channels: 32, channel_multipliers: [1], num_res_blocks: 1, head_channels: 32}
data: {path: DATA}
optimizer: {learning_rate: 1e-3}
ema: {rates: [0.9]}
train: {total_steps: 10, global_batch_size: 8, micro_batch_size: 2, consistency_error_every: 5}
"""


class ShownNetwork:
    """The one thing that the probe takes from an engine."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    @contextlib.contextmanager
    def showing(self, name: str) -> Iterator[nn.Module]:
        assert name == "ema_0.9"
        yield self._network


class Teacher:
    """A denoiser that shrinks its input, and counts its calls."""

    calls = 0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)


@pytest.mark.parametrize(
    ("method", "follows"), [("{kind: cd, teacher: unread, distance: l2}", True), ("{kind: ct, distance: l2}", False)]
)
@pytest.mark.long
def test_the_probe_follows_the_teacher_of_the_method(method: str, follows: bool, tmp_path: Path) -> None:
    source = write_lmdb(tmp_path / "photos_lmdb", encoded_images(PROBE_IMAGES))
    data = tmp_path / "set"
    assert prepare(["--source", f"lsun:{source}", "--format", "mds", "--image-size", "8", "--out", str(data)]) == 0
    config = parse_config(TEXT.replace("METHOD", method).replace("DATA", str(data)))
    network = UNet(config.model)
    network.load_state_dict(random_weights(config.model))
    network.eval()
    teacher = Teacher()
    engine = types.SimpleNamespace(showing=ShownNetwork(network).showing)
    probe = Probe(config, World())
    assert probe.after(4, engine, teacher) is None  # pyright: ignore[reportArgumentType]
    assert teacher.calls == 0
    measured = probe.after(5, engine, teacher)  # pyright: ignore[reportArgumentType]
    assert (teacher.calls > 0) is follows

    def expected(along: Teacher | None) -> float:
        clean = first_images(str(data), count=PROBE_IMAGES, size=8)
        denoise = denoiser_for(config.method, network)
        numbers = range(PROBE_IMAGES)
        device = torch.device("cpu")
        return error_curve(config.method, denoise, clean, indices=numbers, teacher=along, device=device).mean

    assert measured == pytest.approx(expected(Teacher() if follows else None), rel=1e-6)
    assert measured != pytest.approx(expected(None if follows else Teacher()), rel=1e-2)
