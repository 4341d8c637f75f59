import importlib.util
import math
from pathlib import Path

import numpy as np
import piq
import piq.perceptual
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cmscale.config import CD, CT, ECT, EDM, ICT
from cmscale.config.schedules import ScheduleValues
from cmscale.consistency import lpips as perceptual
from cmscale.consistency.distance import build_distance, default_huber_c, l1, l2, pseudo_huber
from cmscale.consistency.losses import build_loss
from cmscale.consistency.networks import Networks
from cmscale.errors import UserError
from cmscale.rng import SampleRandomness
from data_prep.demo import VIEWS, crops


@pytest.fixture(scope="module")
def features() -> nn.Sequential:
    """VGG16's `features` with random weights, scaled so that activations do not vanish."""
    layers: list[nn.Module] = []
    source, before = torch.Generator().manual_seed(0), 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if not width:
            layers.append(nn.MaxPool2d(2, 2))
            continue
        conv = nn.Conv2d(before, width, 3, padding=1)
        scale = math.sqrt(2 / (9 * before))
        conv.weight.data = torch.randn(conv.weight.shape, generator=source) * scale
        conv.bias.data = torch.randn(width, generator=source) * 0.1
        layers += [conv, nn.ReLU(inplace=True)]
        before = width
    return nn.Sequential(*layers).requires_grad_(False)


