"""The run's page shows what the run has, needs nothing but itself, and never calls another score FID."""

import re

import pytest
from PIL import Image
from run_folder import write_evaluation, write_run

from cmscale.errors import UserError
from cmscale.report import build_report
from cmscale.runs.folder import RunDir
from cmscale.runs.log import append_line


@pytest.fixture
def run(tmp_path) -> RunDir:
    return write_run(tmp_path / "my_run")


def _page(run: RunDir, **more) -> str:
    path = build_report(run, **more)
    assert path == run.root / "report" / "index.html"
    return path.read_text()


def test_a_whole_run_is_shown(run) -> None:
    page = _page(run)
    for shown in (
        "my_run",
        "Consistency training at 16 px",
        "finished",
        "12,800",
        "SIGUSR2 from Slurm",
        "node1",
    ):
        assert shown in page
    for title in ("Loss", "Learning rate", "Discretisation N(k)", "Gradient norm", "Images a second"):
        assert f"<h3>{title}</h3>" in page
    assert page.count("data:image/png;base64,") == 3
    assert "FD-EfficientNet against the number of sampling steps" in page
    assert "FD-EfficientNet over training" in page


def test_the_page_loads_nothing_from_elsewhere(run) -> None:
    page = _page(run)
    loads = re.findall(r"(?:src|href)=\"([^\"]*)\"", page) + re.findall(r"url\(([^)]*)\)", page)
    assert loads
    assert all(link.startswith(("data:", "#")) for link in loads)
    assert "<script" not in page
    assert "@import" not in page


def test_values_have_error_bars_where_there_were_several_sets(run) -> None:
    write_evaluation(run, step=200, nfe=4, values=(123.0,))
    page = _page(run)
    assert re.search(r"<strong>21\.00</strong><small>± 1\.41</small>", page)
    assert re.search(r"<strong>123\.00</strong><small></small>", page)


def test_a_distance_over_other_features_is_never_called_fid(run) -> None:
    page = _page(run)
    evaluations = page[page.index('id="evaluations"') : page.index("Published results")]
    assert "It is not an FID" in evaluations
    assert re.search(r">FID<", evaluations) is None
    write_evaluation(run, step=200, nfe=1, values=(7.8,), features="inception")
    both = _page(run)
    table = both[both.index("<thead>", both.index('id="evaluations"')) : both.index("Published results")]
    assert "<td>FID</td>" in table
    assert "<td>FD-EfficientNet</td>" in table


def test_equal_warnings_are_one_line_that_says_which_evaluations_they_are_of(run) -> None:
    for nfe in (4, 8):
        write_evaluation(run, step=200, nfe=nfe, values=(9.0,), warnings=("no sFID", f"only of {nfe}"))
    notes = re.findall(r'<p class="note">([^<]*)</p>', _page(run))
    both = "step 200 ema_0.999 NFE 4, step 200 ema_0.999 NFE 8"
    assert [note for note in notes if "no sFID" in note] == [f"no sFID (my_run, {both})"]
    assert "only of 8 (my_run, step 200 ema_0.999 NFE 8)" in notes
    for step in (100, 200):
        for nfe in (1, 2):
            write_evaluation(run, step=step, nfe=nfe, values=(9.0,), warnings=("no sFID",))
    assert "no sFID (all 6 evaluations)" in _page(run)


def test_the_papers_numbers_stand_beside(run) -> None:
    page = _page(run)
    for number in ("7.80", "5.22", "3.57", "11.00", "20.70"):
        assert f'<td class="n">{number}</td>' in page


def test_quality_against_the_emas_rate_where_there_are_several(run) -> None:
    assert "against the EMA" not in _page(run)
    write_evaluation(run, step=200, nfe=1, values=(20.0, 21.0), weights="ema_0.9999")
    write_evaluation(run, step=200, nfe=1, values=(30.0, 31.0), weights="master")
    page = _page(run)
    assert "<h3>FD-EfficientNet against the EMA&#39;s length</h3>" in page
    for label in ("step 200, 1 NFE", "no EMA, 1 NFE", "10k", "steps averaged over"):
        assert label in page


def test_searched_times_are_a_curve_of_their_own(run) -> None:
    write_evaluation(run, step=200, nfe=2, values=(9.0,), times=(80.0, 4.0))
    write_evaluation(run, step=200, nfe=2, values=(8.0,), times=(80.0, 3.0))
    page = _page(run)
    assert "my_run, ema_0.999, searched times" in page
    assert "<small>at 80, 3</small>" in page


def test_siblings_share_tables_and_curves(run, tmp_path) -> None:
    teacher = write_run(tmp_path / "my_teacher", kind="edm", nfes=(79,))
    page = _page(run, siblings=[teacher])
    assert "my_teacher, 79 NFE" in page
    assert "<td>my_teacher</td>" in page


def test_a_run_that_has_nothing_yet_has_a_page(tmp_path) -> None:
    run = RunDir(tmp_path / "new")
    run.root.mkdir()
    page = _page(run)
    for said in ("not started", "No sample grid yet", "No evaluation yet", "Nothing logged yet"):
        assert said in page


def test_the_status_is_what_happened_last(run) -> None:
    append_line(run.events, {"time": 1.79e9 + 10, "event": "fault", "step": 200, "rank": 1, "why": "loss <nan>"})
    page = _page(run)
    assert '<span class="status failed">failed</span>' in page
    assert "loss &lt;nan&gt;" in page  # what a run says is text, never markup


def test_a_loss_that_is_not_finite_and_a_cut_line_spoil_nothing(run) -> None:
    append_line(run.metrics, {"step": 205, "samples": 1, "loss": float("nan"), "lr": 1e-4})
    with run.metrics.open("a") as file:
        file.write('{"step": 210, "lo')
    assert "<h3>Loss</h3>" in _page(run)


def test_an_evaluation_that_is_none_is_named(run) -> None:
    (run.evaluations / "step-000000300-x-nfe1.json").write_text("{}")
    assert "step-000000300-x-nfe1.json: not a valid EvaluationResult" in _page(run)


def test_a_large_grid_is_scaled_down(run) -> None:
    Image.effect_noise((2048, 2048), 80).save(run.sample_grid(200))
    page = _page(run)
    assert "data:image/jpeg;base64," in page
    assert len(page) < 2_000_000


def test_no_such_run_is_a_line(tmp_path) -> None:
    with pytest.raises(UserError, match="no such run"):
        build_report(RunDir(tmp_path / "absent"))
