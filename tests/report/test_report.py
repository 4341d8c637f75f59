"""The report shows what a run has, is one self-contained file, and calls no other score FID."""

import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from run_folder import write_evaluation, write_run

from cmscale.config.methods import METHODS_BY_KIND
from cmscale.errors import UserError
from cmscale.evaluation.metrics.registry import all_metrics
from cmscale.io.process import CHECKOUT
from cmscale.report import build_report
from cmscale.report.facts import read_facts
from cmscale.report.plots import Curve, progress_curve, steps_curve, training_curves
from cmscale.report.settings import settings_of
from cmscale.runs import standing
from cmscale.runs.comparison import once_each
from cmscale.runs.folder import RunDir
from cmscale.runs.log import append_line
from cmscale.runs.results import EvaluationResult, Metric


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
    for title in ("Loss", "Discretisation N(k)"):
        assert f"<h3>{title}</h3>" in page
    folded = "Learning rate 0.0001, Target network&#39;s EMA μ(k) 0.95, Gradient norm 1, Images per second 210."
    assert f"Constant: {folded}" in page
    assert page.count("data:image/png;base64,") == 3 + 1  # the first grid again, beside the slider
    assert "FD-EfficientNet against the number of sampling steps" in page
    assert "FD-EfficientNet over training" in page


def test_what_was_logged_by_quartile_of_the_noise_is_plotted(tmp_path) -> None:
    run = write_run(tmp_path / "scm", kind="scd")
    assert "by quartile" not in _page(run)
    for step in range(5, 100, 5):
        quartiles = {f"{name}_q{q}": q / step for name in ("loss", "tangent_norm", "weighting") for q in (1, 2, 3, 4)}
        append_line(run.metrics, {"step": step, "samples": step, "loss": 1.0, **quartiles, "loss_q2": None})
    page = _page(run)
    for title in ("Loss", "Norm of the tangent g", r"Learned weighting w\(t\)"):
        assert len(re.findall(rf"<h3>{title} by quartile of the noise</h3>", page)) == 1
    assert len(re.findall(">1, least noise<", page)) == 3


