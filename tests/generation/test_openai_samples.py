"""Compares `cmscale sample FILE.pt --noise` on a state dict in OpenAI's format with float64 numpy."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from networks import NumpyNetwork, random_weights, relative, small_config, small_model

from cmscale.config import Model, dump_config
from cmscale.interop import write_openai
from cmscale.rng import normal_like_samples

SD, EPS, T = 0.5, 0.002, 80.0


def shaped(value: np.ndarray) -> np.ndarray:
    return value[:, None, None, None]


class Original:
    """The released sampling code's formulas around the network's definition, in float64."""

    def __init__(self, model: Model, weights: dict[str, torch.Tensor], *, consistency: bool) -> None:
        self.network = NumpyNetwork(model, weights)
        self.consistency = consistency
        self.evaluations = 0

    def __call__(self, x: np.ndarray, sigma: float) -> np.ndarray:
        self.evaluations += 1
        low = EPS if self.consistency else 0.0
        skip = SD**2 / ((sigma - low) ** 2 + SD**2)
        out = SD * (sigma - low) / np.sqrt(sigma**2 + SD**2)
        # the network's time is float32, as in the released code
        c_noise = np.float32(250.0) * np.log(np.full(len(x), sigma, np.float32))
        return out * self.network(x / np.sqrt(sigma**2 + SD**2), c_noise.astype(np.float64)) + skip * x

    def slope(self, x: np.ndarray, sigma: float) -> np.ndarray:
        return (x - self(x, sigma)) / sigma


def karras(steps: int) -> list[float]:
    low, high = EPS ** (1 / 7), T ** (1 / 7)
    return [T, *((high + i / (steps - 1) * (low - high)) ** 7 for i in range(1, steps - 1)), EPS, 0.0]


def ode(original: Original, sampler: str, noise: np.ndarray, draws: list[np.ndarray], steps: int) -> np.ndarray:
    times = karras(steps)
    x = T * noise
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        d = original.slope(x, t)
        if sampler == "heun" and s > 0:
            x = x + (s - t) * (d + original.slope(x + (s - t) * d, s)) / 2
        elif sampler == "dpm2":
            middle = ((t ** (1 / 3) + s ** (1 / 3)) / 2) ** 3
            x = x + (s - t) * original.slope(x + (middle - t) * d, middle)
        elif sampler == "ancestral":
            up = np.sqrt(s**2 * (t**2 - s**2) / t**2)
            x = x + (np.sqrt(s**2 - up**2) - t) * d + up * draws[i]
        else:
            x = x + (s - t) * d
    return x


def sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, method: dict, *arguments: object
) -> tuple[np.ndarray, np.ndarray, Original]:
    """The command's samples from a `.pt` and given noise; the noise; the reference."""
    model = small_model(variant, image_size=8, attention_resolutions=(4,))
    weights = random_weights(model)
    write_openai(tmp_path / "model.pt", weights, model=model)
    (tmp_path / "config.yaml").write_text(dump_config(small_config(model, method)))
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4)).numpy()
    np.save(tmp_path / "noise.npy", noise)
    options = [
        "--config",
        tmp_path / "config.yaml",
        "--samples",
        2,
        "--noise",
        tmp_path / "noise.npy",
        "--raw",
        *arguments,
    ]
    assert run(monkeypatch, "sample", tmp_path / "model.pt", *options, "--out", tmp_path / "samples.npz") == 0
    original = Original(model, weights, consistency=method["kind"] != "edm")
    return np.load(tmp_path / "samples.npz")["arr_0"], noise.astype(np.float64), original


def draws(count: int) -> list[np.ndarray]:
    return [
        normal_like_samples(0, (0, 1), (3, 8, 8), purpose=f"step-{n}").double().numpy() for n in range(1, count + 1)
    ]


@pytest.mark.parametrize("variant", ["as LSUN 256", "older qkv"])
@pytest.mark.parametrize("times", [(80.0,), (80.0, 4.366), (80.0, 24.4, 5.84, 0.9)])
def test_consistency_samples_are_the_originals(times, variant, tmp_path, monkeypatch):
    arguments = ("--sampling-times", ",".join(map(str, times)))
    found, noise, original = sampled(tmp_path, monkeypatch, variant, {"kind": "ct"}, *arguments)
    x = original(T * noise, T)
    for sigma, drawn in zip(times[1:], draws(len(times) - 1), strict=True):
        x = original(x + np.sqrt(sigma**2 - EPS**2) * drawn, sigma)
    assert relative(found, x) < 1e-5


@pytest.mark.parametrize("sampler", ["heun", "euler", "dpm2", "ancestral"])
def test_diffusion_samples_are_the_originals(sampler, tmp_path, monkeypatch):
    arguments = ("--sampler", sampler, "--steps", 4)
    found, noise, original = sampled(tmp_path, monkeypatch, "as LSUN 256", {"kind": "edm"}, *arguments)
    expected = ode(original, sampler, noise, [*draws(3), np.zeros(1)], 4)
    assert original.evaluations == {"heun": 7, "euler": 4, "dpm2": 8, "ancestral": 4}[sampler]
    assert relative(found, expected) < 1e-5
