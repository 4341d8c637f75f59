"""Sets of samples are the same on any number of ranks, in every format, and after a rank was killed in its middle."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks, start_ranks, wait

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from evaluation_fixtures import write_dataset, write_trained_run

from cmscale.evaluation.sample_files import open_images
from cmscale.io.storage import open_storage
from cmscale.runs.sample_sets import SampleSet


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("trained")
    return str(write_trained_run(folder / "run", data=write_dataset(folder, count=8), samples=8).root)


@pytest.fixture(scope="module")
def alone(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set that one process draws."""
    out = tmp_path_factory.mktemp("alone") / "x.npz"
    assert run_ranks(1, "sample_work:draw", asked(model, out)) == [f"{out}\nfinished\n"]
    return out


def asked(model: str, out: object, **more: Any) -> dict[str, Any]:
    """Two steps, batches of 25, so parts of 75: three on the first rank and two on the second, the last of 30."""
    return {
        "source": model,
        "out": str(out),
        "samples": 330,
        "steps": 2,
        "batch_size": 25,
        "seed": 3,
        "device": "cpu",
        **more,
    }


def record(path: Path) -> SampleSet:
    return SampleSet.model_validate_json(path.read_text())


def test_two_ranks_write_the_bytes_that_one_writes(model: str, alone: Path, tmp_path: Path) -> None:
    run_ranks(2, "sample_work:draw", asked(model, tmp_path / "x.npz"))
    assert (tmp_path / "x.npz").read_bytes() == alone.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npz", "x.npz.json"]
    assert record(tmp_path / "x.npz.json").machine["num_ranks"] == 2
    assert np.load(alone)["arr_0"].shape == (330, 8, 8, 3)


@pytest.mark.parametrize("format", ["png", "tar"])
def test_pictures_hold_the_same_pixels_and_the_record_their_hash(
    format: str, model: str, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ranks(2, "sample_work:draw", asked(model, tmp_path / "set", format=format))
    found = list(open_images(tmp_path / "set").read())
    assert np.array_equal(np.stack(found), np.load(alone)["arr_0"])
    assert record(tmp_path / "set" / "samples.json").sha256 == record(alone.with_name("x.npz.json")).sha256


def test_after_a_rank_was_killed_only_what_is_missing_is_drawn(model: str, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    ranks = start_ranks(2, "sample_work:die_at", asked(model, out), 225)
    assert 1 in wait(ranks, timeout=240)  # it had drawn 75 to 149 before
    left = {path.name for path in (tmp_path / "x.npz.parts").glob("part-*")}
    assert "part-000000075.npy" in left
    assert not out.exists()
    notes = tmp_path / "notes"
    notes.mkdir()
    run_ranks(1, "sample_work:draw_noting_parts", asked(model, out), str(notes))
    drawn = {int(path.name.partition("-")[0]) for path in notes.iterdir()}
    assert drawn == {at for at in range(0, 330, 75) if f"part-{at:09d}.npy" not in left}
    assert 225 in drawn
    assert out.read_bytes() == alone.read_bytes()


def test_a_signal_ends_all_ranks_at_a_part_and_the_same_request_goes_on(
    model: str, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.npz"
    assert run_ranks(2, "sample_work:interrupted", asked(model, out)) == ["preempted\n", "preempted\n"]
    assert (tmp_path / "x.npz.parts" / "part-000000075.npy").exists()
    assert not out.exists()
    run_ranks(2, "sample_work:draw", asked(model, out))
    assert out.read_bytes() == alone.read_bytes()


@pytest.mark.long
def test_sets_are_drawn_to_s3_from_parts_that_lie_there(model: str, alone: Path, s3: str) -> None:
    storage = open_storage(s3)
    ranks = start_ranks(2, "sample_work:die_at", asked(model, f"{s3}/set/x.npz"), 225)
    assert 1 in wait(ranks, timeout=240)
    assert any(entry.key.startswith("set/x.npz.parts/part-") for entry in storage.list())
    for out, more in (("set/x.npz", {}), ("pictures", {"format": "tar"})):
        run_ranks(2, "sample_work:draw", asked(model, f"{s3}/{out}", **more))
    assert storage.read("set/x.npz") == alone.read_bytes()
    expected = {"set/x.npz", "set/x.npz.json", "pictures/samples-000000000.tar", "pictures/samples.json"}
    assert {entry.key for entry in storage.list()} == expected
    again = run_ranks(1, "sample_work:draw", asked(model, f"{s3}/set/x.npz"))
    assert again == [f"{s3}/set/x.npz\nfinished\n"]
