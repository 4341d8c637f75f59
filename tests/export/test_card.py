"""The model card describes the weights, their training and data, and their quality."""

import pytest
from networks import random_weights, small_config, small_model

from cmscale.config import parse_config
from cmscale.config.methods import METHODS_BY_KIND
from cmscale.evaluation.metrics.registry import all_metrics
from cmscale.export.card import model_card
from cmscale.runs.manifests import DatasetManifest
from cmscale.runs.results import EvaluationResult, Metric

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
    assert "3,033,042 of lsun:bedroom, preprocessing adm" in card
    assert "`abc`" in card


def test_evaluations_of_these_weights_are_a_table_and_others_are_left_out() -> None:
    one_step = evaluation(precision=(0.68,))
    two_steps = evaluation(nfe=2, fid=(5.22,))
    others = [evaluation(step=50, nfe=9, recall=(0.1,)), evaluation(weights="master", nfe=8)]
    assert quality_table(two_steps, one_step, *others) == [
        ["Network evaluations per sample", "Samples", "Features", "Fréchet distance", "precision"],
        ["1", "50,000", "inception", "7.85 ± 0.07", "0.680"],
        ["2", "50,000", "inception", "5.22", "-"],
    ]


@pytest.mark.parametrize("metric", all_metrics(), ids=lambda metric: metric.name)
def test_every_metric_is_a_column(metric) -> None:
    header, row = quality_table(evaluation(**{metric.name: (0.25,)}))
    assert row[header.index(metric.title)] == f"{0.25:{metric.format}}"
