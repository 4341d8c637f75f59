"""Tests that an evaluation is the same on any number of ranks, and after a rank was killed in its middle."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import ROOT, run_ranks
from small_runs import launch, make_data, make_run

from cmscale.runs.log import read_lines

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from evaluation_fixtures import write_dataset, write_trained_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluations")
    run_ranks(1, "evaluate_work:evaluate_on_ranks", str(path))
    return path


def results(run: Path) -> dict[str, dict[str, Any]]:
    """The results of a run by file name, without the values that may differ."""
    found = {path.name: json.loads(path.read_text()) for path in (run / "evaluations").glob("*.json")}
    for result in found.values():
        del result["seconds"], result["date"], result["protocol"]["num_ranks"], result["protocol"]["source"]
    return found


def test_results_are_equal_to_the_bit_on_1_2_and_3_ranks(folder: Path) -> None:
    alone = results(folder / "on 1")
    kinds = [name.partition("-efficientnet-n300-seeds2-ref")[0] for name in sorted(alone)]
    assert kinds == ["step-000000007-ema_0.9-nfe1", "step-000000007-ema_0.9-nfe2"]
    for result in alone.values():
        assert len(set(result["fid"]["values"])) == 2  # two seeds, two values
        assert result["fid"]["std"] > 0
        assert result["num_samples"] == 300
    assert results(folder / "on 2") == alone
    assert results(folder / "on 3") == alone


def test_after_a_rank_was_killed_another_number_of_ranks_goes_on_and_the_result_is_the_same(folder: Path) -> None:
    left = json.loads((folder / "left.json").read_text())
    assert left == ["block-000000000.safetensors", "block-000000256.safetensors"]  # rank 1 had the other
    assert (folder / "commits").read_text().split() == ["128"]
    (resumed,) = results(folder / "killed").values()
    (whole,) = (each for each in results(folder / "on 1").values() if each["nfe"] == 1)
    assert resumed["fid"]["values"] == whole["fid"]["values"][:1]
    for name in ("inception_score", "precision", "recall", "kid", "density", "coverage"):
        assert resumed[name]["values"] == whole[name]["values"][:1], name


def test_the_ranks_share_the_work_of_nearest_neighbours(folder: Path) -> None:
    for num_ranks in (1, 2, 3):
        rows = dict.fromkeys(range(num_ranks), 0)
        for line in (folder / f"rows on {num_ranks}").read_text().splitlines():
            rank, count = map(int, line.split())
            rows[rank] += count
        total = 4 * (300 + 300) + 40  # of each set against itself and the reference; of the reference, once
        assert sum(rows.values()) == total
        assert max(rows.values()) < 1.15 * total / num_ranks, rows


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_trained_run_in_real_features_is_the_same_on_1_2_and_3_ranks_and_after_one_was_killed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_data(tmp_path), "evaluate.features=efficientnet")
    trainer = launch(run, "cmscale.training.loop:main", num_ranks=1)
    output, _ = trainer.communicate()
    assert trainer.returncode == 0, output
    run_ranks(1, "evaluate_work:evaluate_trained", str(tmp_path), timeout=600)
    alone = results(tmp_path / "on 1")
    (found,) = alone.values()
    assert (found["score_name"], found["step"], found["num_samples"]) == ("FD-EfficientNet", 9, 300)
    assert found["fid"]["mean"] > 0
    assert results(tmp_path / "on 2") == alone
    assert results(tmp_path / "on 3") == alone
    assert (tmp_path / "commits").read_text().split() == ["128"]
    assert results(tmp_path / "killed") == alone


def test_no_features_are_left_behind(folder: Path) -> None:
    left = list(folder.glob("*/evaluations/.blocks/*"))
    assert left  # each seed's metrics
    assert all(path.is_file() and path.stat().st_size < 1000 for path in left)


def test_the_launcher_evaluates_what_is_due_beside_training_in_a_job_of_its_own(tmp_path: Path) -> None:
    run = write_trained_run(tmp_path / "run", data=write_dataset(tmp_path, count=8), step=100, samples=8)
    arguments = ["--once", str(run.root), "--every", "50", "--", "--cluster", "local", "--gpus-per-node", "2"]
    for _ in range(2):
        command = [sys.executable, "-m", "launchers.evaluate_checkpoints", *arguments]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (result,) = results(run.root).values()
    assert (result["step"], result["num_samples"], result["score_name"]) == (100, 8, "FD-EfficientNet")
    assert [event["event"] for event in read_lines(run.events)] == ["evaluated"]  # once