def test_the_page_loads_nothing_from_elsewhere(run) -> None:
    page = _page(run)
    loaded = re.findall(r"src=\"([^\"]*)\"", page) + re.findall(r"url\(([^)]*)\)", page)
    assert loaded
    assert all(link.startswith(("data:", "#")) for link in loaded)
    links = re.findall(r"<a href=\"([^\"]*)\"", page)
    assert links
    assert all((run.report.parent / link).is_file() for link in links)  # also where the page is opened as a file
    assert "@import" not in page
    assert re.findall(r"<script[^>]*>", page) == ['<script type="application/json" id="numbers">', "<script>"]
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    program = page[page.rindex("<script>") + len("<script>") : page.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()
    assert "default-src 'none'" in policy[1]
    assert f"script-src 'sha256-{digest}'" in policy[1]  # nothing else that is in the page runs


def test_values_have_error_bars_where_there_were_several_sets(run) -> None:
    write_evaluation(run, step=200, nfe=4, values=(123.0,))
    page = _page(run)
    assert re.search(r"<strong>21\.00</strong><small>± 1\.41</small>", page)
    assert re.search(r"<strong>123\.00</strong><small></small>", page)


def _numbers(page: str) -> dict:
    """What the page's buttons save."""
    return json.loads(page.partition('id="numbers">')[2].partition("</script>")[0])


def _best(page: str) -> dict[str, tuple[str, str]]:
    """The tiles of best scores: value and remark by title."""
    tiles = re.findall(r'<dt>(best [^<]*)</dt><dd class="value">([^<]*)</dd><dd class="soft">([^<]*)</dd>', page)
    return {title: (value, remark) for title, value, remark in tiles}


def test_the_best_tile_shows_the_best_evaluation(run) -> None:
    write_evaluation(run, step=150, nfe=2, values=(9.0,))
    write_evaluation(run, step=200, nfe=2, values=(12.0,))
    assert _best(_page(run)) == {
        "best FD-EfficientNet, 1 NFE": ("21.00", "step 200, 500 samples against crops"),
        "best FD-EfficientNet, 2 NFE": ("9.00", "step 150, 500 samples against crops"),
    }


def test_only_evaluations_of_one_score_reference_and_sample_count_are_compared(run) -> None:
    write_evaluation(run, step=150, nfe=2, values=(5.0,), reference="4567")
    write_evaluation(run, step=160, nfe=2, values=(4.0,), num_samples=400)
    write_evaluation(run, step=170, nfe=2, values=(3.0,), features="inception")
    assert _best(_page(run)) == {
        "best FD-EfficientNet, 1 NFE": ("21.00", "step 200, 500 samples against crops"),
        "best FD-EfficientNet, 2 NFE": ("10.50", "step 200, 500 samples against crops"),
        "best FID, 2 NFE": ("3.00", "step 170, 500 samples against crops"),
    }
    write_evaluation(run, step=180, nfe=2, values=(30.0,), num_samples=50_000)
    write_evaluation(run, step=180, nfe=1, values=(40.0,), num_samples=50_000)
    best = _best(_page(run))
    assert best["best FD-EfficientNet, 2 NFE"] == ("30.00", "step 180, 50,000 samples against crops")
    assert best["best FD-EfficientNet, 1 NFE"] == ("40.00", "step 180, 50,000 samples against crops")


def test_curves_join_only_results_that_may_be_compared_and_say_which(run) -> None:
    for step, nfe in ((100, 1), (200, 1), (200, 2)):
        write_evaluation(run, step=step, nfe=nfe, values=(9.0,), num_samples=50_000)
        write_evaluation(run, step=step, nfe=nfe, values=(5.0,), reference="4567", reference_name="crops")
    write_evaluation(run, step=200, nfe=8, values=(1.0,), num_samples=20)
    page = _page(run)
    panels = re.findall(r"<h3>FD-EfficientNet ([^<]*)</h3><p class=\"soft\">([^<]*)</p>", page)
    for title in ("over training", "against the number of sampling steps"):
        assert [basis for found, basis in panels if found == title] == [
            "50,000 samples against crops (0123)",
            "500 samples against crops (0123)",
            "500 samples against crops (4567)",
        ]
    assert '<td class="text" data-label="reference">crops (4567)</td>' in page
    assert "20 samples against" not in page  # one point is no curve
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_of_one_network_measured_several_times_the_result_with_most_seeds_counts_then_the_newest() -> None:
    def measured(value: float, *, seeds: int, date: str, weights_sha256: str = "a") -> EvaluationResult:
        return _measured(value).model_copy(
            update={"seeds": tuple(range(seeds)), "date": date, "protocol": {"weights_sha256": weights_sha256}}
        )

    old, several, new = (
        measured(3.0, seeds=1, date="2026-01-01"),
        measured(2.0, seeds=3, date="2026-01-02"),
        measured(1.0, seeds=1, date="2026-01-03"),
    )
    assert once_each([old, several, new]) == [several]
    assert once_each([old, new]) == [new]
    retrained = measured(9.0, seeds=1, date="2026-02-01", weights_sha256="b")  # the run was started afresh
    assert once_each([old, several, retrained]) == once_each([retrained, several, old]) == [retrained]


def test_the_best_of_a_metric_follows_its_direction() -> None:
    results = [_measured(value) for value in (0.3, 0.7, 0.5)]
    for metric in all_metrics():
        best = metric.best(results).metrics[metric.name].mean
        assert best == (0.7 if metric.name in HIGHER_IS_BETTER else 0.3), metric.name


HIGHER_IS_BETTER = {"inception_score", "inception_score_adm", "precision", "recall", "density", "coverage"}


def _measured(value: float) -> EvaluationResult:
    """An evaluation in which every metric has this value."""
    return EvaluationResult(
        num_samples=9,
        seeds=(0,),
        features="inception",
        score_name="FID",
        reference={},
        metrics={metric.name: Metric.of([value]) for metric in all_metrics()},
        seconds=1.0,
    )


def test_every_metric_is_a_column_and_only_metrics_that_were_measured(run) -> None:
    headers = re.findall(r'<th class="n(?: metric)?">([^<]*)</th>', _page(run))
    assert headers[headers.index("seeds") + 1 :][:2] == ["FD-EfficientNet", "precision-EfficientNet"]
    metrics = {metric.name: 0.125 for metric in all_metrics() if metric.name != "fid"}
    write_evaluation(run, step=200, nfe=1, values=(20.0,), metrics=metrics)
    page = _page(run)
    headers = re.findall(r'<th class="n(?: metric)?">([^<]*)</th>', page)
    titles = [metric.title_over("FD-EfficientNet") for metric in all_metrics() if metric.name != "fid"]
    assert headers[headers.index("FD-EfficientNet") + 1 :][: len(titles)] == titles
    assert len(re.findall(">0.1250?<small></small></td>", page)) == 5  # KID and those of nearest neighbours


@pytest.mark.parametrize("kind", METHODS_BY_KIND)
@pytest.mark.long
def test_the_methods_title_is_the_one_that_the_method_states(kind: str, tmp_path) -> None:
    page = _page(write_run(tmp_path / "a_run", kind=kind))
    assert f'<p class="kind">{METHODS_BY_KIND[kind].facts.title} at 16 px</p>' in page


def test_a_method_of_another_version_is_shown_by_its_kind(tmp_path) -> None:
    assert '<p class="kind">other at 16 px</p>' in _page(write_run(tmp_path / "a_run", kind="other"))


WITHOUT_TORCH = """
import sys
from pathlib import Path
from cmscale.report import build_report
from cmscale.runs.folder import RunDir

build_report(RunDir(Path(sys.argv[1])))
assert "torch" not in sys.modules
"""


def test_a_report_needs_no_torch(run) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(run.root)], cwd=CHECKOUT, check=True)


