"""Tests of diffusers folders that others wrote: their configs, their files, and folders that are not written over."""

import json
from pathlib import Path

import pytest
import torch
from networks import random_weights, relative, small_config, small_model
from safetensors.torch import save_file

from cmscale.config import dump_config
from cmscale.consistency.sampler import clipped, default_sigmas, multistep
from cmscale.errors import UserError
from cmscale.export.card import model_card
from cmscale.interop import read_diffusers, write_diffusers
from cmscale.interop.diffusers_weights import UNET_VARIANTS
from cmscale.source import load_source

MODEL = small_model()
CONFIG = small_config(MODEL, {"kind": "cd", "teacher": "t"})


@pytest.fixture
def lsun(tmp_path: Path) -> Path:
    """A folder as diffusers' script writes OpenAI's LSUN networks, smaller: it states few options."""
    diffusers = pytest.importorskip("diffusers", reason="the extra `export` is not installed")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        num_class_embeds=None,
        block_out_channels=[32, 64],
        attention_head_dim=32,
        down_block_types=["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        resnet_time_scale_shift="default",
        upsample_type="resnet",
        downsample_type="resnet",
    )
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0)
    diffusers.ConsistencyModelPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / "lsun")
    assert json.loads((tmp_path / "lsun/unet/config.json").read_text())["attn_norm_num_groups"] is None
    (tmp_path / "config.yaml").write_text(dump_config(CONFIG))
    return tmp_path / "lsun"


def test_a_folder_of_their_conversion_script_samples_as_their_pipeline(lsun: Path) -> None:
    import diffusers

    source = load_source(str(lsun), config=str(lsun.parent / "config.yaml"))
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(lsun)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    theirs = pipeline(batch_size=2, latents=noise, output_type="pt").images
    ours = clipped(source.denoiser(torch.device("cpu")))(80 * noise, torch.tensor([80.0, 80.0]))
    assert theirs.std() > 0.01
    assert relative(ours / 2 + 0.5, theirs) < 1e-5


def test_every_file_that_may_hold_the_network_loads(lsun: Path) -> None:
    weights = read_diffusers(lsun, model=MODEL)[0]
    whole = lsun / UNET_VARIANTS[0]
    state = load_state(whole)
    whole.unlink()
    for key in UNET_VARIANTS[1:]:
        half = ".fp16." in key
        saved = {name: tensor.half() if half else tensor for name, tensor in state.items()}
        if key.endswith(".bin"):
            torch.save(saved, lsun / key)
        else:
            save_file(saved, lsun / key)
        found = read_diffusers(lsun, model=MODEL)[0]
        assert all(
            torch.equal(found[name], weights[name].half().float() if half else weights[name]) for name in weights
        )
        (lsun / key).unlink()
    with pytest.raises(UserError, match="no such file, nor one of"):
        read_diffusers(lsun, model=MODEL)


