"""Starts of a run get numbers of their own, however many claim one at a time; the highest is the newest."""

import json
import threading
from pathlib import Path

import pytest

from cmscale.io.process import START
from cmscale.runs.folder import RunDir
from cmscale.runs.generations import claim_next, claimed_by, highest_claimed, read_generation

TRIALS = 200


def test_two_that_claim_at_once_never_get_the_same_number(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    numbers: list[int] = []
    together = threading.Barrier(2)

    def claim() -> None:
        for _ in range(TRIALS):
            together.wait(timeout=60)
            numbers.append(claim_next(run))

    threads = [threading.Thread(target=claim) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 2 * TRIALS + 1))
    assert read_generation(run) == highest_claimed(run) == 2 * TRIALS
    assert json.loads(run.generation.read_text()) == {"generation": 2 * TRIALS}  # releases that read only this file


def test_a_run_of_an_earlier_release_goes_on_counting(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert read_generation(run) == 0
    run.generation.write_text('{"generation": 7}')
    assert read_generation(run) == 7
    assert claim_next(run) == 8
    run.generation.write_text("torn")  # what was claimed is known without it
    assert read_generation(run) == 8
    assert claim_next(run) == 9


def test_a_claim_says_whose_start_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)
    monkeypatch.setenv(START, "one/7.0")
    assert claimed_by(run, claim_next(run)) == "one/7.0"
    monkeypatch.delenv(START)
    assert claimed_by(run, claim_next(run)) == ""
    run.claimed_generation(3).touch()  # its start ended before it had written anything
    assert claimed_by(run, 3) is None
    assert claimed_by(run, 4) is None
