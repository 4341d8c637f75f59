"""Storage that does not answer is waited for, with growing pauses, as long as is said, and no longer."""

import os
import re
from itertools import pairwise

import pytest
from outages import pass_time, use_patience

from cmscale.config.storage import StorageKeys
from cmscale.io import patience
from cmscale.io.patience import FEWEST_ATTEMPTS, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, is_waiting, patiently
from cmscale.io.protocol import ArrivedChanged, StorageAway
from cmscale.io.settings import INTERACTIVE_MINUTES, storage_settings


def away() -> None:
    raise StorageAway("s3://bucket: the S3 server does not answer (refused)")


@pytest.mark.parametrize("minutes", [INTERACTIVE_MINUTES, 30.0])
def test_the_pauses_grow_and_fill_the_whole_patience(monkeypatch: pytest.MonkeyPatch, minutes: float) -> None:
    clock = pass_time(monkeypatch)
    StorageKeys(patience_minutes=30.0).apply(interactive=minutes < 30)
    with pytest.raises(StorageAway, match=rf"\(refused\); waited {minutes:g} minutes \(storage.patience_minutes\)$"):
        patiently(away)
    longest = min(LONGEST_PAUSE_SECONDS, 60 * minutes / FEWEST_ATTEMPTS)
    lengths = [min(longest, FIRST_PAUSE_SECONDS * 2**n) for n in range(len(clock.waits))]
    assert all(length / 2 <= wait <= length for wait, length in zip(clock.waits[:-1], lengths[:-1], strict=True))
    assert clock.waits[-1] <= lengths[-1]  # the rest of the patience
    assert sum(clock.waits) == pytest.approx(60 * minutes, abs=1)
    assert not is_waiting()


def test_a_storage_that_comes_and_goes_is_asked_often_within_a_short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = pass_time(monkeypatch)
    use_patience(1)
    with pytest.raises(StorageAway):
        patiently(away)
    assert len(clock.waits) >= 12
    assert max(clock.waits) <= 6


def test_pauses_differ_between_ranks() -> None:
    assert len({patience.pause_seconds(8, patience=1800.0) for _ in range(20)}) > 1


def test_the_first_answer_ends_the_wait(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    clock = pass_time(monkeypatch)
    use_patience(30)
    waiting = []

    def answer_after_eight_pauses() -> str:
        waiting.append(is_waiting())
        if len(clock.waits) < 8:
            away()
        return "bytes"

    assert patiently(answer_after_eight_pauses) == "bytes"
    assert waiting == [False] + [True] * 8
    assert not is_waiting()
    first, *more, last = capfd.readouterr().err.splitlines()
    assert re.match(r"waiting for storage, \d+ s of at most 1800 s: s3://bucket: the S3 server does not answer", first)
    assert len(more) == 1  # at growing intervals: 30 s, 90 s, ...
    assert last.startswith("storage answers again, after ")


def test_long_waits_are_said_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pass_time(monkeypatch)
    use_patience(600)
    with pytest.raises(StorageAway):
        patiently(away)
    said = [int(line.split(", ")[1].split(" s of")[0]) for line in capfd.readouterr().err.splitlines()]
    gaps = [later - earlier for earlier, later in pairwise(said)]
    assert len(said) == 11
    for number, gap in enumerate(
        gaps
    ):  # a line is due after 30, 60, 120 ... s, and comes after the pause of that moment
        due = 30 * 2**number
        assert due - 1 <= gap <= due + LONGEST_PAUSE_SECONDS + 1, (number, gap)  # seconds are rounded


@pytest.mark.parametrize(
    "error", [ArrivedChanged("x"), ConnectionError("400"), FileNotFoundError("x"), ValueError("x")]
)
def test_what_waiting_cannot_mend_is_raised_at_once(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    clock = pass_time(monkeypatch)
    use_patience(30)

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        patiently(fail)
    assert clock.waits == []


def test_a_process_knows_of_the_waits_of_those_that_it_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    use_patience(30)
    assert not is_waiting()
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(patience.time, "sleep", lambda _: os._exit(0))
        patiently(away)
    os.waitpid(child, 0)
    assert is_waiting()
    patience._mark(0.0)


def test_a_closed_stderr_does_not_end_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = pass_time(monkeypatch)
    use_patience(1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.print", full)
    with pytest.raises(StorageAway):
        patiently(away)
    assert len(clock.waits) > 5


def test_the_settings_of_a_config_hold_for_the_process() -> None:
    StorageKeys(patience_minutes=5.0, ca_bundle="~/x.pem", requester_pays=True, conditional_writes=False).apply()
    found = storage_settings()
    assert (found.patience_minutes, found.requester_pays, found.conditional_writes) == (5.0, True, False)
    assert found.ca_bundle == os.path.expanduser("~/x.pem")  # noqa: PTH111
    StorageKeys(patience_minutes=0.0).apply(interactive=True)
    assert storage_settings().patience_minutes == 0
