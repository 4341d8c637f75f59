"""Owns zero-shot editing: Consistency Models, algorithm 4, and the six tasks built on it.

The invertible maps A of the paper are orthogonal, and what a task keeps of the input is the span of A's first
column q (or all of a pixel). Then A^-1[(Ay)(1 - Omega) + (Ax) Omega] = x + q q^T (y - x), as computed here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cmscale.config import MethodSection
from cmscale.consistency import grid
from cmscale.consistency.sampler import clipped
from cmscale.consistency.solver import Denoise, evaluate, expand_as
from cmscale.errors import UserError
from cmscale.rng import normal_like_samples

LUMINANCE = (0.2989, 0.5870, 0.1140)
STROKE_SIGMAS = (5.38, 2.24)


@dataclass(frozen=True)
class Chain:
    """How algorithm 4 runs: the denoiser, its descending times, the noise of image i from (seed, i) alone."""

    denoise: Denoise
    sigmas: Tensor
    sigma_min: float
    seed: int
    indices: tuple[int, ...]

    def draw(self, number: int, image: Tensor) -> Tensor:
        shape, purpose = image.shape[1:], f"edit-{number}"
        return normal_like_samples(self.seed, self.indices, shape, purpose=purpose, device=image.device).to(image)


def chain(
    method: MethodSection,
    denoise: Denoise,
    *,
    seed: int,
    indices: Sequence[int],
    steps: int = 40,
    sigmas: Sequence[float] | None = None,
    clip: bool = True,
) -> Chain:
    """The chain of `steps` times of the descending Karras grid (40 for Bedroom), or of the given times.

    The grid's last time, eps, is left out: f is the identity there. `clip` holds estimates in [-1, 1], as the
    released code.
    """
    times = (
        grid.karras_grid(method, steps).flip(0)[:-1] if sigmas is None else torch.tensor(sigmas, dtype=torch.float64)
    )
    denoise = clipped(denoise) if clip else denoise
    return Chain(denoise, times, method.boundary, seed, tuple(indices))


@torch.no_grad()
def refine(chain: Chain, start: Tensor, keep: Callable[[Tensor], Tensor]) -> Tensor:
    """Algorithm 4: x ~ N(start, t_1^2 I), f, keep; then, each t_n: x ~ N(x, (t_n^2 - eps^2) I), f, keep."""
    x = start
    for number, sigma in enumerate(chain.sigmas):
        spread = sigma if number == 0 else (sigma**2 - chain.sigma_min**2).clamp(min=0).sqrt()
        noisy = x + expand_as(spread.reshape(1), x) * chain.draw(number, x)
        x = keep(evaluate(chain.denoise, noisy, sigma.to(x.device).expand(len(x))))
    return x


def inpaint(chain: Chain, image: Tensor, *, missing: Tensor) -> Tensor:
    """Fills what `missing` (bool, broadcast to [B, 3, H, W]) marks; every other value is the image's own."""
    return refine(chain, torch.where(missing, 0.0, image), lambda x: torch.where(missing, x, image))


def colorize(chain: Chain, image: Tensor) -> Tensor:
    """Colours for the image's luminance (0.2989 R + 0.5870 G + 0.1140 B), which the result keeps."""
    gray = _gray(image)
    coloured = refine(chain, keep_luminance(torch.zeros_like(image), image), lambda x: keep_luminance(x, image))
    return _into_range(coloured, gray, spread=lambda excess: excess.amax(1, keepdim=True))


def superres(chain: Chain, image: Tensor, *, factor: int = 8) -> Tensor:
    """Detail for the means of the image's factor x factor patches, which the result keeps.

    Raises:
        UserError: the image can't be cut into such patches.
    """
    if image.shape[-1] % factor or image.shape[-2] % factor:
        height, width = image.shape[-2:]
        raise UserError(f"superres: factor {factor} does not divide the image's {height} x {width} pixels")
    coarse = _patch_means(image, factor)
    sharp = refine(chain, coarse, lambda x: x + _patch_means(image - x, factor))
    return _into_range(sharp, coarse, spread=lambda excess: _repeat(F.max_pool2d(excess, factor), factor))


def stroke(chain: Chain, image: Tensor) -> Tensor:
    """A photograph after a stroke painting (SDEdit); nothing is kept, STROKE_SIGMAS are the paper's times."""
    return refine(chain, image, lambda x: x)


