"""What the `cmscale` command promises: files that others read, one line for a mistake, keyed samples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from evaluation_fixtures import build_cheap_features, write_dataset, write_trained_run
from PIL import Image
from pydantic import TypeAdapter

from cmscale.config import Config, parse_config
from cmscale.config.methods import Method
from cmscale.interop import read_openai, read_safetensors, write_openai, write_safetensors
from cmscale.model.unet import build_unet
from cmscale.report.facts import read_facts
from cmscale.report.pictures import read_pictures

TEXT = """
method: {kind: ct, distance: l2}
model: {image_size: 16, channels: 32, channel_multipliers: [1, 1], num_res_blocks: 1, attention_resolutions: [8],
        head_channels: 32}
data: {path: nowhere}
optimizer: {learning_rate: 1e-3}
train: {total_steps: 10, global_batch_size: 8, micro_batch_size: 2}
ema: {rates: [0.9]}
"""


@pytest.fixture(scope="module")
def config() -> Config:
    return parse_config(TEXT)


@pytest.fixture(scope="module")
def weights(config: Config) -> dict[str, torch.Tensor]:
    """A network that is no identity: the layers that start at zero are filled."""
    source = torch.Generator().manual_seed(1)
    state = build_unet(config.model, seed=3).state_dict()
    return {name: torch.randn(v.shape, generator=source) * 0.05 if not v.any() else v for name, v in state.items()}


@pytest.fixture(scope="module")
def model(config: Config, weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    write_safetensors(path, weights, config=config, step=7, weights_name="ema_0.9")
    return path


def test_samples_are_uint8_nhwc_and_depend_on_seed_and_index_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = [tmp_path / name for name in ("a.npz", "b.npz", "c.npz")]
    assert run(monkeypatch, "sample", model, "--samples", 5, "--steps", 2, "--out", where[0], "--batch-size", 5) == 0
    assert run(monkeypatch, "sample", model, "--samples", 3, "--steps", 2, "--out", where[1], "--batch-size", 1) == 0
    assert run(monkeypatch, "sample", model, "--samples", 3, "--steps", 2, "--out", where[2], "--seed", 1) == 0
    first, second, other = (np.load(path)["arr_0"] for path in where)
    assert (first.shape, first.dtype) == ((5, 16, 16, 3), np.uint8)
    # One level of uint8 at the most: a convolution's rounding may depend on its batch.
    assert np.abs(first[:3].astype(int) - second).max() <= 1
    assert np.abs(first[:3].astype(int) - other).max() > 10


def test_given_noise_and_raw_output_let_two_implementations_be_compared(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Config, weights: dict[str, torch.Tensor]
) -> None:
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "noise.npy", noise.numpy())
    arguments = ["--samples", 2, "--noise", tmp_path / "noise.npy", "--raw", "--out", tmp_path / "raw.npz"]
    assert run(monkeypatch, "sample", model, *arguments, "--grid", tmp_path / "grid.png") == 0
    network = build_unet(config.model).eval()
    network.load_state_dict(weights)
    t, sd, eps = 80.0, 0.5, 0.002
    c_noise = torch.full((2,), 250 * np.log(t), dtype=torch.float32)
    with torch.no_grad():
        raw = network((noise * t) / np.sqrt(t**2 + sd**2), c_noise)
    skip, out = sd**2 / ((t - eps) ** 2 + sd**2), sd * (t - eps) / np.sqrt(t**2 + sd**2)
    expected = skip * t * noise + out * raw
    assert np.load(tmp_path / "raw.npz")["arr_0"] == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-5)
    assert Image.open(tmp_path / "grid.png").size == (2 * 66 + 2, 66 + 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "nowhere", "--out", "x.npz"], "nowhere: no run, checkpoint or exported weights"),
        (["sample", "MODEL", "--out", "x.npz", "--sampling-times", "1,2"], "--sampling-times: got '1,2'"),
        (["sample", "MODEL", "--out", "x.npz", "--noise", "no.npy"], "--noise no.npy: no such file"),
        (["sample", "MODEL", "--out", "x.npz", "--config", "c.yaml"], "--config: has no effect on an exported file"),
        (["sample", "weights.pt", "--out", "x.npz"], "weights.pt: no such file"),
        (["edit", "inpaint", "MODEL", "absent.png"], "absent.png: no such file"),
        (["edit", "superres", "MODEL"], "give at least one image"),
        (["edit", "interpolate", "MODEL", "one.png"], "one.png: no such file"),
        (["export", "MODEL", "--to", "weights.bin"], "must end in .safetensors"),
        (["evaluate", "MODEL", "--features", "efficientnet", "--out", "x.json"], "nowhere: no such file or folder"),
        (["report", "nowhere"], "nowhere: not a run"),
        (["runs", "nowhere"], "nowhere: no such folder"),
        (["verify", "nowhere"], "nowhere: no run, checkpoint or exported weights"),
        (["estimate", "absent.yaml"], "absent.yaml: no such file"),
        (["sample", "MODEL", "--out", "x.npz", "--device", "cuda"], "no CUDA device"),
        (
            ["sample", "MODEL", "--out", "x.npz", "--sampling-times", "500,2"],
            "--sampling-times 500,2: 500 is outside the model's times",
        ),
        (
            ["sample", "MODEL", "--out", "x.npz", "--sampling-times", "80,0"],
            "0 is outside the model's times, 0.002 to 80",
        ),
        (["sample", "MODEL", "--out", "x.npz", "--sampling-times", "1e9"], "1e+09 is outside"),
        (["sample", "MODEL", "--out", "x.npz", "--sampling-times", "nan"], "must descend"),
        (["sample", "MODEL", "--out", "gs://bucket/x.npz"], "--out gs://bucket/x.npz: gs:// is not supported"),
        (["sample", "MODEL", "--out", "x.png"], "--out x.png: the file's name must end in .npz"),
        (["sample", "MODEL", "--out", "x.foo"], "--out x.foo: the file's name must end in .npz, or name a folder"),
        (["sample", "MODEL", "--out", "x.npz", "--steps", "999999"], "--steps: got 999999; it should be less than"),
        (["evaluate", "MODEL", "--steps", "1,999999"], "--steps: got 999999 steps; at most 10000, as each evaluates"),
        (
            ["edit", "colorize", "MODEL", "x.png", "--steps", "999999"],
            "'--steps': got '999999'; it should be less than",
        ),
        (["sample", "MODEL", "--out", "~nobody-here/x.npz"], "there is no user"),
        (["search-times", "MODEL", "--out", "s3://bucket/x.json"], "must be on this machine"),
        (["runs", "s3://bucket/runs"], "the folder of runs must be on this machine"),
        (["report", "s3://bucket/run"], "must be on this machine"),
        (["sample", "/nowhere", "--out", "x.npz", "--config", "c.yaml"], "/nowhere: no run, checkpoint or exported"),
        (["evaluate", "photo.png"], "photo.png: no run, checkpoint or exported weights there; no such file"),
        (["estimate", "a.yaml", "--nodes", "x"], "'--nodes': got 'x'; it should be a whole number"),
        (["evaluate"], "Missing argument 'SOURCE' (see cmscale evaluate --help)"),
        (
            ["evaluate", "MODEL", "--samples", "1"],
            "Invalid value for '--samples': got '1'; it should be greater than or equal to 2",
        ),
        (["evaluate", "MODEL", "--features", "squeezenet"], "--features: got 'squeezenet'; allowed: dinov2"),
        (["evaluate", "MODEL", "--steps", "0"], "--steps: got '0'; write whole numbers of at least 1"),
        (["sample", "MODEL", "--out", "x.npz", "--weights", ""], "--weights: got an empty text; give a value"),
        (["edit", "inpaint", "MODEL", "x.png", "--box", ""], "--box: got an empty text"),
        (["evaluate", "MODEL", "--steps", "", "--out", "x.json"], "--steps: got an empty text"),
        (["sample", "MODEL", "one", "more", "--out", "x.npz"], "one: one argument too many"),
        (["evaluate", "MODEL", "more", "--out", "x.json"], "more: one argument too many"),
        (["edit", "inpaint", "MODEL", "."], ".: is a folder; give a file"),
        (["edit", "inpaint", "MODEL", "a=b.png"], "a=b.png: is no file, and has no effect"),
        (["sampel"], "Did you mean 'sample'?"),
        (
            ["runs/a b", "sample", "--steps", "2"],
            "runs/a b: is no command; did you mean: cmscale sample 'runs/a b' --ste",
        ),
        (
            ["runs/a", "edit", "inpaint", "x.png"],
            "runs/a: is no command; did you mean: cmscale edit inpaint runs/a x.png?",
        ),
        (
            ["edit", "runs/a", "inpaint", "x.png", "--box", "0,0,4,4"],
            "runs/a: stands too early; did you mean: cmscale edit inpaint runs/a x.png --box 0,0,4,4?",
        ),
        (
            ["edit", "runs/a", "--out", "inpaint"],
            "'runs/a' is not one of 'inpaint'",
        ),  # the value of an option is no task
        (["s3://b/runs/a"], "s3://b/runs/a: is no command; did you mean: cmscale COMMAND s3://b/runs/a?"),
        (["train", "c.yaml"], "train: is no command here; training starts with `python launchers/submit.py CONFIG`"),
        (["version"], "version: is no command here; `cmscale --version` prints it"),
        (["help", "sample"], "help: is no command here; `cmscale --help` lists commands"),
        (["estimate", "absent.yaml", "--tflops", "0"], "--tflops 0.0: give a number from 1e-09 to 1e+09"),
        (["estimate", "absent.yaml", "--price", "inf"], "--price inf: give a number from"),
    ],
)
def test_a_mistake_is_one_line_with_status_2_and_leaves_nothing(
    arguments: list[str], words: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    if words == "no CUDA device" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *(model if word == "MODEL" else word for word in arguments)) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []


def test_openai_weights_come_in_with_a_config_and_go_out_again(
    model: Path, config: Config, weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text(TEXT)
    write_openai(tmp_path / "given.pt", weights, model=config.model)
    taken = tmp_path / "taken.safetensors"
    arguments = [tmp_path / "given.pt", "--config", tmp_path / "config.yaml", "train.seed=5", "--to", taken]
    assert run(monkeypatch, "import", *arguments) == 0
    state, card = read_safetensors(taken)
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    assert parse_config(card["config"]).train.seed == 5
    assert run(monkeypatch, "export", taken, "--format", "openai", "--to", tmp_path / "back.pt") == 0
    back = read_openai(tmp_path / "back.pt", config.model)
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    assert "16x16" in (tmp_path / "back.pt.md").read_text()


@pytest.mark.parametrize("task", ["inpaint", "colorize", "superres", "stroke", "denoise", "interpolate"])
def test_every_edit_writes_its_result_alone_and_a_strip_if_asked(
    task: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    out, strip = tmp_path / "out.png", tmp_path / "strip.png"
    if task == "interpolate":
        assert run(monkeypatch, "edit", task, model, "--samples", 3, "--out", out) == 0
        assert Image.open(out).size == (3 * 66 + 2, 68)
        return
    chain = ("--steps", 3)
    options = {"inpaint": chain, "colorize": chain, "superres": (*chain, "--factor", 4)}
    more = options.get(task, ())
    assert run(monkeypatch, "edit", task, model, tmp_path / "in.png", *more, "--out", out, "--strip", strip) == 0
    result, shown = np.asarray(Image.open(out)), np.asarray(Image.open(strip))
    assert result.shape == (16, 16, 3)
    assert shown.shape == (68, 3 * 66 + 2, 3)
    before, after = (shown[2:66:4, 2 + 66 * column : 66 + 66 * column : 4] for column in (0, 2))
    assert np.array_equal(before, pixels)
    assert np.array_equal(after, result)
    if task == "inpaint":
        outside = np.ones((16, 16), bool)
        outside[4:12, 4:12] = False
        assert np.array_equal(result[outside], pixels[outside])  # kept pixels are kept exactly
        assert not np.array_equal(result[~outside], pixels[~outside])


def test_the_report_of_a_run_shows_the_edits_that_were_made_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = write_trained_run(tmp_path / "run", data=tmp_path / "nowhere")
    for name in ("a b.png", "c.png"):
        Image.new("RGB", (8, 8), "teal").save(tmp_path / name)
    out, images = ("--out", tmp_path / "out.png"), (tmp_path / "a b.png", tmp_path / "c.png")
    assert run(monkeypatch, "edit", "stroke", made.root, *images, *out, "--in-report") == 0
    assert capsys.readouterr().out.splitlines()[2] == str(made.edits / "stroke_a_b_and_1_more_step_7.png")
    assert run(monkeypatch, "edit", "interpolate", made.root, *out, "--in-report") == 0
    assert (made.edits / "interpolate_step_7.png").read_bytes() == (tmp_path / "out.png").read_bytes()
    shown = read_pictures(read_facts(made))
    assert [each.caption for each in shown.edits] == ["interpolate step 7", "stroke a b and 1 more step 7"]
    assert run(monkeypatch, "edit", "stroke", "s3://bucket/run", images[0], *out, "--in-report") == 2
    assert run(monkeypatch, "edit", "stroke", made.checkpoint(7), images[0], *out, "--in-report") == 2


def test_a_small_picture_keeps_its_pixels_and_each_image_gets_a_result(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    small = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    images = [tmp_path / f"{name}.png" for name in "ab"]
    for path, pixels in zip(images, small, strict=True):
        Image.fromarray(pixels).save(path)
    out = tmp_path / "out.png"
    assert run(monkeypatch, "edit", "superres", model, *images, "--factor", 4, "--steps", 3, "--out", out) == 0
    written = [Path(line) for line in capsys.readouterr().out.split()]
    assert written == [tmp_path / "out-1.png", tmp_path / "out-2.png"]
    for path, pixels in zip(written, small, strict=True):
        means = np.asarray(Image.open(path)).astype(float).reshape(4, 4, 4, 4, 3).mean((1, 3))
        assert np.abs(means - pixels).max() <= 0.5  # of 255: the result is rounded to uint8


def test_a_mask_by_transparency_works_and_one_of_another_size_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    opacity = np.full((16, 16), 255, np.uint8)
    opacity[2:9, 3:11] = 0
    mask, out = tmp_path / "mask.png", tmp_path / "out.png"
    Image.fromarray(np.dstack([pixels, opacity])).save(mask)
    command = ("edit", "inpaint", model, tmp_path / "in.png", "--mask", mask, "--steps", 3, "--out", out)
    assert run(monkeypatch, *command) == 0
    assert "transparent pixels are missing" in capsys.readouterr().err
    changed = (np.asarray(Image.open(out)) != pixels).any(-1)
    assert not changed[opacity == 255].any()
    assert changed[opacity == 0].mean() > 0.9
    out.unlink()
    Image.fromarray(np.full((20, 16), 255, np.uint8)).save(mask)
    assert run(monkeypatch, *command) == 2
    assert "16 x 20 pixels" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_estimate_counts_the_lsun_network_without_making_it(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    config = Path(__file__).parents[2] / "configs" / "lsun_bedroom_ct.yaml"
    monkeypatch.setattr(
        "cmscale.training.estimate.counts.micro_batch_peak", lambda *given, **more: 1e9
    )  # for time's sake
    assert run(monkeypatch, "estimate", config, "--nodes", 8) == 0
    said = capsys.readouterr().out
    assert "526.3 M" in said
    assert "2.24 TFLOP" in said


def test_the_schema_is_json_that_knows_every_section(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert run(monkeypatch, "schema") == 0
    properties = json.loads(capsys.readouterr().out)["properties"]
    assert {"method", "model", "data", "train", "engine"} <= properties.keys()


def test_what_lies_near_a_right_source_is_refused_by_its_own_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("cmscale.evaluation.session.build_features", build_cheap_features)
    data = write_dataset(tmp_path, count=4)
    trained = write_trained_run(tmp_path / "run", data=data, samples=12).root
    for words, said in (
        (["verify", data], "is a prepared data set; verify it with data_prep/verify.py"),
        (["runs", trained], "is a run; give the folder that holds runs"),
        (["evaluate", model, "--reference", trained, "--out", tmp_path / "x.json"], "is a run; give its data"),
        (["evaluate", model, "--reference", trained / "config.yaml", "--out", tmp_path / "x.json"], "no reference"),
    ):
        assert run(monkeypatch, *words) == 2
        told = capsys.readouterr().err
        assert said in told, told
        assert told.count("\n") == 1


def test_weights_that_a_format_can_not_express_are_refused_and_those_it_computes_otherwise_are_named(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    weights = build_unet(config.model).state_dict()
    for name, method, format, status, said in (
        ("edm", {"kind": "edm"}, "diffusers", 2, "diffusers has no pipeline for EDM"),
        ("sct", {"kind": "sct"}, "openai", 2, "OpenAI's code can't compute this model's time embedding"),
        ("other", {"kind": "ct", "sigma_data": 0.25}, "openai", 0, "caution: OpenAI's code takes sigma_data 0.5"),
        ("same", {"kind": "ct"}, "openai", 0, ""),
    ):
        made = config.model_copy(update={"method": TypeAdapter(Method).validate_python(method)})
        source, to = tmp_path / f"{name}.safetensors", tmp_path / f"{name}.pt"
        write_safetensors(source, weights, config=made, step=7, weights_name="ema_0.9")
        assert run(monkeypatch, "export", source, "--format", format, "--to", to) == status
        told = capsys.readouterr().err
        assert told.startswith((said, f"cmscale: {to}: {said}"))
        assert told.count("\n") == bool(said)
        assert to.exists() == (status == 0)
