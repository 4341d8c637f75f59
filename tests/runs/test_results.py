"""Evaluation results: flat JSON with one key per metric, older files readable, other content refused."""

import json

import pytest

from cmscale.errors import UserError
from cmscale.runs.folder import RunDir
from cmscale.runs.manifests import read_document
from cmscale.runs.results import EvaluationResult, Metric, combine, read_evaluations

MEASURED = {"mean": 7.8, "std": 0.1, "values": [7.7, 7.9]}
OLD = {  # as versions wrote it that had one field per metric
    "step": 60, "weights": "master", "nfe": 1, "times": None, "num_samples": 500, "seeds": [0, 1],
    "features": "inception", "score_name": "FID", "reference": {"name": "crops"}, "fid": MEASURED, "sfid": None,
    "kid": None, "kid_subset_std": None, "precision": {"mean": 0.5, "std": 0.0, "values": [0.5]}, "seconds": 1.0,
    "protocol": {}, "warnings": [],
}  # fmt: skip


def read(content: dict) -> EvaluationResult:
    return read_document(EvaluationResult, json.dumps(content).encode(), origin="x.json")


def test_an_older_file_is_read_and_written_again_without_a_difference() -> None:
    result = read(OLD)
    assert set(result.metrics) == {"fid", "precision"}
    assert result.fid == Metric(mean=7.8, std=0.1, values=(7.7, 7.9))
    written = json.loads(result.to_bytes())
    assert written == OLD
    assert read(written) == result


def test_a_metric_of_another_version_is_kept() -> None:
    result = read({**OLD, "realism": MEASURED})
    assert json.loads(result.to_bytes())["realism"] == MEASURED


@pytest.mark.parametrize("value", [7.8, "good", {"mean": 7.8}, {**MEASURED, "median": 7.8}, [7.8]])
def test_an_unknown_key_that_is_no_metric_is_refused(value: object) -> None:
    with pytest.raises(UserError, match=r"x\.json: not a valid EvaluationResult.*realism"):
        read({**OLD, "realism": value})


def test_a_result_without_a_score_is_refused() -> None:
    with pytest.raises(UserError, match="fid is missing"):
        read({**OLD, "fid": None})


def test_several_sets_are_combined_into_mean_and_sample_deviation() -> None:
    assert combine([{"fid": 1.0, "kid": 5.0}, {"fid": 3.0, "kid": 5.0}]) == {
        "fid": Metric(mean=2.0, std=2**0.5, values=(1.0, 3.0)),
        "kid": Metric(mean=5.0, std=0.0, values=(5.0, 5.0)),
    }


def test_a_metric_that_one_of_several_sets_lacks_is_left_out() -> None:
    assert combine([{"fid": 1.0, "realism": 2.0}, {"fid": 3.0}]).keys() == {"fid"}


def test_a_runs_evaluations_are_sorted_and_unreadable_files_named(tmp_path) -> None:
    run = RunDir(tmp_path)
    run.evaluations.mkdir()
    for name, step in (("a", 60), ("b", 20), ("c", None)):
        (run.evaluations / f"{name}.json").write_text(json.dumps({**OLD, "step": step}))
    (run.evaluations / "broken.json").write_text("{")
    found, unreadable = read_evaluations(run)
    assert [each.step for each in found] == [None, 20, 60]
    assert [line.split(":")[0] for line in unreadable] == ["broken.json"]
