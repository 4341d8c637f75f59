"""Tests of the record of a run's starts."""

import json
from pathlib import Path

from cmscale.runs.folder import RunDir
from cmscale.runs.starts import add_to_newest_start, read_starts


def run_with(tmp_path: Path, text: str | None) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    if text is not None:
        run.provenance.write_text(text)
    return run


def test_what_a_start_finds_out_is_added_to_it_alone(tmp_path: Path) -> None:
    run = run_with(tmp_path, json.dumps({"branch": 7, "starts": [{"host": "a"}, {"host": "b", "user": "c"}, 3]}))
    add_to_newest_start(run, attention="sdpa: fast")
    add_to_newest_start(run, attention="xformers: faster")
    assert read_starts(run) == [{"host": "a"}, {"host": "b", "user": "c", "attention": "xformers: faster"}]
    assert json.loads(run.provenance.read_text())["branch"] == 7


def test_a_run_without_recorded_starts_gets_none(tmp_path: Path) -> None:
    run = run_with(tmp_path, None)
    add_to_newest_start(run, attention="sdpa: fast")
    assert not run.provenance.exists()


def test_a_damaged_record_is_kept_under_another_name(tmp_path: Path) -> None:
    run = run_with(tmp_path, '{"starts": 1')
    add_to_newest_start(run, attention="sdpa: fast")
    assert read_starts(run) == []
    assert (run.root / "provenance.damaged.json").read_text() == '{"starts": 1'