def test_a_distance_over_other_features_is_never_called_fid(run) -> None:
    page = _page(run)
    evaluations = page[page.index('id="evaluations"') : page.index("Published results")]
    assert "It is not an FID" in evaluations
    assert re.search(r">FID<", evaluations) is None
    write_evaluation(run, step=200, nfe=1, values=(7.8,), features="inception")
    both = _page(run)
    shown = both[both.index('id="evaluations"') : both.index("Published results")]
    tables = re.findall(r"<thead>.*?</table>", shown, re.DOTALL)
    (fid,) = (table for table in tables if '<th class="n metric">FID</th>' in table)
    (other,) = (table for table in tables if '<th class="n metric">FD-EfficientNet</th>' in table)
    assert "7.80" in fid
    assert "7.80" not in other
    assert '<th class="n metric">precision</th>' in fid
    assert '<th class="n metric">precision-EfficientNet</th>' in other


def test_equal_warnings_are_one_line_that_names_the_evaluations(run) -> None:
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


def test_what_is_downloaded_is_what_was_logged_to_the_last_digit(run: RunDir) -> None:
    kept = run.root.rename(run.root.with_name("-1+1"))
    run = RunDir(kept)
    run.metrics.unlink()
    logged = {step: 1 / (3 * step) for step in range(1, 30)}
    for step, loss in logged.items():
        append_line(run.metrics, {"step": step, "loss": loss})
    text = _numbers(build_report(run).read_text())["curves"]["Loss"]
    rows = list(csv.DictReader(io.StringIO(text)))
    assert {int(row["step"]): float(row["mean"]) for row in rows} == logged
    assert {row["curve"] for row in rows} == {"'-1+1"}  # no formula


def test_the_papers_numbers_are_shown_for_comparison(run) -> None:
    page = _page(run)
    for number in ("7.80", "5.22", "3.57", "11.00", "20.70"):
        assert f'<td class="n" data-label="FID">{number}</td>' in page


def test_quality_against_the_emas_rate_where_there_are_several(run) -> None:
    assert "against the EMA" not in _page(run)
    write_evaluation(run, step=200, nfe=1, values=(20.0, 21.0), weights="ema_0.9999")
    write_evaluation(run, step=200, nfe=1, values=(30.0, 31.0), weights="master")
    page = _page(run)
    assert "<h3>FD-EfficientNet against the EMA&#39;s length</h3>" in page
    for label in ("step 200, 1 NFE", "no EMA, 1 NFE", "10k", "averaged steps"):
        assert label in page


def test_searched_times_are_a_curve_of_their_own(run) -> None:
    write_evaluation(run, step=200, nfe=2, values=(9.0,), times=(80.0, 4.0))
    write_evaluation(run, step=200, nfe=2, values=(8.0,), times=(80.0, 3.0))
    page = _page(run)
    assert "my_run, ema_0.999, searched times" in page
    assert '<small class="times">at 80, 3</small>' in page


def test_no_marker_is_cut_off_at_the_top_where_a_score_hardly_varies() -> None:
    of_one_size = [Curve("a", [1, 2], [383.0, 390.0]), Curve("b", [1, 2], [390.0, 389.0])]
    for drawn in (
        steps_curve(of_one_size, name="n", y_label="FID"),
        progress_curve(of_one_size, name="n", y_label="FID"),
    ):
        found = re.search(r"<clipPath.*? y=\"([0-9.]+)\"", drawn, flags=re.DOTALL)
        assert found is not None
        frame = float(found[1])
        markers = [float(y) for y in re.findall(r"<use [^>]*y=\"([0-9.]+)\" style=\"fill: #", drawn)]
        assert min(y for y in markers if y > frame - 5) > frame + 3  # those of the legend are above


