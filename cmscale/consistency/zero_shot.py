"""Edits images without training: Consistency Models, algorithm 4, and the six tasks built on it.

The paper's invertible maps A are orthogonal, and a task keeps the input's component along the first column q of A
(or whole pixels). Then A^-1[(Ay)(1 - Omega) + (Ax) Omega] = x + q q^T (y - x), which is computed here.
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
FINDING_ITERATIONS = 200
"""Steps of Adam by which `find_noise` finds the noise of an image."""


@dataclass(frozen=True)
class Chain:
    """The settings of algorithm 4: denoiser, descending times, and the seed; image i's noise depends on (seed, i)."""

    denoise: Denoise
    sigmas: Tensor
    sigma_min: float
    seed: int
    indices: tuple[int, ...]

    def draw(self, number: int, image: Tensor) -> Tensor:
        """The noise of step `number` of the chain, as large as the images."""
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
    """The chain over the descending Karras grid of `steps` times (40 for LSUN Bedroom), or over `sigmas`.

    The grid's last time, eps, is left out, as f is the identity there. `clip` clamps estimates to [-1, 1], as the
    released code does.
    """
    times = (
        grid.karras_grid(method, steps).flip(0)[:-1] if sigmas is None else torch.tensor(sigmas, dtype=torch.float64)
    )
    denoise = clipped(denoise) if clip else denoise
    return Chain(denoise, times, method.boundary, seed, tuple(indices))


@torch.no_grad()
def refine(chain: Chain, start: Tensor, keep: Callable[[Tensor], Tensor]) -> Tensor:
    """Algorithm 4: x ~ N(start, t_1^2 I), f, keep; then for each t_n: x ~ N(x, (t_n^2 - eps^2) I), f, keep.

    Args:
        start: Images [B, C, H, W] in [-1, 1].
        keep: Replaces what the task keeps by the input's values.
    """
    x = start
    for number, sigma in enumerate(chain.sigmas):
        spread = sigma if number == 0 else (sigma**2 - chain.sigma_min**2).clamp(min=0).sqrt()
        noisy = x + expand_as(spread.reshape(1), x) * chain.draw(number, x)
        x = keep(evaluate(chain.denoise, noisy, sigma.to(x.device).expand(len(x))))
    return x


def inpaint(chain: Chain, image: Tensor, *, missing: Tensor) -> Tensor:
    """Fills the values that `missing` (bool, broadcast to [B, 3, H, W]) marks; the others stay exactly the image's."""
    return refine(chain, torch.where(missing, 0.0, image), lambda x: torch.where(missing, x, image))


def colorize(chain: Chain, image: Tensor) -> Tensor:
    """Colours the image; its luminance (0.2989 R + 0.5870 G + 0.1140 B) stays the same."""
    gray = _gray(image)
    coloured = refine(chain, keep_luminance(torch.zeros_like(image), image), lambda x: keep_luminance(x, image))
    return _into_range(coloured, gray, spread=lambda excess: excess.amax(1, keepdim=True))


def superres(chain: Chain, image: Tensor, *, factor: int = 8) -> Tensor:
    """Adds detail to an image of which only the means of factor x factor patches are used; they stay the same.

    Raises:
        UserError: `factor` does not divide the image's height and width.
    """
    if image.shape[-1] % factor or image.shape[-2] % factor:
        height, width = image.shape[-2:]
        raise UserError(
            f"superres: factor {factor} does not divide the image's {height} x {width} pixels; choose a common divisor"
        )
    coarse = _patch_means(image, factor)
    sharp = refine(chain, coarse, lambda x: x + _patch_means(image - x, factor))
    return _into_range(sharp, coarse, spread=lambda excess: _repeat(F.max_pool2d(excess, factor), factor))


def stroke(chain: Chain, image: Tensor) -> Tensor:
    """Turns a stroke painting into a photograph (SDEdit), at the paper's times STROKE_SIGMAS; nothing is kept."""
    return refine(chain, image, lambda x: x)


