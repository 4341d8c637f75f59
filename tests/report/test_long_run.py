"""The report of a run as long as the paper's stays small, and hides nothing behind what happens often."""

import csv
import io
import json
import os
import re
import time

import numpy as np
import pytest
from long_run import CHECKPOINTS, FAULT, STEPS, write_long_run
from run_folder import write_run

from cmscale.report import build_report, numbers
from cmscale.report.facts import read_facts
from cmscale.report.happened import EventRow, grouped, stretches, timeline
from cmscale.report.measured import Series, decimated, read_measured
from cmscale.report.numbers import last_sign
from cmscale.runs.folder import RunDir
from cmscale.runs.log import append_line, read_lines


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDir:
    return write_long_run(tmp_path_factory.mktemp("runs") / "long", grids=30)


@pytest.fixture(scope="module")
def page(run: RunDir) -> str:
    return build_report(run).read_text()


def _curve(page: str, title: str) -> list[dict[str, str]]:
    numbers = json.loads(page.partition('id="numbers">')[2].partition("</script>")[0])
    return list(csv.DictReader(io.StringIO(numbers["curves"][title])))


@pytest.mark.long
def test_the_page_of_a_long_run_is_small_and_leaves_no_event_out(run: RunDir, page: str) -> None:
    assert len(page) < 8 << 20
    table = page[page.index('id="events"') : page.index('id="provenance"')]
    assert table.count(FAULT) == 1
    assert '<td class="event fault"' in table
    counts = re.findall(r'event checkpoint"[^>]*>checkpoint</td><td class="n" data-label="count">(\d+)<', table)
    assert sum(map(int, counts)) == CHECKPOINTS
    assert table.count('class="event preempted"') == 4
    assert table.count("<tr>") < 40
    marks = re.findall(r'<i class="(\w+)" style', table)
    assert (marks.count("fault"), marks.count("preempted"), marks.count("resumed")) == (1, 4, 5)
    assert marks.count("checkpoint") > 150


@pytest.mark.long
def test_curves_of_a_long_run_have_few_points_that_stand_for_all_values(run: RunDir, page: str) -> None:
    points = _curve(page, "Loss")
    loss = read_measured(run).of("loss")
    assert len(points) <= 400
    assert sum(int(point["values"]) for point in points) == len(loss) == STEPS // 50 + 1
    assert float(points[0]["largest"]) == pytest.approx(loss.values[:41].max(), rel=1e-5)
    assert min(float(point["least"]) for point in points) == pytest.approx(loss.values.min(), rel=1e-5)
    assert "16,001 values in 400 points" in page
    assert "Constant: Learning rate 8e-06" in page


@pytest.mark.long
def test_evaluations_follow_the_curves_the_best_first_then_the_newest(page: str) -> None:
    assert page.index('id="training"') < page.index('id="evaluations"')
    steps = re.findall(r'<tr( class="best")?><td class="n" data-label="step">([\d,]+)</td>', page)
    assert [bool(best) for best, _ in steps] == [True] * 2 + [False] * 70  # of one and of two evaluations
    shown = [int(step.replace(",", "")) for _, step in steps]
    assert shown[:2] == [STEPS, STEPS]
    assert shown[2:] == sorted(shown[2:], reverse=True)
    assert page.count("CD in the paper, 1 NFE") == 2  # against sampling steps, over training
    assert "CT in the paper" not in page


@pytest.mark.long
def test_time_and_cost_of_a_long_run(run: RunDir, page: str) -> None:
    tiles = dict(re.findall(r'<dt>([^<]*)</dt><dd class="value">([^<]*)</dd>', page))
    work = stretches(list(read_lines(run.events)))
    hours = sum(each.seconds for each in work) / 3600
    assert len(work) == 6
    assert hours == pytest.approx(0.4 * STEPS / 3600, rel=0.01)
    assert tiles["GPU-hours"] == f"{64 * hours:,.4g}"
    assert tiles["MFU"] == "41.0%"
    assert tiles["peak memory"] == "61.2 GiB"


