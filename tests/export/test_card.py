"""The model card describes the weights, their training and data, and their quality."""

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fault_proxy import FaultProxy
from networks import random_weights, small_config, small_model

import cmscale
from cmscale.config import dump_config, parse_config
from cmscale.config.methods import METHODS_BY_KIND
from cmscale.config.published import published
from cmscale.errors import UserError
from cmscale.evaluation.metrics.registry import all_metrics
from cmscale.export.card import model_card
from cmscale.export.target import check_license, check_target
from cmscale.export.weights import export_weights
from cmscale.io.place import Place
from cmscale.runs.folder import RunDir
from cmscale.runs.manifests import DatasetManifest
from cmscale.runs.results import EvaluationResult, Metric
from cmscale.source import Source

CONFIG = small_config(small_model())


def evaluation(
    *, step: int = 60, weights: str = "ema_0.999943", nfe: int = 1, **metrics: tuple[float, ...]
) -> EvaluationResult:
    return EvaluationResult(
        step=step,
        weights=weights,
        nfe=nfe,
        num_samples=50000,
        seeds=(0, 1),
        features="inception",
        score_name="FID",
        reference={"name": "crops"},
        metrics={name: Metric.of(values) for name, values in ({"fid": (7.8, 7.9)} | metrics).items()},
        seconds=1.0,
        protocol={"sigmas": [80.0]},
    )


def quality_table(*evaluations: EvaluationResult) -> list[list[str]]:
    """The cells of the card's table of evaluations, without the line under its header."""
    card = model_card(CONFIG, step=60, weights_name="ema_0.999943", evaluations=evaluations)
    lines = [line for line in card[card.index("## Quality") :].splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in rows}) == 1
    return [rows[0], *rows[2:]]


def test_the_card_holds_method_size_steps_and_the_whole_config() -> None:
    card = model_card(CONFIG, step=60, weights_name="ema_0.999943")
    assert f"This is {METHODS_BY_KIND['ct'].facts.description}: an ADM UNet" in card
    assert "| Paper | <https://arxiv.org/abs/2303.01469> |" in card
    count = sum(tensor.numel() for tensor in random_weights(CONFIG.model).values())
    assert f"{count / 1e6:.1f} M parameters for 16x16 images" in card
    assert "| Steps | 60 of 100 |" in card
    assert "| Images seen | 480 (global batch 8) |" in card
    assert "| Data | s3://bucket/data |" in card
    assert "Not evaluated." in card
    assert parse_config(card.split("```yaml\n")[1].split("```")[0]) == CONFIG


def test_the_data_sets_own_numbers_are_shown_if_known() -> None:
    manifest = DatasetManifest(
        format="mds", image_size=256, preprocess="adm", encoding="png", source="lsun:bedroom", count=3033042,
        shards=(), fingerprint="abc",
    )  # fmt: skip
    card = model_card(CONFIG, step=60, weights_name="ema_0.999943", dataset=manifest)
    assert "3,033,042 of lsun:bedroom, preprocessing adm, encoding png" in card
    assert "`abc`" in card


def test_evaluations_of_these_weights_are_a_table_and_others_are_left_out() -> None:
    one_step = evaluation(precision=(0.68,))
    two_steps = evaluation(nfe=2, fid=(5.22,)).model_copy(update={"times": (80.0, 4.0)})
    others = [evaluation(step=50, nfe=9, recall=(0.1,)), evaluation(weights="master", nfe=8)]
    assert quality_table(two_steps, one_step, *others) == [
        ["Network evaluations per sample", "Times", "Samples", "Seeds", "FID", "precision"],
        ["1", "80", "50,000", "0, 1", "7.85 ± 0.07", "0.680"],
        ["2", "80, 4", "50,000", "0, 1", "5.22", "-"],
    ]


def test_a_diffusion_models_times_are_those_at_which_it_is_evaluated() -> None:
    two = evaluation(nfe=3).model_copy(update={"protocol": {"sigmas": [80.0, 4.0, 0.0]}})
    many = evaluation(nfe=79).model_copy(update={"protocol": {"sigmas": [float(time) for time in range(40, -1, -1)]}})
    assert [row[1] for row in quality_table(two, many)[1:]] == ["80, 4", "40 times"]


