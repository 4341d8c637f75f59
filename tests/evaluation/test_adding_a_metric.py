"""ops/adding_a_metric.md: a metric in one new file is in the result's JSON, the messages, the report and the card."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import run
from evaluation_fixtures import build_cheap_features
from networks import small_config, small_model
from PIL import Image
from run_folder import write_run

import cmscale.evaluation.metrics as package
from cmscale.evaluation.features.extractor import build_features
from cmscale.evaluation.measure import image_blocks, left_out, measure
from cmscale.evaluation.metrics.registry import all_metrics
from cmscale.evaluation.reference.reference import reference_from_images
from cmscale.export.card import model_card
from cmscale.io.process import CHECKOUT
from cmscale.report import build_report
from cmscale.runs.manifests import read_document
from cmscale.runs.results import EvaluationResult

pytestmark = pytest.mark.long

GUIDE = CHECKOUT / "ops" / "adding_a_metric.md"
_BLOCK = re.compile(
    r"<!-- new file: cmscale/evaluation/metrics/(?P<name>\w+\.py) -->\n```python\n(?P<text>.*?)```", re.DOTALL
)
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules belong to the package of metrics."""
    found = tmp_path / "metrics"
    found.mkdir()
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(found)])
    yield found
    for path in found.glob("*.py"):
        if sys.modules.pop(f"{package.__name__}.{path.stem}", None):
            delattr(package, path.stem)


@pytest.fixture
def mean_shift(folder: Path) -> None:
    """The guide's example, installed."""
    (block,) = _BLOCK.finditer(GUIDE.read_text())
    assert block["name"] == "mean_shift.py"
    (folder / block["name"]).write_text(block["text"])


@pytest.mark.usefixtures("mean_shift")
def test_one_new_file_adds_a_metric_to_results_messages_report_and_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, images in (("samples", IMAGES), ("real", IMAGES // 2)):
        (tmp_path / name).mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{number:02d}.png")
    out = tmp_path / "out.json"
    arguments = ["--features", "efficientnet", "--reference", tmp_path / "real", "--out", out, "--device", "cpu"]
    assert run(monkeypatch, "evaluate", tmp_path / "samples", *arguments) == 0

    extractor = build_features("efficientnet")
    real, samples = (
        np.concatenate([features["pooled"] for _, features in image_blocks(images, extractor)])
        for images in (IMAGES // 2, IMAGES)
    )
    expected = np.linalg.norm(samples.astype("f8").mean(axis=0) - real.astype("f8").mean(axis=0))
    assert json.loads(out.read_bytes())["mean_shift"]["mean"] == pytest.approx(expected, rel=1e-9)
    assert f"mean shift-EfficientNet {expected:.3f}" in capsys.readouterr().out

    result = read_document(EvaluationResult, out.read_bytes(), origin="out").model_copy(
        update={"step": 60, "weights": "master", "nfe": 1}
    )
    card = model_card(small_config(small_model()), step=60, weights_name="master", evaluations=[result])
    header, _, row = (line for line in card[card.index("## Quality") :].splitlines() if line.startswith("|"))
    column = [cell.strip() for cell in header.split("|")].index("mean shift-EfficientNet")
    assert [cell.strip() for cell in row.split("|")][column] == f"{expected:.3f}"

    folder = write_run(tmp_path / "run")
    (folder.evaluations / "step-000000060-master-nfe1.json").write_bytes(result.to_bytes())
    page = build_report(folder).read_text()
    assert '<th class="n metric">mean shift-EfficientNet</th>' in page
    assert f'<td class="n" data-label="mean shift-EfficientNet">{expected:.3f}<small></small></td>' in page


METRIC = """
from cmscale.evaluation.metrics.registry import DistributionMetric, Need
METRICS = (
    DistributionMetric(name={name!r}, title="toy", format=".2f", higher_is_better=True, needs=frozenset({needs}),
                       compute=lambda samples, reference: {value}, spread_name={spread!r}),
)
"""


def install(folder: Path, *, name: str = "toy", needs: str = "", value: str = "1.0", spread: str | None = None) -> None:
    (folder / "toy.py").write_text(METRIC.format(name=name, needs=f"{{{needs}}}", value=value, spread=spread))


def measured() -> tuple[dict[str, float], list[str]]:
    """What is measured of images against statistics without single images, and the reasons for what is missing."""
    extractor = build_cheap_features("efficientnet")  # of few dimensions, so that an FID takes no seconds
    reference = reference_from_images(IMAGES, extractor, name="images", count=len(IMAGES), subset=0)
    found = measure(image_blocks(IMAGES, extractor), num_samples=len(IMAGES), reference=reference)
    return found, left_out(found, reference=reference)


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        ("Need.SPATIAL_FEATURES", "no sFID, toy: the reference or the feature network has no spatial features"),
        (
            "Need.REFERENCE_IMAGES",
            "no KID, precision, recall, density, coverage, toy: the reference holds statistics without images",
        ),
        ("Need.CLASS_LOGITS", None),
        ("", None),
    ],
)
def test_a_metric_is_left_out_for_the_reason_that_its_needs_give(folder: Path, needs: str, reason: str | None) -> None:
    install(folder, needs=needs)
    found, lines = measured()
    assert ("toy" in found) == (reason is None)
    assert [line for line in lines if "toy" in line] == ([] if reason is None else [reason])


def test_a_spread_is_a_key_of_its_own_and_must_match_what_is_computed(folder: Path) -> None:
    install(folder, value="(2.0, 0.5)", spread="toy_std")
    found, _ = measured()
    assert (found["toy"], found["toy_std"]) == (2.0, 0.5)
    sys.modules.pop(f"{package.__name__}.toy")
    install(folder, value="1.0", spread="toy_std")
    with pytest.raises(TypeError, match=r"metric toy, spread_name toy_std: compute returned 1\.0"):
        measured()


@pytest.mark.parametrize("name", ["fid", "kid_subset_std", "seconds", "metrics"])
def test_a_name_that_is_taken_is_refused(folder: Path, name: str) -> None:
    install(folder, name=name)
    with pytest.raises(TypeError, match=f"the key '{name}' of an evaluation's JSON is already taken"):
        all_metrics()


def test_a_module_without_metrics_is_named(folder: Path) -> None:
    (folder / "toy.py").write_text("METRIC = 3\n")
    with pytest.raises(TypeError, match=r"metrics\.toy: defines no METRICS"):
        all_metrics()
