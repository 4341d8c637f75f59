"""What `cmscale.load` promises: the samples and edits of the commands, from files, PIL images and tensors."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from evaluation_fixtures import write_trained_run
from networks import random_weights, small_config, small_model
from PIL import Image

import cmscale
from cmscale.errors import NoSpace
from cmscale.interop import write_safetensors
from cmscale.io.image_tensors import from_uint8

EDITS: dict[str, dict[str, Any]] = {
    "inpaint": {"steps": 3},
    "colorize": {"steps": 3},
    "superres": {"steps": 3, "factor": 4},
    "stroke": {},
    "denoise": {"sigma": 0.5, "seed": 0},
}


def _saved(folder: Path, method: dict[str, Any]) -> Path:
    config = small_config(small_model("as LSUN 256"), method)
    path = folder / f"{method['kind']}.safetensors"
    write_safetensors(path, random_weights(config.model), config=config, step=7, weights_name="ema_0.9")
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _saved(tmp_path_factory.mktemp("models"), {"kind": "ct"})


@pytest.fixture(scope="module")
def model(file: Path) -> cmscale.Model:
    return cmscale.load(file, device="cpu")


@pytest.fixture
def photograph(model: cmscale.Model, tmp_path: Path) -> Path:
    size = model.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photograph.png")
    return tmp_path / "photograph.png"


@pytest.fixture
def hole(model: cmscale.Model, tmp_path: Path) -> Path:
    pixels = np.zeros((model.image_size, model.image_size), np.uint8)
    pixels[: model.image_size // 2] = 255
    Image.fromarray(pixels).save(tmp_path / "hole.png")
    return tmp_path / "hole.png"


def test_the_package_opens_without_torch() -> None:
    code = "import cmscale, sys; cmscale.Config; cmscale.UserError; assert 'torch' not in sys.modules; dir(cmscale)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = cmscale.lode  # type: ignore[attr-defined]


def test_a_model_names_itself(model: cmscale.Model, file: Path) -> None:
    assert repr(model) == f"<cmscale.Model ct {model.image_size} px, ema_0.9 of step 7, {file}>"
    assert (model.step, model.weights, model.config.method.kind) == (7, "ema_0.9", "ct")


def test_samples_are_those_of_the_command(
    model: cmscale.Model, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, "sample", file, "--num", 3, "--steps", 2, "--seed", 5, "--out", tmp_path / "a.npz") == 0
    expected = np.load(tmp_path / "a.npz")["arr_0"]
    samples = model.sample(3, steps=2, seed=5)
    assert np.array_equal(np.stack([np.asarray(each) for each in samples]), expected)
    times = model.sample(3, times=(80.0, 1.0), seed=5, tensors=True)
    assert times.shape == (3, 3, model.image_size, model.image_size)
    assert times.dtype == torch.float32


@pytest.mark.parametrize("format", ["safetensors", "diffusers"])
@pytest.mark.parametrize("place", ["local", "s3"])
def test_the_folder_of_an_export_is_a_model(
    place: str, format: str, model: cmscale.Model, file: Path, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = f"{s3}/hub/{format}" if place == "s3" else str(tmp_path / "hub")
    assert run(monkeypatch, "export", file, "--format", format, "--to", folder) == 0
    exported = cmscale.load(folder, device="cpu")
    assert repr(exported) == f"<cmscale.Model ct {model.image_size} px, ema_0.9 of step 7, {folder}>"
    assert torch.equal(exported.sample(2, seed=3, tensors=True), model.sample(2, seed=3, tensors=True))
    assert run(monkeypatch, "sample", folder, "--samples", 2, "--out", tmp_path / "x.npz") == 0
    assert run(monkeypatch, "config", "diff", folder, file) == 0


def test_a_folder_with_weights_of_another_project_asks_for_a_config(file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from cmscale.config import dump_config

    (tmp_path / "theirs").mkdir()
    save_file(load_file(file), tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(cmscale.UserError, match="theirs: holds weights without a config; give config="):
        cmscale.load(tmp_path / "theirs")
    model = cmscale.load(file, device="cpu")
    (tmp_path / "c.yaml").write_text(dump_config(model.config))
    imported = cmscale.load(tmp_path / "theirs", config=tmp_path / "c.yaml", device="cpu")
    assert torch.equal(imported.sample(1, tensors=True), model.sample(1, tensors=True))


@pytest.mark.parametrize("task", EDITS)
def test_an_edit_of_a_file_an_image_and_a_tensor_is_that_of_the_command(
    task: str, model: cmscale.Model, file: Path, photograph: Path, hole: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = EDITS[task]
    masks = ["--mask", hole] if task == "inpaint" else []
    options = [text for name, value in settings.items() for text in (f"--{name}", value)]
    assert run(monkeypatch, "edit", task, file, photograph, *masks, *options, "--out", tmp_path / "out.png") == 0
    expected = np.asarray(Image.open(tmp_path / "out.png"))
    edit = getattr(model, task)
    pixels = np.array(Image.open(photograph))
    tensor = from_uint8(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
    forms: dict[str, tuple[Any, Any]] = {
        "file": (str(photograph), hole),
        "path": (photograph, Image.open(hole)),
        "image": (Image.open(photograph), hole),
        "tensor": (tensor, np.asarray(Image.open(hole)) > 0),
        "batch of one mask": (tensor, torch.from_numpy(np.asarray(Image.open(hole)) > 0)[None, None]),
    }
    for form, (image, mask) in forms.items():
        arguments = (image, mask) if task == "inpaint" else (image,)
        assert np.array_equal(np.asarray(edit(*arguments, **settings)), expected), form
    others = {"mask": torch.from_numpy(np.asarray(Image.open(hole)) > 0)} if task == "inpaint" else {}
    result = edit(torch.stack([tensor, tensor]), **others, **settings, tensors=True)
    assert result.shape == (2, *tensor.shape)
    single = edit(tensor, **others, **settings, tensors=True)
    assert single.shape == tensor.shape
    pair = edit([photograph, photograph], **others, **settings)
    assert [type(each) for each in pair] == [Image.Image] * 2


def test_denoise_without_a_seed_takes_images_that_are_noisy(model: cmscale.Model) -> None:
    noisy = torch.full((3, model.image_size, model.image_size), 0.25)
    sigma = torch.full((1,), 0.5, dtype=torch.float64)
    assert torch.allclose(model.denoise(noisy, sigma=0.5, tensors=True), model.denoiser(noisy[None], sigma)[0])


def test_interpolation_is_that_of_the_command(
    model: cmscale.Model, file: Path, photograph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        run(monkeypatch, "edit", "interpolate", file, "--count", 3, "--seed", 2, "--out", tmp_path / "strip.png") == 0
    )
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    images = model.interpolate(count=3, seed=2)
    factor = (strip.shape[0] - 4) // model.image_size
    first = strip[2 : 2 + factor * model.image_size : factor, 2 : 2 + factor * model.image_size : factor]
    assert len(images) == 3
    assert np.array_equal(np.asarray(images[0]), first)
    with pytest.raises(cmscale.UserError, match="give two, or none"):
        model.interpolate(photograph)


PICTURE = Image.new("RGB", (16, 16))
HOLE = np.ones((16, 16), bool)


def _half() -> io.BytesIO:
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "PNG")
    return io.BytesIO(whole.getvalue()[: len(whole.getvalue()) // 2])


def _closed() -> Image.Image:
    image = Image.new("RGB", (16, 16))
    image.close()
    return image


MISTAKES: dict[str, tuple[Any, str]] = {
    "steps and times": (lambda model: model.sample(1, steps=2, times=(80.0, 1.0)), "no effect beside times"),
    "times out of range": (lambda model: model.sample(1, times=(500.0,)), "^times"),
    "times that ascend": (lambda model: model.sample(1, times=(1.0, 80.0)), "descend"),
    "one time": (lambda model: model.sample(1, times=80.0), "^times: got 80.0; give several numbers"),
    "words as times": (lambda model: model.sample(1, times=["a"]), "^times: got 'a'; give a number"),
    "no times": (lambda model: model.sample(1, times=[]), r"^times: got \[\]; give several numbers"),
    "a text of times": (lambda model: model.sample(1, times="80,1"), "^times: got '80,1'; give several"),
    "no samples": (lambda model: model.sample(0), "^num: got 0; give a whole number, at least 1"),
    "more samples than memory": (lambda model: model.sample(10**14), "^num: 10{14} need .* GiB of memory"),
    "half a sample": (lambda model: model.sample(1.5), "^num: got 1.5"),
    "samples in words": (lambda model: model.sample("4"), "^num: got '4'"),
    "true samples": (lambda model: model.sample(True), "^num: got True"),
    "half a seed": (lambda model: model.sample(seed=0.5), "^seed: got 0.5"),
    "no seed": (lambda model: model.sample(seed=None), "^seed: got None"),
    "a negative seed": (lambda model: model.sample(seed=-1), "^seed: got -1; give a whole number, at least 0"),
    "half a step": (lambda model: model.sample(steps=1.5), "^steps: got 1.5"),
    "too many steps": (lambda model: model.sample(steps=10**6), "^steps: got 1000000; give at most"),
    "an empty batch": (lambda model: model.sample(batch_size=0), "^batch_size: got 0"),
    "a sampler": (lambda model: model.sample(1, sampler="euler"), "no effect on a consistency model"),
    "no sampler": (lambda model: model.sample(1, sampler="foo"), "^sampler: got 'foo'; choose from heun, "),
    "times without an order": (lambda model: model.sample(1, times={80.0, 1.0}), r"^times: got \{.*; give several"),
    "times of a dict": (lambda model: model.sample(1, times={80.0: 1}), r"^times: got \{80.0: 1\}; give several"),
    "clip in words": (lambda model: model.sample(clip="no"), "^clip: got 'no'; give True or False"),
    "samples as": (lambda model: model.sample(tensors="pt"), "^tensors: got 'pt'; give True or False"),
    "edits as": (lambda model: model.stroke(PICTURE, tensors=None), "^tensors: got None"),
    "strips as": (lambda model: model.interpolate(tensors="pt"), "^tensors: got 'pt'"),
    "classes": (lambda model: model.sample(1, classes=[1]), "^classes: .* unconditional"),
    "a class": (lambda model: model.sample(1, classes=3), "^classes: got 3; give a list"),
    "no classes": (lambda model: model.sample(1, classes=[]), r"^classes: got \[\]; give a list"),
    "a class in words": (lambda model: model.sample(1, classes="all"), "^classes: got 'all'; choose from random"),
    "a negative class": (lambda model: model.sample(1, classes=[-1]), "^classes: got -1"),
    "no image": (lambda model: model.colorize([]), "no image"),
    "no images": (lambda model: model.colorize(torch.zeros(0, 3, 16, 16)), "no image"),
    "None": (lambda model: model.colorize(None), "NoneType; give a file"),
    "a number": (lambda model: model.colorize(3), "is int; give a file"),
    "bytes": (lambda model: model.colorize(b"abc"), "is bytes; give a file"),
    "an open file": (lambda model: model.colorize(io.BytesIO(b"abc")), "is BytesIO; give a file"),
    "a set": (lambda model: model.colorize({"a.png", "b.png"}), "is set; give a file"),
    "a closed image": (lambda model: model.colorize(_closed()), "image 0: .*closed image"),
    "half a file": (lambda model: model.colorize(Image.open(_half())), "image 0: .*truncated"),
    "no mask": (lambda model: model.inpaint(PICTURE, mask=None), "^mask: got None; give a file"),
    "a mask of levels": (lambda model: model.inpaint(PICTURE, np.zeros((16, 16), np.uint8)), "such as levels > 127"),
    "a dict": (lambda model: model.colorize({"image": PICTURE}), "is dict; give a file"),
    "an array of floats": (lambda model: model.colorize(np.zeros((16, 16, 3))), r"float64 .* in \[-1, 1\]"),
    "an array of another shape": (lambda model: model.colorize(np.zeros((3, 16, 16), np.uint8)), "give uint8"),
    "an array without pixels": (lambda model: model.colorize(np.zeros((0, 4, 3), np.uint8)), "give an image that has"),
    "an image without pixels": (lambda model: model.colorize(Image.new("RGB", (0, 4))), "0 x 4 pixels"),
    "an image of a mode": (lambda model: model.colorize(PICTURE.convert("HSV")), "mode HSV; convert it to RGB"),
    "a tensor of another size": (lambda model: model.colorize(torch.zeros(3, 5, 5)), r"float32 \[3, 5, 5\]; give"),
    "a tensor without colours": (lambda model: model.colorize(torch.zeros(16, 16)), r"float32 \[16, 16\]; give float"),
    "a tensor of levels": (lambda model: model.colorize(torch.full((3, 16, 16), 255.0)), r"give values in \[-1, 1\]"),
    "NaN": (lambda model: model.stroke(torch.full((3, 16, 16), torch.nan)), "NaN"),
    "a missing file": (lambda model: model.stroke("/nowhere.png"), "no such file"),
    "a mask of numbers": (lambda model: model.inpaint(PICTURE, mask=np.zeros((9, 9))), "^mask: .* bool array"),
    "a mask of nothing": (lambda model: model.inpaint(PICTURE, mask=~HOLE), "^mask: nothing is missing"),
    "a small mask": (lambda model: model.inpaint(PICTURE, mask=HOLE[:4, :4]), "^mask: 4 x 4 pixels"),
    "sigma": (lambda model: model.denoise(PICTURE, sigma=500), "^sigma 500"),
    "sigma in words": (lambda model: model.denoise(PICTURE, sigma="1"), "^sigma: got '1'"),
    "one step": (lambda model: model.colorize(PICTURE, steps=1), "^steps: got 1; .* at least 2"),
    "steps and a half": (lambda model: model.inpaint(PICTURE, HOLE, steps=2.5), "^steps: got 2.5"),
    "a factor": (lambda model: model.superres(PICTURE, factor=3), "^factor: 3 does not divide"),
    "a factor and a half": (lambda model: model.superres(PICTURE, factor=2.5), "^factor: got 2.5"),
    "one image of many": (lambda model: model.interpolate(PICTURE, PICTURE, count=1), "^count: got 1"),
    "two images as an end": (lambda model: model.interpolate(torch.zeros(2, 3, 16, 16), PICTURE), "of several images"),
    "float pixels": (lambda model: model.stroke(Image.new("F", (9, 9))), "range is not stated"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str, model: cmscale.Model) -> None:
    call, message = MISTAKES[mistake]
    with pytest.raises(cmscale.UserError, match=message):
        call(model)


WRONG_LOADS: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"weights": 1}, "^weights: got 1; give a string"),
    "a step": ({"step": "latest"}, "^step: got 'latest'; give a whole number"),
    "a device": ({"device": "tpu"}, "^device: got 'tpu'; give auto, cpu"),
    "a device that is not here": ({"device": "cuda:99"}, "^device: got 'cuda:99', and this machine has"),
    "overrides as text": ({"overrides": "train.seed=1"}, "^overrides: got 'train.seed=1'; give a list"),
    "overrides of nothing": ({"overrides": ["train.seed=1"]}, "^overrides: have no effect without config"),
    "a config that is not needed": ({"config": "x.yaml"}, "^config: .* has its own config"),
    "overrides of None": ({"overrides": None}, "^overrides: got None; give a list of key=value"),
    "overrides as a dict": ({"overrides": {"train.seed": 1}}, "^overrides: got .*; give a list of key=value"),
    "weights of a file": ({"weights": "ema_0.5"}, "^weights: has no effect on an exported file, only on a run or"),
    "a step of a file": ({"step": 8}, "^step: has no effect on an exported file, only on a run; leave it out"),
    "a number as config": ({"config": 3}, "^config: got 3; give a path"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG_LOADS)
def test_a_mistake_in_loading_is_named(mistake: str, file: Path) -> None:
    arguments, message = WRONG_LOADS[mistake]
    with pytest.raises(cmscale.UserError, match=message):
        cmscale.load(file, **arguments)


def test_several_mistakes_stay_a_line_each_and_a_full_disk_stays_one(file: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "weights.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "config.yaml").write_text("method: {kind: ct}\nmodel: {image_size: many}\ntrain: {seed: -1}\n")
    with pytest.raises(cmscale.UserError) as refused:
        cmscale.load(tmp_path / "weights.pt", config=tmp_path / "config.yaml")
    assert len(refused.value.args) > 2

    def full(*_: Any, **__: Any) -> None:
        raise NoSpace("no space for --weights")

    monkeypatch.setattr("cmscale.library.model.load_source", full)
    with pytest.raises(NoSpace, match=r"^no space for weights$"):
        cmscale.load(file)


@pytest.mark.parametrize("source", [None, 3, b"abc", ["a"], "a\0b"], ids=repr)
def test_what_is_no_path_is_no_source(source: Any) -> None:
    with pytest.raises(cmscale.UserError, match=r"^source: got .*; give a path or an s3:// URL"):
        cmscale.load(source)


def test_devices_are_named_as_in_torch(file: Path) -> None:
    assert cmscale.load(file, device=torch.device("cpu")).device == torch.device("cpu")


def test_arrays_are_images(model: cmscale.Model, photograph: Path) -> None:
    pixels = np.asarray(Image.open(photograph))
    assert np.asarray(model.stroke(pixels)).tolist() == np.asarray(model.stroke(photograph)).tolist()
    assert len(model.stroke(np.stack([pixels, pixels]))) == 2
    assert len(model.stroke(image for image in [pixels, pixels])) == 2
    assert len(model.sample(np.int64(2), seed=torch.tensor(3))) == 2
    assert len(model.sample(times=np.array([80.0, 1.0]))) == 1


def test_an_image_with_damaged_exif_data_is_one_without(model: cmscale.Model, photograph: Path, tmp_path: Path) -> None:
    with Image.open(photograph) as whole:
        whole.save(tmp_path / "damaged.png", exif=b"no TIFF file")
    expected = np.asarray(model.stroke(photograph))
    for given in (tmp_path / "damaged.png", Image.open(tmp_path / "damaged.png")):
        assert np.array_equal(np.asarray(model.stroke(given)), expected)


def test_a_diffusion_model_samples_and_does_not_edit(tmp_path: Path) -> None:
    teacher = cmscale.load(_saved(tmp_path, {"kind": "edm", "sampler_steps": 3}), device="cpu")
    assert len(teacher.sample(2, sampler="euler", steps=2)) == 2
    with pytest.raises(cmscale.UserError, match="diffusion model"):
        teacher.stroke(Image.new("RGB", (9, 9)))


def test_config_load_reads_files_and_overrides(tmp_path: Path, file: Path, model: cmscale.Model) -> None:
    from cmscale.config import dump_config

    (tmp_path / "c.yaml").write_text(dump_config(model.config))
    assert cmscale.Config.load(tmp_path / "c.yaml", "train.seed=9").train.seed == 9
    with pytest.raises(cmscale.UserError, match="no such file"):
        cmscale.Config.load(tmp_path / "nowhere.yaml")
    (tmp_path / "c.yaml").rename(tmp_path / "config.yaml")
    with pytest.raises(cmscale.UserError, match=r"is a folder; give .*/config.yaml"):
        cmscale.Config.load(tmp_path)
    with pytest.raises(cmscale.UserError, match=r"^path: got 3; give the path"):
        cmscale.Config.load(3)  # type: ignore[arg-type]


def test_the_home_folder_is_known_in_names_of_images(
    model: cmscale.Model, photograph: Path, hole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(photograph.parent))
    edited = model.inpaint("~/photograph.png", Path("~/hole.png"), steps=2)
    assert np.array_equal(np.asarray(edited), np.asarray(model.inpaint(photograph, hole, steps=2)))


@pytest.mark.parametrize("form", [str, Path])
def test_the_home_folder_is_known_in_names_of_runs(
    form: type[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_trained_run(tmp_path / "run", data=tmp_path / "none")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cmscale.load(form("~/run"), device="cpu").step == cmscale.load(run.root, device="cpu").step


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torch_s_default_dtype_changes_no_sample(dtype: torch.dtype, model: cmscale.Model, file: Path) -> None:
    expected = model.sample(2, seed=4, tensors=True)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(model.sample(2, seed=4, tensors=True), expected)
        assert torch.equal(cmscale.load(file, device="cpu").sample(2, seed=4, tensors=True), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_overrides_of_a_config_are_strings() -> None:
    with pytest.raises(cmscale.UserError, match=r"^overrides: got \['train.seed=1'\]; give each one as a string"):
        cmscale.Config.load(Path(__file__).parents[1] / "configs" / "demo_ct.yaml", ["train.seed=1"])  # type: ignore[arg-type]