@pytest.mark.parametrize("metric", all_metrics(), ids=lambda metric: metric.name)
def test_every_metric_is_a_column(metric) -> None:
    header, row = quality_table(evaluation(**{metric.name: (0.25,)}))
    assert row[header.index(metric.title_over("FID"))] == f"{0.25:{metric.format}}"


def test_of_one_score_and_reference_the_results_with_most_samples_are_shown_and_the_others_counted() -> None:
    few = evaluation(fid=(99.0,)).model_copy(update={"num_samples": 20})
    other = evaluation(fid=(3.0,)).model_copy(update={"reference": {"name": "other crops", "sha256": "4567"}})
    dino = evaluation(fid=(200.0,), kid=(0.5,)).model_copy(
        update={"features": "dinov2_vitl14", "score_name": "FD-DINOv2", "num_samples": 100}
    )
    replaced = evaluation(fid=(77.0,)).model_copy(update={"protocol": {"weights_sha256": "of an earlier training"}})
    card = model_card(
        CONFIG,
        step=60,
        weights_name="ema_0.999943",
        weights_sha256="mine",
        evaluations=[few, evaluation(), other, dino, replaced],
    )
    for shown in ("50,000 samples against crops", "50,000 samples against other crops", "7.85 ± 0.07", "3.00"):
        assert shown in card
    assert "100 samples against crops; features dinov2_vitl14" in card
    assert "KID-DINOv2" in card
    assert "99.00" not in card
    assert "77.00" not in card
    assert "Left out: 1 result of fewer samples or seeds." in card
    assert "Left out: 1 result of other weights that had this name." in card


def test_imported_weights_have_no_history() -> None:
    card = model_card(CONFIG, step=0, weights_name="imported")
    assert "| Weights | imported from another project |" in card
    history = (
        "Steps",
        "Images seen",
        "Optimizer",
        "Precision",
        "Data",
        "s3://",
        "seed",
        "total_steps",
        "learning_rate",
        "s0",
    )
    for word in history:
        assert word not in card, word
    assert "sigma_data: 0.5" in card
    assert "image_size: 16" in card


def test_where_files_lay_on_a_machine_is_not_in_a_card() -> None:
    local = ["data.path=/home/ada/sets/bedroom", "evaluate.reference=/home/ada/x.npz"]
    config = parse_config(dump_config(CONFIG), local)
    manifest = DatasetManifest(
        format="mds", image_size=256, preprocess="adm", encoding="png", source="lsun:/home/ada/bedroom_lmdb", count=3,
        shards=(), fingerprint="abc",
    )  # fmt: skip
    measured = evaluation().model_copy(
        update={
            "reference": {"name": "/home/ada/crops.npz", "sha256": "0123456789abcdef"},
            "warnings": ("/home/ada/crops: 40 images counted", "x of s3://bucket/crops"),
        }
    )
    card = model_card(config, step=60, weights_name="ema_0.999943", dataset=manifest, evaluations=[measured])
    assert "/home" not in card
    for shown in (
        "| Data | bedroom |",
        "3 of lsun:bedroom_lmdb, ",
        "50,000 samples against crops.npz (SHA-256 0123456789ab); features inception.",
        "Crops: 40 images counted.",
        "X of s3://bucket/crops.",
        "path: (elsewhere)/bedroom",
        "reference: (elsewhere)/x.npz",
    ):
        assert shown in card, shown