def load_state(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize(
    ("file", "key", "value", "line"),
    [
        (
            "unet/config.json",
            "resnet_time_scale_shift",
            "scale_shift",
            "attn_norm_num_groups is None|resnet_time_scale",
        ),
        ("unet/config.json", "mid_block_scale_factor", 2, "mid_block_scale_factor is 2, but 1"),
        ("unet/config.json", "add_attention", False, "add_attention is False, but True"),
        ("unet/config.json", "class_embed_type", "timestep", "class_embed_type is timestep"),
        ("unet/config.json", "attention_head_dim", None, r"attention_head_dim is 8 \(diffusers' default\), but 32"),
        ("scheduler/scheduler_config.json", "sigma_data", 1.0, "sigma_data is 1, but 0.5 by the config's method"),
        ("scheduler/scheduler_config.json", "sigma_max", None, None),
    ],
)
def test_what_their_configs_state_must_be_the_network_and_the_method(
    lsun: Path, file: str, key: str, value: object, line: str | None
) -> None:
    content = json.loads((lsun / file).read_text())
    if value is None:
        del content[key]
    else:
        content[key] = value
    (lsun / file).write_text(json.dumps(content))
    arguments = {"config": str(lsun.parent / "config.yaml")}
    if line is None:
        load_source(str(lsun), **arguments)
        return
    with pytest.raises(UserError, match=line):
        load_source(str(lsun), **arguments)


@pytest.mark.parametrize("is_safe", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_network_in_several_files_is_that_in_one(lsun: Path, is_safe: bool, variant: str | None) -> None:
    from diffusers import UNet2DModel

    one = read_diffusers(lsun, model=MODEL)[0]
    unet = UNet2DModel.from_pretrained(lsun / "unet")
    (lsun / UNET_VARIANTS[0]).unlink()
    unet = unet if variant is None else unet.half()
    unet.save_pretrained(lsun / "unet", max_shard_size="500KB", safe_serialization=is_safe, variant=variant)
    files = sorted((lsun / "unet").glob("*-0000?-of-*"))
    assert len(files) > 3
    source = load_source(str(lsun), config=str(lsun.parent / "config.yaml"))
    expected = {name: tensor if variant is None else tensor.half().float() for name, tensor in one.items()}
    assert all(torch.equal(source.weights[name], tensor) for name, tensor in expected.items())
    files[1].rename(lsun / "elsewhere")
    with pytest.raises(UserError, match=rf"no {files[1].name}, which unet/.* lists; copy the folder again"):
        read_diffusers(lsun, model=MODEL)
    (index,) = (lsun / "unet").glob("*.index*.json")
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../elsewhere"}}))
    with pytest.raises(UserError, match="names no files in its weight_map"):
        read_diffusers(lsun, model=MODEL)
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": files[0].name}}))
    with pytest.raises(UserError, match=r"do not fit the config's model section .*missing"):
        read_diffusers(lsun, model=MODEL)


def test_another_models_folder_is_not_written_over(lsun: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in lsun.rglob("*") if path.is_file()}
    weights = random_weights(MODEL)
    with pytest.raises(UserError, match=r"holds another model .*, which is not replaced; name another folder"):
        write_diffusers(lsun, weights, config=CONFIG, step=1, weights_name="master", card="# mine\n")
    assert {path: path.read_bytes() for path in lsun.rglob("*") if path.is_file()} == before
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository/README.md").write_text("# Somebody's\n")
    with pytest.raises(UserError, match=r"holds another model \(README\.md\)"):
        write_diffusers(tmp_path / "repository", weights, config=CONFIG, step=1, weights_name="master", card="# mine\n")


def test_a_later_export_of_the_same_run_replaces_the_earlier_one(tmp_path: Path) -> None:
    for step in (1, 2):
        write_diffusers(tmp_path / "x", random_weights(MODEL), config=CONFIG, step=step, weights_name="master", card="")
    assert read_diffusers(tmp_path / "x")[1]["step"] == "2"
    other = small_config(MODEL, {"kind": "ct"})
    with pytest.raises(UserError, match="holds another model"):
        write_diffusers(tmp_path / "x", random_weights(MODEL), config=other, step=3, weights_name="master")


def test_openais_names_in_a_safetensors_file_need_a_config(tmp_path: Path) -> None:
    weights = random_weights(MODEL)
    save_file(weights, tmp_path / "x.safetensors")
    (tmp_path / "config.yaml").write_text(dump_config(CONFIG))
    with pytest.raises(UserError, match="holds weights without a config; give --config"):
        load_source(str(tmp_path / "x.safetensors"))
    found = load_source(str(tmp_path / "x.safetensors"), config=str(tmp_path / "config.yaml"))
    assert all(torch.equal(found.weights[name], weights[name]) for name in weights)


def test_the_name_of_a_hub_is_refused_with_the_way_to_download(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"`hf download openai/diffusers-x --local-dir diffusers-x`: then give"):
        load_source("openai/diffusers-x")
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="no run, checkpoint or exported weights"):
        load_source("runs/typo")


@pytest.mark.parametrize(
    "method", [{"kind": "cd", "teacher": "t"}, {"kind": "ct"}, {"kind": "ect", "teacher": "t"}, {"kind": "ict"}]
)
def test_the_cards_timesteps_give_our_samples(tmp_path: Path, method: dict[str, str]) -> None:
    diffusers = pytest.importorskip("diffusers", reason="the extra `export` is not installed")
    config = small_config(MODEL, method)
    card = model_card(config, step=5, weights_name="master", format="diffusers")
    write_diffusers(tmp_path, random_weights(MODEL), config=config, step=5, weights_name="master", card=card)
    source = load_source(str(tmp_path))
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    again = torch.randn(noise.shape, generator=torch.Generator().manual_seed(2))
    lines = [line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("- `--steps")]
    assert len(lines) == 2
    for steps, line in enumerate(lines, start=1):
        timesteps = json.loads(line.split("timesteps=")[1].split("`")[0])
        theirs = pipeline(
            latents=noise,
            timesteps=timesteps,
            num_inference_steps=None,
            generator=torch.Generator().manual_seed(2),
            output_type="pt",
        ).images
        sigmas = default_sigmas(config.method, steps)
        if "--sampling-times " in line:
            given = [float(each) for each in line.split("--sampling-times ")[1].strip("`").split(",")]
            assert given[1] == pytest.approx(float(sigmas[1]), rel=0.2)
            sigmas = torch.tensor(given, dtype=torch.float64)
        denoise = clipped(source.denoiser(torch.device("cpu")))
        ours = multistep(denoise, noise, sigmas, draw=lambda _: again, sigma_min=config.method.boundary)
        assert relative(ours / 2 + 0.5, theirs) < 1e-5