@pytest.mark.parametrize("why", ["the same {}", "another {}"])
def test_however_many_events_there_are_the_one_fault_has_a_row(why: str) -> None:
    events = [{"time": 1.0, "event": "start", "step": 0, "rank": 0, "why": ""}]
    for number in range(3000):
        reason = why.format(number if why.startswith("another") else "")
        events += [
            {"time": 2.0 + number, "event": "preempted", "step": number, "rank": 0, "why": reason},
            {"time": 2.5 + number, "event": "resumed", "step": number, "rank": 0, "why": ""},
            {"time": 2.6 + number, "event": "checkpoint", "step": number, "rank": 0, "why": ""},
        ]
    fault = {"time": 500.2, "event": "fault", "step": 7, "rank": 3, "why": "out of memory"}
    events.insert(1500, fault)
    rows = grouped(events)
    assert len(rows) <= 150
    assert sum(row.count for row in rows) == len(events)
    (found,) = (row for row in rows if row.event == "fault")
    assert (list(found.reasons), found.step, found.rank) == (["out of memory"], "7", "3")
    line = timeline(events)
    assert line is not None
    assert line.kinds["fault"] == 1
    assert len(line.marks) < 2000
    assert len(line.work) < 500


def test_a_row_of_events_shows_first_and_last_and_counts_other_reasons() -> None:
    row = EventRow("bad_sample")
    for number in range(5):
        row.add(
            {
                "time": 1.79e9 + number,
                "event": "bad_sample",
                "step": 10 * number,
                "rank": number % 2,
                "why": f"{number}",
            }
        )
    assert (row.count, row.step, row.rank, list(row.reasons), row.more_reasons) == (
        5,
        "0 – 40",
        "2 ranks",
        ["0", "1", "2"],
        2,
    )
    assert row.at == "2026-09-21 14:13:20 – 2026-09-21 14:13:24"


def test_a_start_that_never_said_how_it_ended_counts_until_its_last_sign() -> None:
    events = [
        {"time": 100.0, "event": "start", "ranks": 2},
        {"time": 160.0, "event": "checkpoint"},
        {"time": 900.0, "event": "resumed", "ranks": 4},
        {"time": 950.0, "event": "evaluated"},
    ]
    found = stretches(events, last_sign=930.0)
    assert [(each.seconds, each.ranks) for each in found] == [(60.0, 2), (30.0, 4)]


def test_a_start_that_was_killed_counts_until_the_metrics_that_the_next_one_found() -> None:
    events = [
        {"time": 100.0, "event": "start", "ranks": 2},
        {"time": 160.0, "event": "checkpoint"},
        {"time": 890.0, "event": "unfinished_save"},  # by the next start
        {"time": 895.0, "event": "caution"},
        {"time": 900.0, "event": "resumed", "ranks": 4, "measured_until": 250.5},
        {"time": 930.0, "event": "checkpoint"},
        {"time": 990.0, "event": "resumed", "ranks": 4, "measured_until": 250.5},  # nothing was measured since
        {"time": 999.0, "event": "finished"},
    ]
    assert [(each.seconds, each.ranks) for each in stretches(events)] == [(150.5, 2), (30.0, 4), (9.0, 4)]
    assert [each.seconds for each in stretches([*events[:4], {"time": 900.0, "event": "resumed"}])] == [60.0, 0.0]