def test_the_card_of_an_openai_file_says_how_openais_code_computes_the_same() -> None:
    cards = {
        name: model_card(small_config(small_model(), method), step=60, weights_name="m", format="openai")
        for name, method in {
            "ct": {"kind": "ct", "sigma_max": 40},
            "other": {"kind": "ct", "sigma_data": 0.25},
            "ict": {"kind": "ict"},
            "edm": {"kind": "edm"},
        }.items()
    }
    assert "`--training_mode consistency_distillation --sigma_min 0.002 --sigma_max 40`" in cards["ct"]
    assert "KarrasDenoiser" not in cards["ct"] + cards["ict"]
    assert "OpenAI's code takes sigma_data 0.5, this model was trained with 0.25" in cards["other"]
    assert "--training_mode edm" in cards["edm"]
    assert "OpenAI" not in model_card(CONFIG, step=60, weights_name="m")


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_the_hub_reads_licence_task_and_scores_from_the_head() -> None:
    few = evaluation(fid=(99.0,)).model_copy(update={"num_samples": 20})
    given = [evaluation(precision=(0.68,)), evaluation(nfe=2, fid=(5.22,)), evaluation(step=50), few]
    card = model_card(CONFIG, step=60, weights_name="ema_0.999943", evaluations=given, license="apache-2.0")
    found = front_matter(card)
    assert found["license"] == "apache-2.0"
    assert "## Licence\n\n`apache-2.0`\n" in card
    assert (found["library_name"], found["pipeline_tag"]) == ("cmscale", "unconditional-image-generation")
    assert {"consistency-models", "unconditional-image-generation", "ct"} <= set(found["tags"])
    (model,) = found["model-index"]
    assert model["name"] == "CT at 16x16"
    of_many, of_few = model["results"]
    assert of_many["dataset"] == {"type": "images", "name": "crops"}
    scores = {metric["name"]: (metric["type"], metric["value"]) for metric in of_many["metrics"]}
    assert scores == {
        "FID (1 network evaluation, 50,000 samples against crops, features inception)": ("fid", 7.85),
        "precision (1 network evaluation, 50,000 samples against crops, features inception)": ("precision", 0.68),
        "FID (2 network evaluations, 50,000 samples against crops, features inception)": ("fid", 5.22),
    }
    assert "20 samples" in of_few["metrics"][0]["name"]
    assert not any(line.startswith("        ") for line in card.split("---\n")[1].splitlines())  # none is folded


def test_what_is_no_fid_has_another_type_on_the_hub() -> None:
    of_inception = evaluation(inception_score=(2.0,), precision=(0.5,))
    of_others = of_inception.model_copy(update={"features": "efficientnet_lite0", "score_name": "FD-EfficientNet"})
    types = []
    for measured in (of_inception, of_others):
        card = model_card(CONFIG, step=60, weights_name="ema_0.999943", evaluations=[measured])
        metrics = front_matter(card)["model-index"][0]["results"][0]["metrics"]
        types.append([metric["type"] for metric in metrics])
    assert types == [
        ["fid", "inception-score", "precision"],
        ["fd-efficientnet", "is-efficientnet-torch-fidelity", "precision-efficientnet"],
    ]


def test_the_head_tells_results_with_searched_times_from_others() -> None:
    searched = evaluation(nfe=2, fid=(5.0,)).model_copy(update={"times": (80.0, 1.5)})
    given = [evaluation(fid=(8.0,)), evaluation(nfe=2, fid=(6.0,)), searched]
    card = model_card(CONFIG, step=60, weights_name="ema_0.999943", evaluations=given)
    (shown,) = front_matter(card)["model-index"][0]["results"]
    names = {metric["value"]: metric["name"].partition(",")[0] for metric in shown["metrics"]}
    assert names == {
        8.0: "FID (1 network evaluation",
        6.0: "FID (2 network evaluations",
        5.0: "FID (2 network evaluations at 80 and 1.5",
    }


