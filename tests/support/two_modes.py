"""Gives images of independent values with two modes, their exact trajectories, and a network that learns them.

An image holds 64 values, and the network treats each value alone: 64 problems in one dimension at one time. Its times
pass the UNet's own sinusoids. In one dimension the probability flow keeps the quantile of each point, so that the
trajectory through x at sigma is at the same quantile of data with any other noise.
"""

import torch
from torch import Tensor, nn

from cmscale.model.blocks import timestep_embedding
from cmscale.model.weighting import Weighting

MODE, SPREAD = 0.45, 0.22
SIDE, WIDTH = 8, 64


def draw(count: int, seed: int) -> Tensor:
    """Images whose values are from N(-MODE, SPREAD^2) or N(MODE, SPREAD^2), [count, 1, SIDE, SIDE]; sd is 0.5."""
    source, shape = torch.Generator().manual_seed(seed), (count, 1, SIDE, SIDE)
    signs = torch.randint(2, shape, generator=source) * 2 - 1
    return MODE * signs + SPREAD * torch.randn(shape, generator=source)


def quantile(x: Tensor, sigma: float | Tensor) -> Tensor:
    """The probability of values below x with noise of std sigma (of all, or of each), float64."""
    spread = (SPREAD**2 + sigma**2) ** 0.5
    return (torch.special.ndtr((x + MODE) / spread) + torch.special.ndtr((x - MODE) / spread)) / 2


def exact(x: Tensor, sigma: float | Tensor, to: float = 0.0) -> Tensor:
    """The points at noise `to` of the trajectories through float64 values x at sigma, by a table of quantiles."""
    reach = 3 + 6 * to
    values = torch.linspace(-reach, reach, 60001, dtype=torch.float64)
    table, wanted = quantile(values, to), quantile(x, sigma)
    above = torch.searchsorted(table, wanted).clamp(1, len(table) - 1)
    share = (wanted - table[above - 1]) / (table[above] - table[above - 1])
    return values[above - 1] + share * (values[above] - values[above - 1])


def denoise(x: Tensor, sigma: Tensor, *, dropout_keys: object = None) -> Tensor:
    """E[x0 | x] of these values."""
    variance = SPREAD**2 + sigma.view(-1, 1, 1, 1) ** 2
    signs = torch.tanh(MODE * x / variance)
    return MODE * signs + SPREAD**2 / variance * (x - MODE * signs)


class Raw(nn.Module):
    """A perceptron with residual connections on each value, which gets the time by the UNet's embedding."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Sequential(nn.Linear(64, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.first, self.last = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 1)
        self.hidden = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.times = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.weighting = Weighting(SIDE * SIDE)
        self.weighting.initialise()

    def forward(self, x, c_noise, *, labels=None, dropout_keys=None, weight_time=None):
        embedding = self.embed(timestep_embedding(c_noise, 64))[:, None]
        h = self.first(2 * x.reshape(len(x), -1, 1))
        for layer, time in zip(self.hidden, self.times, strict=True):
            h = h + layer(nn.functional.silu(h + time(embedding)))
        out = self.last(nn.functional.silu(h)).reshape(x.shape)
        return out if weight_time is None else (out, self.weighting(weight_time))


def noisy(sigma: float) -> tuple[Tensor, Tensor]:
    """Data with noise, and the exact f of it."""
    noise = torch.randn(128, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    x = draw(128, seed=1) + sigma * noise
    return x, exact(x.flatten().double(), sigma)


def relative(found: Tensor, expected: Tensor) -> float:
    """Root mean square error, relative to the standard deviation of what is expected."""
    return float((found.flatten().double() - expected).square().mean().sqrt() / expected.std())