def test_the_time_at_work_of_a_copy_ends_with_the_last_recorded_step(tmp_path) -> None:
    run = write_run(tmp_path / "a_run")
    began = {"time": 1.79e9, "event": "start", "step": 0, "rank": 0, "ranks": 2}
    saved = {"time": 1.79e9 + 50, "event": "checkpoint", "step": 15}
    measured = {"time": 1.79e9 + 5e5, "event": "evaluated", "step": 15}
    run.events.write_text("".join(json.dumps(each) + "\n" for each in (began, saved, measured)))
    run.metrics.write_text("".join(json.dumps({"step": step, "seconds": 30.0}) + "\n" for step in (10, 20, 30)))
    os.utime(run.metrics, (1.79e9 + 9e5, 1.79e9 + 9e5))  # as a copy has it
    assert last_sign(read_facts(run)) == 1.79e9 + 50 + 15 + 30
    os.utime(run.metrics, (1.79e9 + 60, 1.79e9 + 60))  # steps 20 and 30 are of a start before
    assert last_sign(read_facts(run)) == 1.79e9 + 60


def test_decimation_keeps_extremes_and_means() -> None:
    steps = np.arange(10_000) * 50
    values = np.random.default_rng(0).normal(size=10_000)
    values[777] = 1e6
    band = decimated(Series(steps, values), most=100)
    assert len(band.steps) == 100
    assert band.counts.sum() == 10_000
    assert band.high.max() == 1e6
    assert band.low.min() == values.min()
    assert (band.mean * band.counts).sum() == pytest.approx(values.sum())
    few = decimated(Series(steps[:100], values[:100]), most=100)
    assert not few.is_joined
    assert few.mean.tolist() == values[:100].tolist()


def test_of_each_step_the_last_finite_value_counts(tmp_path) -> None:
    run = RunDir(tmp_path)
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 2.5), (3, float("nan")), (4, 10**400)):
        append_line(run.metrics, {"step": step, "loss": loss})
    append_line(run.metrics, {"step": 10**30, "loss": 1.0})
    append_line(run.metrics, {"step": True, "loss": 1.0})
    found = read_measured(run)
    assert found.of("loss").points() == [(1, 1.0), (2, 2.5)]
    assert found.last_step == 4
    assert len(found.of("absent")) == 0
    assert read_measured(RunDir(tmp_path / "none")).last_step is None


def test_a_run_that_went_back_is_where_it_goes_on(tmp_path) -> None:
    """Its steps, images, loss and time left are those of now; what it had done before it fell back is gone."""
    run = write_run(tmp_path / "a_run", total_steps=1000)
    run.events.write_text("")
    for event, step in (
        ("start", 0),
        ("checkpoint", 900),
        ("rolled_back", 1000),
        ("checkpoint", 150),
        ("evaluated", 900),
    ):
        append_line(run.events, {"time": time.time() + step / 1e6, "event": event, "step": step, "rank": 0, "why": ""})
    for step in (110, 210):
        append_line(run.metrics, {"step": step, "samples": 64 * step, "loss": 7.0, "images_per_second": 210.0})
    tiles = {each.name: each.value for each in numbers.tiles(read_facts(run), state="running")}
    assert (tiles["steps"], tiles["images seen"], tiles["time left"]) == ("210", "13,440", "4 min")
    assert read_facts(run).measured.of("loss").steps.tolist() == [*range(5, 110, 5), 110, 210]


def test_a_run_that_wrote_nothing_for_long_is_stale(tmp_path) -> None:
    run = write_run(tmp_path / "a_run")
    run.config.write_text(run.config.read_text().replace("total_steps: 200", "total_steps: 9000"))
    run.events.write_text('{"time": 1.79e9, "event": "start", "step": 0, "rank": 0, "why": ""}\n')
    run.checkpoints.mkdir()
    assert read_facts(run).state()[0] == "running"
    assert ">time left<" in build_report(run).read_text()
    long_ago = time.time() - 7200
    for path in (run.metrics, run.events, run.checkpoints):
        os.utime(path, (long_ago, long_ago))
    state, known_by = read_facts(run).state()
    assert state == "stale"
    assert known_by.startswith("nothing written for 2 h")
    page = build_report(run).read_text()
    assert '<span class="status stale">stale</span>' in page
    assert ">time left<" not in page
