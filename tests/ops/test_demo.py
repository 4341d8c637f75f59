"""The demo's own parts: its photographs, configs, pictures, and the verdict on what its runs learned."""

import re
from pathlib import Path

import lmdb
import numpy as np
import pytest
from demo_pictures import COLUMNS, GAP, LABEL, TILE
from demo_pictures import main as draw_pictures
from demo_summary import EXPECTED
from demo_summary import main as summary
from evaluation_fixtures import write_checkpoint, write_trained_run
from PIL import Image
from run_folder import write_evaluation

from cmscale.config import Config
from cmscale.runs.folder import RunDir
from data_prep.demo import VIEWS, in_turn
from data_prep.demo import main as demo_data

CHECKOUT = Path(__file__).resolve().parents[2]
LEARNED = {"edm": (300.0, 60.0), "cd": (200.0, 70.0), "ct": (300.0, 90.0)}
"""FD-EfficientNet at the start and at the end of each run, well within what is expected."""


def write_scores(runs: Path, scores: dict[str, tuple[float, float]], *, coverage: float = 0.5) -> None:
    for kind, values in scores.items():
        run = RunDir(runs / kind)
        run.evaluations.mkdir(parents=True)
        for step, value in zip((0, 500), values, strict=True):
            reached = {"recall": coverage, "coverage": coverage} if step else {"recall": 0.0, "coverage": 0.0}
            write_evaluation(run, step=step, nfe=1, values=(value,), metrics=reached)


@pytest.mark.parametrize("length", list(EXPECTED))
def test_runs_that_learned_what_is_expected_pass(length: str, tmp_path: Path) -> None:
    write_scores(tmp_path, LEARNED)
    assert summary(tmp_path, length) == 0


@pytest.mark.parametrize("kind", list(LEARNED))
@pytest.mark.parametrize("length", list(EXPECTED))
def test_a_run_that_learned_too_little_fails_the_demo(length: str, kind: str, tmp_path: Path) -> None:
    untrained = LEARNED["edm"][0] if kind != "cd" else LEARNED["cd"][0]
    write_scores(tmp_path, LEARNED | {kind: (LEARNED[kind][0], untrained * EXPECTED[length][kind][0] + 0.1)})
    assert summary(tmp_path, length) == 1


def test_samples_that_reach_no_photograph_fail_the_demo(tmp_path: Path) -> None:
    write_scores(tmp_path, LEARNED, coverage=0.0)
    assert summary(tmp_path, "short") == 1


def test_the_data_hold_every_photograph_equally_often(tmp_path: Path) -> None:
    number = 2 * len(VIEWS)
    assert demo_data([str(tmp_path / "set"), "--samples", str(number), "--side", "16"]) == 0
    with lmdb.open(str(tmp_path / "set"), readonly=True) as database:
        assert database.stat()["entries"] == number
    crops = [np.asarray(image, dtype=float) for image in in_turn(VIEWS.values(), count=number, side=16, seed=0)]
    for first, image in enumerate(crops[: len(VIEWS)]):
        others = [np.abs(image - other).mean() for other in crops[len(VIEWS) :]]
        assert np.argmin(others) == first


def test_the_photographs_that_are_shown_are_no_training_data() -> None:
    shown, *_ = in_turn(VIEWS.values(), count=1, side=32, seed=1)
    trained = [image.tobytes() for image in in_turn(VIEWS.values(), count=80, side=32, seed=0)]
    assert shown.tobytes() not in trained


def test_the_configs_fit_each_other_and_the_script() -> None:
    edm, cd, ct = (Config.load(CHECKOUT / "configs" / f"demo_{kind}.yaml") for kind in ("edm", "cd", "ct"))
    assert edm.model == cd.model == ct.model
    assert edm.evaluate == cd.evaluate == ct.evaluate
    first, *_ = re.findall(r"^size=(\d+)", (CHECKOUT / "ops" / "demo.sh").read_text(), re.MULTILINE)
    assert int(first) == edm.model.image_size


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three runs of random weights and the pictures of them."""
    runs = tmp_path_factory.mktemp("demo")
    data = runs / "data"  # no model reads it
    edm = write_trained_run(runs / "edm", data=data, kind="edm", method="sampler_steps: 3")
    write_checkpoint(edm, Config.load(edm.config), step=0)
    write_trained_run(runs / "cd", data=data, kind="cd", method="teacher: edm, distance: l2", step=8)
    write_trained_run(runs / "ct", data=data, step=9)
    draw_pictures(runs)
    return runs


def tiles(path: Path) -> np.ndarray:
    """The tiles of a sheet, uint8 [rows, COLUMNS, TILE, TILE, 3]."""
    pixels = np.asarray(Image.open(path))
    rows = (pixels.shape[0] - GAP) // (TILE + GAP)
    at = [GAP + row * (TILE + GAP) for row in range(rows)]
    return np.stack(
        [
            [pixels[top : top + TILE, left : left + TILE] for left in range(LABEL, pixels.shape[1], TILE + GAP)]
            for top in at
        ]
    )


def test_the_picture_of_what_was_learned_has_a_different_row_for_each_model(drawn: Path) -> None:
    rows = tiles(drawn / "learned.png")
    assert rows.shape[:2] == (6, COLUMNS)
    photographs = [np.asarray(image) for image in in_turn(VIEWS.values(), count=COLUMNS, side=8, seed=1)]
    np.testing.assert_array_equal(rows[0, :, :: TILE // 8, :: TILE // 8], photographs)
    assert len({row.tobytes() for row in rows}) == 6


def test_the_picture_of_edits_shows_photograph_input_and_result(drawn: Path) -> None:
    rows = tiles(drawn / "edits.png")[..., :: TILE // 8, :: TILE // 8, :]
    assert rows.shape[:2] == (5, COLUMNS)
    inpaint, colorize, superres, _, interpolate = rows
    photographs, given, results = inpaint[0::3], inpaint[1::3], inpaint[2::3]
    hole = (given == 128).all(axis=(0, -1))
    assert 0 < hole.sum() < hole.size / 2
    np.testing.assert_array_equal(results[:, ~hole], photographs[:, ~hole])
    assert (results[:, hole] != photographs[:, hole]).any()
    assert (colorize[1::3] == colorize[1::3, ..., :1]).all()
    means = superres[1::3].reshape(-1, 2, 4, 2, 4, 3)
    assert (means == means[:, :, :1, :, :1]).all()
    assert len({tile.tobytes() for tile in interpolate}) > 2
