"""The model card says what the weights are, of which training and data, and how good."""

from networks import random_weights, small_config, small_model

from cmscale.config import parse_config
from cmscale.interop import model_card
from cmscale.runs.manifests import DatasetManifest

CONFIG = small_config(small_model())


def evaluation(**changes):
    measured = {"mean": 7.854, "std": 0.05, "values": [7.8, 7.9]}
    return {
        "step": 60, "weights": "ema_0.999943", "nfe": 1, "num_samples": 50000, "features": "inception",
        "fid": measured, "precision": {"mean": 0.68, "std": None, "values": [0.68]}, **changes,
    }  # fmt: skip


def test_the_card_holds_method_size_steps_and_the_whole_config():
    card = model_card(CONFIG, step=60, weights_name="ema_0.999943")
    assert "trained from scratch (CT" in card
    count = sum(tensor.numel() for tensor in random_weights(CONFIG.model).values())
    assert f"{count / 1e6:.1f} M parameters for 16x16 images" in card
    assert "| Steps | 60 of 100 |" in card
    assert "| Images seen | 480 (global batch 8) |" in card
    assert "| Data | s3://bucket/data |" in card
    assert "Not evaluated." in card
    assert parse_config(card.split("```yaml\n")[1].split("```")[0]) == CONFIG


def test_the_data_sets_own_numbers_are_shown_where_known():
    manifest = DatasetManifest(
        format="mds", image_size=256, preprocess="adm", encoding="png", source="lsun:bedroom", count=3033042,
        shards=(), fingerprint="abc",
    )  # fmt: skip
    card = model_card(CONFIG, step=60, weights_name="ema_0.999943", dataset=manifest)
    assert "3,033,042 of lsun:bedroom" in card
    assert "`abc`" in card


def test_evaluations_of_these_weights_are_a_table_and_others_are_left_out():
    others = [evaluation(step=50, nfe=9), evaluation(weights="master", nfe=8)]
    two_steps = evaluation(nfe=2, fid={"mean": 5.22, "std": 0.0, "values": [5.22]}, precision=None)
    card = model_card(CONFIG, step=60, weights_name="ema_0.999943", evaluations=[two_steps, evaluation(), *others])
    rows = [line for line in card.splitlines() if line.startswith("|") and "inception" in line]
    assert rows == [
        "| 1 | 50,000 | inception | 7.854 ± 0.05 | 0.68 |",
        "| 2 | 50,000 | inception | 5.22 | - |",
    ]
    assert "| Evaluations a sample | Samples | Features | Fréchet distance | Precision |" in card
