"""Tests that each editing task keeps what it must keep of its input."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cmscale.config import CT
from cmscale.consistency import zero_shot as edit
from cmscale.errors import UserError
from cmscale.rng import normal_like_samples

SIZE = 16


def denoise(x: torch.Tensor, sigma: torch.Tensor, **keywords: object) -> torch.Tensor:
    """A stand-in for a consistency function: the identity at 0.002, elsewhere far from it and out of range."""
    weight = (sigma / (sigma + 0.1)).view(-1, 1, 1, 1)
    return (1 - weight) * x + weight * 1.5 * torch.sin(3 * x.flip(1))


def image(seed: int = 0, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def chain(**keywords) -> edit.Chain:
    return edit.chain(CT(kind="ct"), denoise, **{"seed": 3, "indices": (0, 1), "steps": 12, **keywords})


@pytest.mark.parametrize("seed", range(5))
def test_inpaint_keeps_every_known_value_bit_for_bit(seed: int):
    missing = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.bool)
    missing[..., 4:11, 2:9] = True
    given = edit.inpaint(chain(), image(seed), missing=missing)
    wide = missing.expand_as(given)
    assert torch.equal(given[~wide], image(seed)[~wide])
    assert not torch.isclose(given[wide], image(seed)[wide]).any(-1).all()


def test_inpaint_never_looks_at_what_is_missing():
    missing = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.bool)
    missing[..., :8] = True
    other = torch.where(missing, image(7), image(0))
    assert torch.equal(edit.inpaint(chain(), other, missing=missing), edit.inpaint(chain(), image(0), missing=missing))


@pytest.mark.parametrize("seed", range(5))
def test_colorize_keeps_luminance_and_the_range_of_a_picture(seed: int):
    given = edit.colorize(chain(), image(seed))
    torch.testing.assert_close(edit.luminance(given), edit.luminance(image(seed)), rtol=0, atol=2.0**-23)
    assert given.abs().max() <= 1 + 2.0**-23
    assert (given - image(seed)).abs().max() > 0.1


def test_colorize_looks_at_luminance_alone():
    gray = (edit.luminance(image()) / sum(edit.LUMINANCE)).expand_as(image()).float()
    # few steps, as this denoiser multiplies a difference several times in each
    given, expected = (edit.colorize(chain(steps=4), each) for each in (gray, image()))
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_superres_keeps_the_means_of_patches_and_the_range_of_a_picture(factor: int):
    given = edit.superres(chain(), image(), factor=factor)
    kept = F.avg_pool2d(given.double(), factor)
    torch.testing.assert_close(kept, F.avg_pool2d(image().double(), factor), rtol=0, atol=2.0**-23)
    assert given.abs().max() <= 1 + 2.0**-23
    assert (given - image()).abs().max() > 0.1


def test_superres_refuses_a_factor_that_does_not_divide_the_image():
    with pytest.raises(UserError, match="factor 5 does not divide the image's 16 x 16 pixels"):
        edit.superres(chain(), image(), factor=5)


def orthogonal(first: np.ndarray) -> np.ndarray:
    """An orthogonal matrix whose first column is proportional to `first`."""
    matrix = np.eye(len(first))
    matrix[:, 0] = first / np.linalg.norm(first)
    return np.linalg.qr(matrix)[0]


def test_replacement_is_the_papers_orthogonal_map():
    """`refine` with the luminance kept is algorithm 4 with an explicit orthogonal matrix A."""
    to, free = orthogonal(np.array(edit.LUMINANCE)), np.array([0.0, 1.0, 1.0])
    y = image().double()

    def plain(x: torch.Tensor, sigma: torch.Tensor, **keywords: object) -> torch.Tensor:
        weight = (sigma / (sigma + 0.1)).view(-1, 1, 1, 1).double()
        return (1 - weight) * x + weight * torch.sin(x)

    steps = edit.chain(CT(kind="ct"), plain, seed=3, indices=(0, 1), steps=6)
    start = edit.keep_luminance(torch.zeros_like(y), y)
    given = edit.refine(steps, start, lambda x: edit.keep_luminance(x, y)).numpy()

    def replace(x: np.ndarray) -> np.ndarray:
        ay, ax = (np.einsum("bchw,cd->bdhw", v, to) for v in (y.numpy(), x))
        omega = free[None, :, None, None]
        return np.einsum("bdhw,cd->bchw", ay * (1 - omega) + ax * omega, to)

    x = replace(np.zeros_like(y.numpy()))
    for number, sigma in enumerate(steps.sigmas.tolist()):
        spread = sigma if number == 0 else np.sqrt(sigma**2 - 0.002**2)
        z = normal_like_samples(3, (0, 1), (3, SIZE, SIZE), purpose=f"edit-{number}").double().numpy()
        noisy, weight = x + spread * z, sigma / (sigma + 0.1)
        x = replace(np.clip((1 - weight) * noisy + weight * np.sin(noisy), -1, 1))
    np.testing.assert_allclose(given, x, rtol=0, atol=1e-6)


def test_stroke_starts_at_the_papers_two_times():
    seen: list[float] = []

    def watched(x, sigma, **keywords):
        seen.append(sigma[0].item())
        return denoise(x, sigma)

    steps = edit.chain(CT(kind="ct"), watched, seed=0, indices=(0, 1), sigmas=edit.STROKE_SIGMAS)
    given = edit.stroke(steps, image())
    assert seen == pytest.approx([5.38, 2.24], rel=1e-6)
    assert given.shape == image().shape


def test_chain_takes_the_descending_grid_without_its_last_time():
    steps = edit.chain(CT(kind="ct"), denoise, seed=0, indices=(0,))
    assert len(steps.sigmas) == 39
    assert steps.sigmas[0].item() == 80.0
    assert (steps.sigmas.diff() < 0).all()


def test_denoise_is_one_evaluation_at_the_given_sigma():
    expected = denoise(image(), torch.full((2,), 0.4))
    assert torch.equal(edit.denoise(denoise, image(), sigma=0.4), expected)


def test_an_edit_depends_on_its_seed_and_number_alone():
    whole = edit.colorize(chain(), image())
    second = edit.colorize(chain(indices=(1,)), image()[1:])
    torch.testing.assert_close(second, whole[1:], rtol=0, atol=1e-4)


def test_interpolation_runs_between_both_samples_on_the_sphere():
    start, end = torch.randn(2, 1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    strip = edit.interpolate(denoise, start, end, sigma_max=80.0, count=7)
    time = torch.full((1,), 80.0)
    torch.testing.assert_close(strip[:1], denoise(80 * start, time), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(strip[-1:], denoise(80 * end, time), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 1.0])
def test_slerp_keeps_the_length_of_equally_long_noises_and_divides_the_angle(fraction: float):
    start, end = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    end *= (start.norm(dim=1) / end.norm(dim=1))[:, None]
    between = edit.slerp(start, end, fraction)
    torch.testing.assert_close(between.norm(dim=1), start.norm(dim=1), rtol=1e-12, atol=0)
    whole, part = (F.cosine_similarity(start, other).clamp(-1, 1).acos() for other in (end, between))
    torch.testing.assert_close(part, fraction * whole, rtol=1e-6, atol=1e-7)


def test_slerp_of_equal_noises_is_that_noise():
    noise = torch.randn(2, 40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(edit.slerp(noise, noise, 0.3), noise)


def test_find_noise_finds_the_noise_of_a_sample():
    def smooth(x, sigma, **keywords):
        return torch.tanh(x / sigma.view(-1, 1, 1, 1))

    source = torch.Generator().manual_seed(0)
    target, start = torch.randn(2, 2, 3, 8, 8, generator=source)
    target *= (start.flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    goal = smooth(80 * target, torch.full((2,), 80.0))
    found = edit.find_noise(smooth, goal, start, sigma_max=80.0)
    before = (smooth(80 * start, torch.full((2,), 80.0)) - goal).square().mean()
    after = (smooth(80 * found, torch.full((2,), 80.0)) - goal).square().mean()
    assert after < 0.01 * before
    torch.testing.assert_close(found.flatten(1).norm(dim=1), start.flatten(1).norm(dim=1))