def test_thirty_curves_differ_in_colour_or_line_and_no_name_of_theirs_is_cut_off() -> None:
    drawn = training_curves([Curve(f"run_{n:03d}", [1, 2], [n, n]) for n in range(30)], name="Loss")
    assert len(set(re.findall(r"style=\"fill: none; (stroke[^\"]*)\"", drawn))) >= 30
    width = float(re.findall(r"viewBox=\"0 0 ([0-9.]+)", drawn)[0])
    names = re.findall(r"<text [^>]*(?:x=\"|translate\()([0-9.]+)[^>]*>(run_[^<]*)<", drawn)
    assert len(names) == 30
    assert all(float(x) + 5 * len(name) <= width for x, name in names)


def test_a_long_name_is_whole_in_a_legend() -> None:
    names = [f"/a/{'deep/' * 30}{end}" for end in ("first", "last")]
    drawn = training_curves([Curve(name, [1, 2], [3, 4]) for name in names], name="Loss")
    width, height = map(float, re.findall(r"viewBox=\"0 0 ([0-9.]+) ([0-9.]+)", drawn)[0])
    lines = re.findall(r"<text [^>]*(?:x=\"|translate\()([0-9.]+)[^>]*>([^<]*[a-z/]{3}[^<]*)<", drawn)
    assert all(float(x) + 4.4 * len(line) <= width for x, line in lines)
    assert "".join(line for _, line in lines[-6:]) == "".join(names)
    assert height > 180 + 6 * 10  # the curves keep their room


def test_a_value_of_null_is_no_default_where_that_is_another(run) -> None:
    run.config.write_text(run.config.read_text() + "slurm: {cpus_per_task: null, account: null}\n")
    shown = {each.key: (each.value, each.default) for each in settings_of(read_facts(run))}
    assert shown["slurm.cpus_per_task"] == ("null", "8")
    assert "slurm.account" not in shown


def test_changed_values_of_a_branch_are_as_a_config_has_them(run) -> None:
    lineage = {"parent": "/a", "step": 3, "samples": 3, "generation": 1, "manifest_sha256": "ab", "averages": {}}
    changed = {"data.flip": [True, False], "model.dropout_resolutions": [None, [8, 16]]}
    run.provenance.write_text(json.dumps({"starts": [], "branch": lineage | {"changed": changed}}))
    told = re.findall(r'data-label="(?:parent|here)">([^<]*)', _page(run))
    assert told[:4] == ["true", "false", "null", "[8, 16]"]


def test_a_picture_whose_name_is_not_utf_8_is_linked(run) -> None:
    run.edits.mkdir()
    shutil.copy(run.sample_grid(0), os.fsencode(run.edits) + b"/caf\xe9.png")
    assert 'href="../edits/caf%E9.png"' in _page(run)


def test_a_curve_of_one_run_among_several_has_a_name(run, tmp_path) -> None:
    other = write_run(tmp_path / "other")
    append_line(run.metrics, {"step": 205, "samples": 13120, "loss": 0.1, "mfu": 0.3})
    assert "my_run" in re.findall(r"<h3>Share of the peak.*?</svg>", _page(run, siblings=[other]), flags=re.DOTALL)[0]


def test_siblings_share_tables_and_curves(run, tmp_path) -> None:
    teacher = write_run(tmp_path / "my_teacher", kind="edm", nfes=(79,))
    page = _page(run, siblings=[teacher])
    assert "my_teacher, 79 NFE" in page
    assert '<td class="text" data-label="run">my_teacher</td>' in page
    loss = _numbers(page)["curves"]["Loss"].splitlines()
    assert {line.split(",")[0] for line in loss[1:]} == {"my_run", "my_teacher"}


def test_a_run_that_has_nothing_yet_has_a_page(tmp_path) -> None:
    run = RunDir(tmp_path / "new")
    run.root.mkdir()
    page = _page(run)
    for text in ("never started", "No sample grid yet", "No evaluation yet", "No training step has been logged yet"):
        assert text in page


def test_a_run_that_waits_in_the_queue_for_its_first_start_is_called_queued(tmp_path, monkeypatch) -> None:
    run = RunDir(tmp_path / "new")
    job = run.logs / "submissions" / "a" / "job.json"
    job.parent.mkdir(parents=True)
    job.write_text(json.dumps({"worker": "train", "job_id": "12"}))
    monkeypatch.setattr(standing, "job_states", lambda job_id, clusters: {"PENDING": "Priority"})
    page = _page(run)
    assert '<span class="status queued">queued</span>' in page
    assert "Known by Slurm job 12 is PENDING: Priority" in page


