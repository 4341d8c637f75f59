"""Tests of the diffusers folder: read back bit for bit, and the same images from diffusers itself."""

import json

import pytest
import torch
from networks import VARIANTS, random_weights, relative, small_config, small_model

from cmscale.config import Model
from cmscale.consistency.sampler import clipped, multistep
from cmscale.errors import UserError
from cmscale.interop import read_diffusers, write_diffusers
from cmscale.interop.diffusers_folder import scheduler_config
from cmscale.io.storage import open_storage
from cmscale.model import ConsistencyDenoiser, build_unet
from cmscale.source import load_source


def exported(folder, model: Model, *, method=None, card: str | None = None) -> dict[str, torch.Tensor]:
    weights = random_weights(model)
    config = small_config(model, method)
    write_diffusers(folder, weights, config=config, step=5, weights_name="ema_0.999943", card=card)
    return weights


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, variant):
    model = small_model(variant)
    weights = exported(tmp_path, model)
    found, card = read_diffusers(tmp_path)
    assert list(found) == list(weights)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert (card["step"], card["weights"]) == ("5", "ema_0.999943")
    assert read_diffusers(open_storage(tmp_path), model=model)[0].keys() == weights.keys()


def test_a_folder_on_s3_is_written_and_read(s3):
    weights = exported(f"{s3}/folder", small_model(), card="# About\n")
    found, _ = read_diffusers(f"{s3}/folder")
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert open_storage(f"{s3}/folder").read("README.md") == b"# About\n"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_real_pipeline_draws_the_same_images_from_the_same_noise(tmp_path, variant):
    diffusers = pytest.importorskip("diffusers", reason="the extra `export` is not installed")
    model = small_model(variant)
    weights = exported(tmp_path, model)
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([1, 4]) if model.num_classes else None
    theirs = pipeline(batch_size=2, latents=noise, class_labels=labels, output_type="pt").images

    network = build_unet(model).eval()
    network.load_state_dict(weights)
    with torch.no_grad():
        ours = ConsistencyDenoiser(network)(80 * noise, torch.tensor([80.0, 80.0]), labels=labels).clamp(-1, 1)
    assert theirs.std() > 0.05
    assert relative(ours / 2 + 0.5, theirs) < 1e-5


def test_the_real_pipeline_agrees_in_two_steps(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="the extra `export` is not installed")
    model = small_model()
    weights = exported(tmp_path, model, method={"kind": "cd", "teacher": "t"})
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    noise, again = torch.randn(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    source = torch.Generator().manual_seed(2)
    theirs = pipeline(latents=noise, timesteps=[17, 0], num_inference_steps=None, generator=source, output_type="pt")

    network = build_unet(model).eval()
    network.load_state_dict(weights)
    denoise = ConsistencyDenoiser(network)
    again = torch.randn(noise.shape, generator=torch.Generator().manual_seed(2))
    inner = (80 ** (1 / 7) + 17 / 39 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert inner == pytest.approx(4.366, abs=1e-3)
    with torch.no_grad():
        x = denoise(80 * noise, torch.tensor([80.0])).clamp(-1, 1)
        x = x + (inner**2 - 0.002**2) ** 0.5 * again
        x = denoise(x, torch.tensor([inner])).clamp(-1, 1)
    assert relative(x / 2 + 0.5, theirs.images) < 1e-5


SCD = {"kind": "scd", "teacher": "t"}


@pytest.mark.parametrize("method", [{"kind": "ect", "teacher": "t"}, SCD, {**SCD, "kind": "sct", "start": "teacher"}])
def test_the_real_pipeline_agrees_for_methods_that_keep_edms_preconditioning(tmp_path, method):
    """With one step and with two, where the boundary of f is at 0, not at 0.002."""
    diffusers = pytest.importorskip("diffusers", reason="the extra `export` is not installed")
    model = small_model()
    exported(tmp_path, model, method=method)
    source = load_source(str(tmp_path))
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    theirs = pipeline(
        latents=noise,
        timesteps=[20, 0],
        num_inference_steps=None,
        generator=torch.Generator().manual_seed(2),
        output_type="pt",
    ).images
    again = torch.randn(noise.shape, generator=torch.Generator().manual_seed(2))
    sigmas = torch.tensor([80.0, 80 * (19 / 39) ** 7], dtype=torch.float64)
    denoise = clipped(source.denoiser(torch.device("cpu")))
    ours = multistep(denoise, noise, sigmas, draw=lambda number: again, sigma_min=source.config.method.boundary)
    assert relative(ours / 2 + 0.5, theirs) < 1e-5
    ours = denoise(80 * noise, torch.tensor([80.0]))
    assert relative(ours / 2 + 0.5, pipeline(latents=noise, output_type="pt").images) < 1e-5


def test_the_scheduler_has_the_last_grid_of_the_training():
    model = small_model()
    for method, scales in (
        ({"kind": "ct"}, 151),
        ({"kind": "cd", "teacher": "t", "num_scales": 18}, 18),
        ({"kind": "ict"}, 1281),
        ({"kind": "ect", "teacher": "t", "sigma_max": 50.0}, 40),
    ):
        written = scheduler_config(small_config(model, method).method)
        assert written["num_train_timesteps"] == scales
        assert written["sigma_max"] == method.get("sigma_max", 80.0)


def test_an_edm_model_and_a_wide_first_level_are_refused_and_nothing_is_written(tmp_path):
    for method in ({"kind": "edm"}, {"kind": "pd", "teacher": "t"}):
        with pytest.raises(UserError, match=f"diffusers has no pipeline for {method['kind'].upper()}"):
            exported(tmp_path, small_model(), method=method)
    with pytest.raises(UserError, match="can't compute the time embedding"):
        exported(tmp_path, small_model(), method={"kind": "sct"})
    with pytest.raises(UserError, match="channel_multipliers starts with 2"):
        exported(tmp_path, small_model(channel_multipliers=(2, 2)))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_network_is_refused_by_name(tmp_path):
    exported(tmp_path, small_model())
    with pytest.raises(UserError, match="attention_head_dim is 32, but 16 in the config's model section"):
        read_diffusers(tmp_path, model=small_model(head_channels=16))
    with pytest.raises(UserError, match=r"unet/config\.json: num_class_embeds is None"):
        read_diffusers(tmp_path, model=small_model(num_classes=3))


def test_anything_but_such_a_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match="not a diffusers folder"):
        read_diffusers(tmp_path)
    exported(tmp_path, small_model())
    (tmp_path / "unet/config.json").write_text("[")
    with pytest.raises(UserError, match="not a JSON object"):
        read_diffusers(tmp_path)
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="no such file"):
        read_diffusers(tmp_path)


def test_a_folder_that_others_wrote_needs_a_model_and_then_loads(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="the extra `export` is not installed")
    model = small_model("as ImageNet 64")
    weights = exported(tmp_path / "ours", model)
    diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="holds no config"):
        read_diffusers(tmp_path / "theirs")
    found, card = read_diffusers(tmp_path / "theirs", model=model)
    assert card == {}
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert json.loads((tmp_path / "theirs/model_index.json").read_text())["unet"] == [
        "diffusers",
        "UNet2DModel",
    ]