def test_the_hubs_own_reader_takes_the_head(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    given = [evaluation(precision=(0.68,)), evaluation(nfe=2, fid=(5.22,))]
    (tmp_path / "README.md").write_text(
        model_card(CONFIG, step=60, weights_name="ema_0.999943", evaluations=given, license="mit")
    )
    read = hub.ModelCard.load(tmp_path / "README.md").data
    assert (read.license, read.model_name) == ("mit", "CT at 16x16")
    assert [(each.metric_type, each.metric_value, each.dataset_name) for each in read.eval_results] == [
        ("fid", 7.85, "crops"), ("precision", 0.68, "crops"), ("fid", 5.22, "crops"),
    ]  # fmt: skip


def test_a_licence_that_nobody_stated_is_named_so() -> None:
    card = model_card(CONFIG, step=60, weights_name="m", format="diffusers")
    assert (front_matter(card)["license"], front_matter(card)["library_name"]) == ("unknown", "diffusers")
    assert "model-index" not in front_matter(card)
    assert "Not stated." in card
    with pytest.raises(UserError, match="--license My own"):
        check_license("My own")


def test_usage_names_the_file_beside_the_card() -> None:
    card = model_card(CONFIG, step=60, weights_name="m", file="cd.safetensors")
    assert 'model = cmscale.load("cd.safetensors")' in card
    assert "model.sample(4, steps=1)" in card
    teacher = model_card(small_config(small_model("as LSUN 256"), {"kind": "edm"}), step=60, weights_name="m")
    assert "model.sample(4)" in teacher  # one step of its ODE gives a grey picture
    assert "samples.png)" not in card
    assert "](samples.png)" in model_card(CONFIG, step=60, weights_name="m", has_samples=True)


def exported(to: Path | Place, run: RunDir | None, *, format: str, weights_name: str = "ema_0.999943") -> None:
    source = Source(
        origin="a run",
        config=CONFIG,
        weights=random_weights(CONFIG.model),
        weights_name=weights_name,
        step=60,
        run_dir=None if run is None else run.root,
    )
    target = Place(str(to))
    check_target(format, target)  # pyright: ignore[reportArgumentType]
    export_weights(source, format=format, to=target)  # pyright: ignore[reportArgumentType]


def test_a_folder_has_the_layout_of_a_repository_on_the_hub(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.samples.mkdir(parents=True)
    run.sample_grid(60).write_bytes(b"the grid")
    first = CONFIG.ema.names[0]
    exported(tmp_path / "model", run, format="safetensors", weights_name=first)
    folder = tmp_path / "model"
    assert {path.name for path in folder.iterdir()} == {"README.md", "model.safetensors", "samples.png"}
    assert (folder / "samples.png").read_bytes() == b"the grid"
    card = (folder / "README.md").read_text()
    assert "](samples.png)" in card
    assert 'cmscale.load("model.safetensors")' in card
    assert str(tmp_path) not in card
    assert cmscale.load(folder / "model.safetensors").sample(1, steps=1)[0].size == (16, 16)
    exported(tmp_path / "other", run, format="safetensors", weights_name="master")  # another network's grid
    assert {path.name for path in (tmp_path / "other").iterdir()} == {"README.md", "model.safetensors"}
    exported(tmp_path / "one.safetensors", run, format="safetensors", weights_name=first)
    assert "](samples.png)" not in (tmp_path / "one.safetensors.md").read_text()
    (tmp_path / "run2").mkdir()
    (tmp_path / "run2" / "config.yaml").write_text("")
    with pytest.raises(UserError, match="is a run, a checkpoint or a data set"):
        exported(tmp_path / "run2", run, format="safetensors")
    with pytest.raises(UserError, match="safetensors"):
        exported(tmp_path / "model.bin", run, format="safetensors")


@pytest.mark.parametrize("format", ["safetensors", "diffusers"])
def test_the_program_in_a_card_draws_samples(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if format == "diffusers":
        pytest.importorskip("diffusers", reason="diffusers is not installed")
    exported(tmp_path / "model", None, format=format)
    card = (tmp_path / "model" / "README.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path / "model")
    names: dict[str, Any] = {}
    exec(program, names)
    assert [picture.size for picture in names["pictures"]] == [(16, 16)] * 4


@pytest.mark.parametrize("format", ["safetensors", "diffusers", "file"])
def test_a_card_that_was_edited_is_not_replaced(format: str, tmp_path: Path, s3: str) -> None:
    kind, name = ("safetensors", "one.safetensors") if format == "file" else (format, "model")
    card = "one.safetensors.md" if format == "file" else "model/README.md"
    for place in (str(tmp_path), s3):
        exported(Place(f"{place}/{name}"), None, format=kind)
        exported(Place(f"{place}/{name}"), None, format=kind)  # one that was not edited is written anew
        file = Place(f"{place}/{card}")
        written = (file.read_if_present() or b"").decode()
        file.write(written.replace("\n", "\r\n").encode())  # as git does on some machines
        exported(Place(f"{place}/{name}"), None, format=kind)
        for edited in (written.replace("license: unknown", "license: mit"), f"{written}\nCite us.\n", "# Mine\n", ""):
            assert edited != written
            file.write(edited.encode())
            with pytest.raises(UserError, match=f"{card}: was edited, .*; move it away") as refused:
                exported(Place(f"{place}/{name}"), None, format=kind)
            assert "\n" not in str(refused.value)
            assert file.read_if_present() == edited.encode()
            with pytest.raises(UserError, match="was edited"):  # before weights are read
                check_target(kind, Place(f"{place}/{name}"))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("format", ["safetensors", "diffusers", "file"])
def test_a_card_never_describes_weights_that_an_export_had_begun_to_replace(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, name = ("safetensors", "one.safetensors") if format == "file" else (format, "model")
    card = tmp_path / ("one.safetensors.md" if format == "file" else "model/README.md")
    exported(tmp_path / name, None, format=kind)
    whole = card.read_text()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"cmscale.export.weights.write_{kind}", killed)
        with pytest.raises(KeyboardInterrupt):
            exported(tmp_path / name, None, format=kind)
    assert "An export that has not ended" in card.read_text()
    exported(tmp_path / name, None, format=kind)
    assert card.read_text() == whole


@pytest.mark.parametrize("format", ["safetensors", "diffusers"])
def test_another_models_card_stays_where_its_folder_is_refused(format: str, tmp_path: Path) -> None:
    exported(tmp_path / "model", None, format=format)
    card = (tmp_path / "model" / "README.md").read_bytes()
    other = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"num_res_blocks": 3})})
    source = Source(origin="a run", config=other, weights={}, weights_name="master", step=1, run_dir=None)
    with pytest.raises(UserError, match="another model"):
        export_weights(source, format=format, to=Place(tmp_path / "model"))  # pyright: ignore[reportArgumentType]
    assert (tmp_path / "model" / "README.md").read_bytes() == card