def test_the_status_is_what_happened_last(run) -> None:
    append_line(run.events, {"time": 1.79e9 + 10, "event": "fault", "step": 200, "rank": 1, "why": "loss <nan>"})
    page = _page(run)
    assert '<span class="status failed">failed</span>' in page
    assert "loss &lt;nan&gt;" in page  # the run's content is text, never markup


def test_a_loss_that_is_not_finite_and_a_cut_line_spoil_nothing(run) -> None:
    append_line(run.metrics, {"step": 205, "samples": 1, "loss": float("nan"), "lr": 1e-4})
    with run.metrics.open("a") as file:
        file.write('{"step": 210, "lo')
    assert "<h3>Loss</h3>" in _page(run)


def test_an_evaluation_that_is_not_valid_is_named(run) -> None:
    (run.evaluations / "step-000000300-x-nfe1.json").write_text("{}")
    assert "step-000000300-x-nfe1.json: not a valid EvaluationResult" in _page(run)
    run.consistency_errors.mkdir()
    for number, text in enumerate(("{", "[]", '{"step": 5}')):
        (run.consistency_errors / f"step-00000000{number}-x.json").write_text(text)
    assert _page(run).count("not the errors of a step") == 3


def test_a_score_that_is_no_number_is_never_the_best(run) -> None:
    write_evaluation(run, step=200, nfe=1, values=(5.0,), num_samples=900)
    write_evaluation(run, step=100, nfe=1, values=(7.0,), num_samples=900)
    path = next(path for path in run.evaluations.glob("*.json") if '"mean": 7.0' in path.read_text())
    path.write_text(path.read_text().replace("7.0", "NaN"))
    page = _page(run)
    assert f"{path.name}: not a valid EvaluationResult: fid is no finite number" in page
    assert '1 NFE</dt><dd class="value">5.00</dd>' in page


def test_where_the_page_cannot_be_written_the_way_to_see_it_is_named(run) -> None:
    run.report.parent.write_text("")  # a file in place of the folder: refused to root too
    with pytest.raises(UserError, match=r"index\.html: .*; --serve shows the page without writing it"):
        build_report(run)


def test_a_large_grid_is_scaled_down(run) -> None:
    Image.effect_noise((2048, 2048), 80).save(run.sample_grid(200))
    page = _page(run)
    assert "data:image/webp;base64," in page
    assert len(page) < 3_000_000


def test_no_such_run_is_a_line(tmp_path) -> None:
    with pytest.raises(UserError, match="no such run"):
        build_report(RunDir(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.yaml", "method: {kind: ct\n", "config.yaml"),
        ("config.yaml", "method: {kind: ct}\ntrain: {total_steps: many}\n", ""),
        ("provenance.json", "[1", "provenance.json: damaged"),
        ("placement.json", "[]", "placement.json: damaged"),
    ],
)
def test_a_damaged_document_is_named_and_the_page_is_made(run: RunDir, name: str, content: str, said: str) -> None:
    (run.root / name).write_text(content)
    page = _page(run)
    assert "12,800" in page
    assert not said or f'<p class="note">{said}' in page


@pytest.mark.parametrize("record", ['{"event": {"a": 1}}', '{"event": "fault", "why": ["x"]}', '{"event": 3}', "[1]"])
def test_a_line_that_only_looks_like_an_event_is_left_out(run: RunDir, record: str) -> None:
    before = read_facts(run).events
    with run.events.open("a") as file:
        file.write(f"{record}\n")
    assert read_facts(run).events == before
    _page(run)


def test_a_damaged_grid_of_samples_is_named_and_the_page_is_made(run: RunDir) -> None:
    run.samples.mkdir(exist_ok=True)
    (run.samples / "step-000000042.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    page = build_report(run).read_text()
    assert "step-000000042.png: the grid of samples can&#39;t be read (damaged png" in page


@pytest.mark.parametrize(
    "starts",
    [3, [3], [{"packages": True, "command": 7, "git": 5, "time": []}], [{}], {"x": 1}],
    ids=["a number", "a list of numbers", "other kinds of values", "nothing", "an object"],
)
def test_damaged_records_of_starts_are_left_out(tmp_path, starts: object) -> None:
    run = write_run(tmp_path / "run")
    run.provenance.write_text(json.dumps({"starts": starts}))
    assert build_report(run).read_text().startswith("<!doctype html>")