@torch.no_grad()
def denoise(denoise: Denoise, image: Tensor, *, sigma: float) -> Tensor:
    """f(x, sigma): the clean image of one with Gaussian noise of known sigma (in units of [-1, 1] images)."""
    times = torch.full((len(image),), sigma, dtype=torch.float64, device=image.device)
    return evaluate(denoise, image, times)


@torch.no_grad()
def interpolate(denoise: Denoise, start: Tensor, end: Tensor, *, sigma_max: float, count: int) -> Tensor:
    """A strip [count, C, H, W] from the sample of one unit-variance noise [1, C, H, W] to that of another."""
    noises = torch.cat([slerp(start, end, index / (count - 1)) for index in range(count)])
    times = torch.full((count,), sigma_max, dtype=torch.float64, device=start.device)
    return evaluate(denoise, sigma_max * noises, times)


def slerp(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """sin((1 - a) w)/sin(w) z_1 + sin(a w)/sin(w) z_2, w the angle between the two; appendix D."""
    a, b = start.flatten(1).double(), end.flatten(1).double()
    angle = F.cosine_similarity(a, b).clamp(-1, 1).acos()
    sine = angle.sin()
    parallel = sine < 1e-9  # a straight line, where the arc has no direction or no length
    safe = torch.where(parallel, 1.0, sine)
    first = torch.where(parallel, 1 - fraction, ((1 - fraction) * angle).sin() / safe)
    second = torch.where(parallel, fraction, (fraction * angle).sin() / safe)
    return (first[:, None] * a + second[:, None] * b).reshape(start.shape).to(start)


def find_noise(
    denoise: Denoise,
    image: Tensor,
    start: Tensor,
    *,
    sigma_max: float,
    iterations: int = 200,
    rate: float = 0.05,
) -> Tensor:
    """Unit-variance noise z whose f(T z, T) comes near `image`: Adam from `start` on the square error.

    For `interpolate` between images, as f alone can't run a trajectory backwards.
    """
    noise = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([noise], lr=rate)
    times = torch.full((len(image),), sigma_max, dtype=torch.float64, device=image.device)
    norm = start.flatten(1).norm(dim=1)
    for _ in range(iterations):
        error = (evaluate(denoise, sigma_max * noise, times) - image).square().mean()
        (noise.grad,) = torch.autograd.grad(error, [noise])
        optimizer.step()
        with torch.no_grad():  # stay on the sphere where noise of this dimension lies
            noise.mul_(expand_as(norm / noise.flatten(1).norm(dim=1), noise))
    return noise.detach()


def luminance(image: Tensor) -> Tensor:
    """0.2989 R + 0.5870 G + 0.1140 B of [B, 3, H, W], [B, 1, H, W] float64."""
    return (image.double() * _weights(image)).sum(1, keepdim=True)


def _weights(image: Tensor) -> Tensor:
    return torch.tensor(LUMINANCE, dtype=torch.float64, device=image.device).view(1, 3, 1, 1)


def keep_luminance(x: Tensor, image: Tensor) -> Tensor:
    """x with the luminance of `image`: x + q q^T (image - x), q along the weights of luminance."""
    weights = _weights(x)
    return (x + weights / weights.square().sum() * (luminance(image) - luminance(x))).to(x)


def _gray(image: Tensor) -> Tensor:
    return (luminance(image) / sum(LUMINANCE)).to(image).expand_as(image)


def _patch_means(image: Tensor, factor: int) -> Tensor:
    return _repeat(F.avg_pool2d(image.double(), factor), factor).to(image)


def _repeat(image: Tensor, factor: int) -> Tensor:
    return image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def _into_range(x: Tensor, anchor: Tensor, *, spread: Callable[[Tensor], Tensor]) -> Tensor:
    """x drawn towards `anchor`, which has the same kept part, as far as holds it in [-1, 1].

    A saved picture is clipped, and clipping alone would move luminance and means. `spread` takes the largest
    value over what shares one kept number (the channels of a pixel, a patch).
    """
    offset = (x - anchor).double()
    room = torch.where(offset > 0, 1 - anchor.double(), 1 + anchor.double()).clamp(min=0)
    excess = torch.where(offset.abs() > room, offset.abs() / room.clamp(min=1e-12), 1.0)
    return (anchor.double() + offset / spread(excess)).to(x)