@pytest.fixture(scope="module")
def weights(features: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like torchvision's VGG16: `features.N.*`, and the classifier, which LPIPS does not use."""
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    state = {f"features.{key}": value for key, value in features.state_dict().items()}
    torch.save({**state, "classifier.0.weight": torch.zeros(2, 2), "classifier.0.bias": torch.zeros(2)}, path)
    return path


def pairs(count: int, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    source = torch.Generator().manual_seed(size)
    return [tuple(torch.rand(2, 2, 3, size, size, generator=source) * 2 - 1) for _ in range(count)]


def network(weights: Path, *, average: bool, resize: bool = False) -> perceptual.LPIPS:
    built = perceptual.LPIPS(average_pooling=average, resize=resize)
    built.load_features(weights)
    return built


@pytest.mark.long
def test_lpips_with_max_pooling_is_the_lpips_package(features: nn.Sequential, weights: Path):
    import lpips

    reference = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    heads = Path(next(iter(importlib.util.find_spec("lpips").submodule_search_locations)), "weights/v0.1/vgg.pth")
    reference.load_state_dict(torch.load(heads, map_location="cpu", weights_only=True), strict=False)
    for layer in [layer for part in range(1, 6) for layer in getattr(reference.net, f"slice{part}")._modules.items()]:
        if isinstance(layer[1], nn.Conv2d):
            layer[1].load_state_dict(features[int(layer[0])].state_dict())
    ours = network(weights, average=False)
    for a, b in (*pairs(5, 32), *pairs(5, 48)):
        torch.testing.assert_close(ours(a, b), reference(a, b).flatten(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("size", [32, 48])
def test_lpips_with_average_pooling_is_piq_with_replaced_pooling(
    features: nn.Sequential, weights: Path, size: int, monkeypatch: pytest.MonkeyPatch
):
    heads = perceptual.LPIPS(average_pooling=True, resize=False).state_dict()
    shipped = [heads[f"head_{index}"] for index in range(5)]
    vgg = nn.Module()
    vgg.features = nn.Sequential(*[type(m)(2, 2) if isinstance(m, nn.MaxPool2d) else m for m in features])
    monkeypatch.setattr(piq.perceptual.torch.hub, "load_state_dict_from_url", lambda *args, **keywords: shipped)
    monkeypatch.setattr(piq.perceptual, "vgg16", lambda **keywords: vgg)
    reference = piq.LPIPS(replace_pooling=True, reduction="none")
    ours = network(weights, average=True)
    for a, b in pairs(5, size):
        expected = reference((a + 1) / 2, (b + 1) / 2)
        torch.testing.assert_close(ours(a, b), expected.flatten(), rtol=2e-6, atol=0)


@pytest.mark.long
def test_small_images_are_resized_to_224_bilinearly(weights: Path):
    plain, resizing = network(weights, average=True), network(weights, average=True, resize=True)
    a, b = (images[:1] for images in pairs(1, 64)[0])
    larger = [nn.functional.interpolate(x, size=224, mode="bilinear", align_corners=False) for x in (a, b)]
    assert torch.equal(resizing(a, b), plain(*larger))


@pytest.mark.parametrize(("size", "resize"), [(64, True), (255, True), (256, False), (512, False)])
def test_only_images_under_256_are_resized(weights: Path, size: int, resize: bool):
    built = build_distance(CT(kind="ct"), size, lpips_weights=weights)
    assert isinstance(built, perceptual.LPIPS)
    assert built.resize is resize
    assert built.average_pooling is True


def test_lpips_is_frozen_and_gives_gradients_to_its_inputs(weights: Path):
    lpips = network(weights, average=True)
    lpips.train()
    assert not lpips.training
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    a, b = pairs(1, 32)[0]
    a.requires_grad_()
    lpips(a, b).sum().backward()
    assert a.grad is not None
    assert a.grad.abs().max() > 0


@pytest.mark.parametrize(("kind", "average"), [("ct", True), ("cd", False)])
def test_lpips_losses_have_the_gradient_of_central_differences(weights: Path, kind: str, average: bool, monkeypatch):
    """CT's and CD's loss with LPIPS, all in float64, along every parameter of a small student."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())
    method = CT(kind="ct") if kind == "ct" else CD(kind="cd", teacher="t")
    lpips = network(weights, average=average).double()
    numbers = torch.tensor([0.7, -0.2, 0.4], dtype=torch.float64, requires_grad=True)

    def student(x: torch.Tensor, sigma: torch.Tensor, *, dropout_keys: object = None) -> torch.Tensor:
        gain = (1 / (1 + sigma)).view(-1, 1, 1, 1)
        return numbers[0] * gain * x + numbers[1] * torch.sin(x) + numbers[2] * x.roll(1, 3) * gain

    def still(x: torch.Tensor, sigma: torch.Tensor, *, dropout_keys: object = None) -> torch.Tensor:
        return 0.5 * torch.sin(x) / (1 + sigma).view(-1, 1, 1, 1)

    clean = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    random = SampleRandomness(0, (0, 1), torch.device("cpu"))
    values = ScheduleValues(0, 1.0, num_scales=20, target_ema=0.9)
    loss = build_loss(method, lpips)
    loss(Networks(student, still, still), clean, values, random).mean().backward()
    assert numbers.grad is not None
    with torch.no_grad():
        for place in range(3):
            ends = []
            for nudge in (1e-6, -1e-6):
                numbers[place] += nudge
                ends.append(loss(Networks(student, still, still), clean, values, random).mean().item())
                numbers[place] -= nudge
            assert numbers.grad[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-8)


def test_lpips_gradient_is_finite_where_all_features_are_zero(weights: Path):
    lpips = network(weights, average=True)
    for conv in lpips.convolutions:
        conv.bias.fill_(-1e6)
    a, b = pairs(1, 32)[0]
    a.requires_grad_()
    lpips(a, b).sum().backward()
    assert a.grad is not None
    assert torch.isfinite(a.grad).all()


def test_lpips_is_computed_in_float32_whatever_the_surroundings(weights: Path):
    lpips = network(weights, average=True)
    a, b = pairs(1, 32)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lpips(a, b), lpips(a.float(), b.float()))
        assert lpips(a, b).dtype == torch.float32
    assert lpips(a.bfloat16(), b.bfloat16()).dtype == torch.float32


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    """Crops of two photographs, [2, 3, 48, 48] in [-1, 1]."""
    found = [np.asarray(next(iter(crops(view, count=1, side=48, seed=0)))) for view in list(VIEWS.values())[:2]]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize(("noise", "at_least"), [(0.3, 0.01), (0.04, 0.0005)])
@pytest.mark.long
def test_lpips_in_float16_agrees_to_a_thousandth_on_photographs(
    weights: Path, photographs: torch.Tensor, noise: float, at_least: float
):
    """Its gradient too, at the size that it has at the end of a training step: float16 could not hold that."""
    exact = build_distance(CT(kind="ct"), 256, lpips_weights=weights)
    half = build_distance(CT(kind="ct", lpips_precision="fp16"), 256, lpips_weights=weights)
    assert exact is not None
    assert half is not None
    other = photographs + noise * torch.randn(photographs.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for distance in (exact, half):
        image = photographs.clone().requires_grad_()
        value = distance(image, other)
        (1e-9 * value).mean().backward()
        found.append((value.detach(), image.grad))
    (expected, slope), (value, rounded) = found
    assert value.dtype == torch.float32
    assert expected.min() > at_least
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=0)
    assert not torch.equal(value, expected)
    assert (rounded - slope).norm() < 0.03 * slope.norm()


def test_lpips_in_float16_gives_gradients_where_they_are_wanted_alone(weights: Path):
    half = build_distance(CT(kind="ct", lpips_precision="fp16"), 256, lpips_weights=weights)
    assert half is not None
    a, b = pairs(1, 16)[0]
    with torch.no_grad():
        assert not half(a, b).requires_grad
    assert not half(a, b).requires_grad
    one, other = a.clone().requires_grad_(), b.clone().requires_grad_()
    half(one, b).sum().backward()
    half(a, other).sum().backward()
    both = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    half(*both).sum().backward()
    assert torch.equal(both[0].grad, one.grad)
    assert torch.equal(both[1].grad, other.grad)


def test_lpips_reads_safetensors_as_well(features: nn.Sequential, weights: Path, tmp_path: Path):
    save_file(dict(features.state_dict()), tmp_path / "features.safetensors")
    a, b = pairs(1, 32)[0]
    given = network(tmp_path / "features.safetensors", average=False)(a, b)
    assert torch.equal(given, network(weights, average=False)(a, b))


@pytest.mark.parametrize("content", [None, b"not a file of weights", b""])
@pytest.mark.parametrize("name", ["vgg.pth", "vgg.safetensors"])
def test_a_bad_weights_file_is_the_users_mistake(tmp_path: Path, content: bytes | None, name: str):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"method.lpips_weights: .*vgg"):
        build_distance(CT(kind="ct"), 256, lpips_weights=path)


def test_another_networks_weights_are_the_users_mistake(tmp_path: Path):
    torch.save(
        {"features.0.weight": torch.zeros(64, 3, 11, 11), "features.0.bias": torch.zeros(64)},
        tmp_path / "a.pth",
    )
    with pytest.raises(UserError, match="13 convolutions of torchvision's VGG16"):
        build_distance(CT(kind="ct"), 256, lpips_weights=tmp_path / "a.pth")


def test_means_and_pseudo_huber_are_their_formulas():
    source = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, 3, 5, 5, generator=source, dtype=torch.float64)
    rows = (a - b).reshape(4, 75).numpy()
    torch.testing.assert_close(l1(a, b), torch.from_numpy(abs(rows).mean(1)), rtol=1e-14, atol=0)
    torch.testing.assert_close(l2(a, b), torch.from_numpy((rows**2).mean(1)), rtol=1e-14, atol=0)
    huber = ((rows**2).sum(1) + 0.3**2) ** 0.5 - 0.3
    torch.testing.assert_close(pseudo_huber(a, b, c=0.3), torch.from_numpy(huber), rtol=1e-13, atol=0)


@pytest.mark.parametrize("c", [0.01, 0.0])
def test_pseudo_huber_is_smooth_at_zero(c: float):
    """With c = 0 it is the Euclidean distance, whose gradient is 0 where there is no difference."""
    a = torch.zeros(2, 3, 4, 4)
    a[1, 0, 0, 0] = 2.0
    a.requires_grad_()
    found = pseudo_huber(a, torch.zeros(2, 3, 4, 4), c=c)
    found.sum().backward()
    assert found.tolist() == pytest.approx([0.0, math.hypot(2.0, c) - c], rel=1e-6)
    assert a.grad is not None
    assert (a.grad[0] == 0).all()
    assert a.grad.count_nonzero() == 1


@pytest.mark.parametrize(
    "method",
    [ICT(kind="ict"), ECT(kind="ect", teacher="t"), CD(kind="cd", teacher="t", distance="pseudo_huber")],
)
def test_huber_c_defaults_to_the_size_of_the_image(method):
    assert default_huber_c(256) == pytest.approx(0.00054 * math.sqrt(3 * 256 * 256), rel=1e-15)
    a, b = torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.5)
    expected = pseudo_huber(a, b, c=0.00054 * math.sqrt(192))
    torch.testing.assert_close(build_distance(method, 8)(a, b), expected)
    for c in (2.0, 0.0):
        given = method.model_copy(update={"huber_c": c})
        torch.testing.assert_close(build_distance(given, 8)(a, b), pseudo_huber(a, b, c=c))


def test_edm_takes_the_mean_square():
    assert build_distance(EDM(kind="edm"), 8) is l2