def test_files_are_exported_where_s3_does_not_say_that_a_card_is_absent(s3: str, proxy: FaultProxy) -> None:
    """As with credentials that lack s3:ListBucket: it answers 403 to whoever asks for what is not there."""
    place = Place(f"{s3}/one.safetensors")
    card = Place(f"{place}.md")
    hidden = proxy.add("answer 403 AccessDenied", match=r"^GET .*\.md")
    check_target("safetensors", place)
    exported(place, None, format="safetensors")
    assert hidden.used > 1
    proxy.clear()
    assert b"# CT at 16x16" in (card.read_if_present() or b"")
    assert cmscale.load(place).sample(1, steps=1)[0].size == (16, 16)
    exported(place, None, format="safetensors")  # what is there may be read
    card.write(b"# Mine")
    place.write(b"mine")
    proxy.add("answer 403 AccessDenied", match=r"^GET .*\.md")
    with pytest.raises(UserError, match=r"one\.safetensors\.md: is there, .*s3:GetObject") as refused:
        exported(place, None, format="safetensors")
    assert "\n" not in str(refused.value)
    proxy.clear()
    assert (card.read_if_present(), place.read_if_present()) == (b"# Mine", b"mine")
    proxy.add("answer 403 AccessDenied", match=r"^GET .*(config|manifest|README)")
    with pytest.raises(UserError, match=r"AccessDenied to GetObject, which without s3:ListBucket is also the answer"):
        check_target("safetensors", Place(f"{s3}/folder"))  # what it would replace can't be seen