@torch.no_grad()
def denoise(denoise: Denoise, image: Tensor, *, sigma: float) -> Tensor:
    """f(x, sigma): removes Gaussian noise of known standard deviation sigma, in units of the range [-1, 1]."""
    times = torch.full((len(image),), sigma, dtype=torch.float64, device=image.device)
    return evaluate(denoise, image, times)


@torch.no_grad()
def interpolate(denoise: Denoise, start: Tensor, end: Tensor, *, sigma_max: float, count: int) -> Tensor:
    """Samples [count, C, H, W] between those of two unit-variance noises `start` and `end`, [1, C, H, W] each."""
    noises = torch.cat([slerp(start, end, index / (count - 1)) for index in range(count)])
    times = torch.full((count,), sigma_max, dtype=torch.float64, device=start.device)
    return evaluate(denoise, sigma_max * noises, times)


def slerp(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """sin((1 - a) w)/sin(w) z_1 + sin(a w)/sin(w) z_2, w the angle between them; Consistency Models, appendix D."""
    a, b = start.flatten(1).double(), end.flatten(1).double()
    angle = F.cosine_similarity(a, b).clamp(-1, 1).acos()
    sine = angle.sin()
    parallel = sine < 1e-9  # linear interpolation where the arc has no direction or no length
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
    iterations: int = FINDING_ITERATIONS,
    rate: float = 0.05,
) -> Tensor:
    """Unit-variance noise z for which f(T z, T) approximates `image`, found by Adam on the square error from `start`.

    `interpolate` needs it for given images, as f can't be inverted.
    """
    noise = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([noise], lr=rate)
    times = torch.full((len(image),), sigma_max, dtype=torch.float64, device=image.device)
    norm = start.flatten(1).norm(dim=1)
    for _ in range(iterations):
        error = (evaluate(denoise, sigma_max * noise, times) - image).square().mean()
        (noise.grad,) = torch.autograd.grad(error, [noise])
        optimizer.step()
        with torch.no_grad():  # keep the norm that noise of this dimension has
            noise.mul_(expand_as(norm / noise.flatten(1).norm(dim=1), noise))
    return noise.detach()


def luminance(image: Tensor) -> Tensor:
    """0.2989 R + 0.5870 G + 0.1140 B of images [B, 3, H, W], as [B, 1, H, W] float64."""
    return (image.double() * _weights(image)).sum(1, keepdim=True)


def _weights(image: Tensor) -> Tensor:
    return torch.tensor(LUMINANCE, dtype=torch.float64, device=image.device).view(1, 3, 1, 1)


def keep_luminance(x: Tensor, image: Tensor) -> Tensor:
    """x with the luminance of `image`: x + q q^T (image - x), q the normalised luminance weights."""
    weights = _weights(x)
    return (x + weights / weights.square().sum() * (luminance(image) - luminance(x))).to(x)


def _gray(image: Tensor) -> Tensor:
    return (luminance(image) / sum(LUMINANCE)).to(image).expand_as(image)


def _patch_means(image: Tensor, factor: int) -> Tensor:
    return _repeat(F.avg_pool2d(image.double(), factor), factor).to(image)


def _repeat(image: Tensor, factor: int) -> Tensor:
    return image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def _into_range(x: Tensor, anchor: Tensor, *, spread: Callable[[Tensor], Tensor]) -> Tensor:
    """x moved towards `anchor`, which has the same kept values, until it lies in [-1, 1].

    A saved image is clipped, and clipping alone would change luminance and means. `spread` takes the maximum over the
    values that share a kept value (the channels of a pixel, a patch).
    """
    offset = (x - anchor).double()
    room = torch.where(offset > 0, 1 - anchor.double(), 1 + anchor.double()).clamp(min=0)
    excess = torch.where(offset.abs() > room, offset.abs() / room.clamp(min=1e-12), 1.0)
    return (anchor.double() + offset / spread(excess)).to(x)