@pytest.mark.parametrize("format", ["safetensors", "diffusers"])
def test_a_picture_of_somebody_is_neither_replaced_nor_removed(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "model" / "samples.png"
    picture.parent.mkdir()
    picture.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"samples\.png"):
        exported(tmp_path / "model", None, format=format)
    picture.unlink()
    exported(tmp_path / "model", None, format=format)
    picture.write_bytes(b"mine")  # the card links none
    exported(tmp_path / "model", None, format=format)
    assert picture.read_bytes() == b"mine"
    with monkeypatch.context() as patched:
        patched.setattr(f"cmscale.export.weights.write_{format}", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            exported(tmp_path / "model", None, format=format)
    exported(tmp_path / "model", None, format=format)  # after a card of an export that had not ended
    assert picture.read_bytes() == b"mine"


def test_the_grid_of_other_weights_does_not_stay_in_a_folder(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.samples.mkdir(parents=True)
    run.sample_grid(60).write_bytes(b"the grid")
    for weights, has_grid in ((CONFIG.ema.names[0], True), ("master", False)):
        exported(tmp_path / "model", run, format="safetensors", weights_name=weights)
        assert (tmp_path / "model" / "samples.png").exists() == has_grid


SITE = ["slurm.account=secret", "slurm.mail_user=who@secret", "slurm.setup=[source /home/secret/venv]"]


@pytest.mark.parametrize("format", ["safetensors", "diffusers"])
def test_no_file_of_an_export_says_where_or_by_whom_it_was_made(format: str, tmp_path: Path) -> None:
    paths = {
        key: f"{tmp_path}/secret/{key}"
        for key in ("data.path", "data.cache_dir", "checkpoint.export_to", "evaluate.reference", "storage.ca_bundle")
    }
    paths["method.teacher"] = f"{tmp_path}/secret/method.teacher#sha256={'0' * 64}"
    paths["prometheus.folder"] = f"{tmp_path}/secret/collector"
    given = [*SITE, "wandb.entity=secret", *(f"{key}={value}" for key, value in paths.items())]
    config = parse_config(dump_config(small_config(small_model(), {"kind": "cd", "teacher": "t"})), given)
    source = Source("a run", config, random_weights(config.model), "master", 60)
    for _ in range(2):  # the second time over the files of the first
        export_weights(source, format=format, to=Place(f"{tmp_path}/model"))  # pyright: ignore[reportArgumentType]
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert len(files) > 1
    for path in files:
        held = path.read_bytes()
        assert b"secret" not in held
        assert str(tmp_path).encode() not in held
    assert f"teacher: (elsewhere)/method.teacher#sha256={'0' * 64}" in (tmp_path / "model" / "README.md").read_text()
    again = published(config)
    assert again.model == config.model
    assert again.method.model_copy(update={"teacher": None}) == config.method.model_copy(update={"teacher": None})


@pytest.mark.parametrize("format", ["safetensors", "diffusers"])
def test_a_folder_with_somebodys_readme_is_left_as_it_is(format: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.samples.mkdir(parents=True)
    run.sample_grid(60).write_bytes(b"the grid")
    project = tmp_path / "project"
    project.mkdir()
    (project / "README.md").write_text("# Somebody's")
    with pytest.raises(UserError, match=r"README\.md.* replaced"):
        exported(project, run, format=format, weights_name=CONFIG.ema.names[0])
    assert [(path.name, path.read_text()) for path in project.iterdir()] == [("README.md", "# Somebody's")]
    for _ in range(2):  # the second replaces the first
        exported(tmp_path / "model", run, format=format, weights_name=CONFIG.ema.names[0])
    assert (tmp_path / "model" / "samples.png").exists()


@pytest.mark.parametrize(("format", "ending"), [("safetensors", ".safetensors"), ("openai", ".pt")])
def test_a_name_that_leaves_no_room_for_its_card_is_refused_at_once(format: str, ending: str, tmp_path: Path) -> None:
    place = Place(tmp_path / f"{'n' * (244 - len(ending))}{ending}")
    with pytest.raises(UserError, match=r"--to .*File name too long"):
        check_target(format, place)  # pyright: ignore[reportArgumentType]


def test_two_exports_to_one_place_do_not_mix(tmp_path: Path) -> None:
    model = tmp_path / "model"
    held = "import sys; from pathlib import Path; from cmscale.io.locks import hold\nwith hold(Path(sys.argv[1]), "
    held += "timeout=0, what='x', by_creation=True): print('held', flush=True); input()"
    other = [sys.executable, "-c", held, str(model / ".README.md")]
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(UserError, match=f"exporting to {model}: another process"):
            exported(model, None, format="safetensors")
        process.kill()
    exported(model, None, format="safetensors")
    assert {path.name for path in model.iterdir()} == {"README.md", "model.safetensors"}


def test_an_export_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.evaluations.mkdir(parents=True)
    (run.evaluations / "step-000000060.json").write_text("{")
    with pytest.raises(UserError, match="model card: "):
        exported(tmp_path / "model", run, format="safetensors")
    assert not (tmp_path / "model").exists()


def test_weights_of_an_export_that_was_killed_are_removed_by_a_later_one(tmp_path: Path) -> None:
    begun = tmp_path / ".cmscale-weights-dead"
    begun.mkdir()
    (begun / "weights").write_bytes(b"half")
    exported(tmp_path / "a.safetensors", None, format="safetensors")
    assert begun.exists()  # it may be written now
    for path in (begun / "weights", begun):
        os.utime(path, (0, 0))
    descriptor = os.open(begun, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    exported(tmp_path / "a.safetensors", None, format="safetensors")
    assert begun.exists()  # its process lives
    os.close(descriptor)
    exported(tmp_path / "a.safetensors", None, format="safetensors")
    assert not begun.exists()
