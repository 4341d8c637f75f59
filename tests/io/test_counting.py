"""Long work says how far it is, how fast, and how long it takes, on a terminal and in a log."""

import io
import re

import pytest

from cmscale.io.counting import Counting, counted, in_words


@pytest.fixture(autouse=True)
def lines_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmscale.io.counting.FIRST_SECONDS", 10.0)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def counted_to(clock: Clock, stream: io.StringIO, *, steps: int, seconds: float, done: int = 0) -> list[str]:
    with Counting("sampling", total=1000, done=done, unit="samples", stream=stream, clock=clock) as counting:
        for _ in range(steps):
            clock.now += seconds
            counting.advance(10)
    return stream.getvalue().splitlines()


def test_a_log_gets_a_line_after_ten_seconds_then_one_a_minute_and_one_at_the_end() -> None:
    lines = counted_to(Clock(), io.StringIO(), steps=100, seconds=2.0)
    assert lines == [
        "sampling: 50 of 1000 samples, 5/s, 3 min 10 s left",
        "sampling: 350 of 1000 samples, 5/s, 2 min 10 s left",
        "sampling: 650 of 1000 samples, 5/s, 1 min 10 s left",
        "sampling: 950 of 1000 samples, 5/s, 10 s left",
        "sampling: 1000 of 1000 samples in 3 min 20 s, 5/s",
    ]


def test_what_is_short_is_silent_and_what_was_done_before_does_not_count_for_the_rate() -> None:
    assert counted_to(Clock(), io.StringIO(), steps=4, seconds=2.0) == []
    lines = counted_to(Clock(), io.StringIO(), steps=10, seconds=10.0, done=900)
    assert lines[0] == "sampling: 910 of 1000 samples, 1/s, 1 min 30 s left"


def test_slow_work_is_counted_by_the_minute_or_hour() -> None:
    lines = counted_to(Clock(), io.StringIO(), steps=1, seconds=1000.0)
    assert lines[0] == "sampling: 10 of 1000 samples, 0.6/min, 1 d 3 h left"
    assert counted_to(Clock(), io.StringIO(), steps=1, seconds=36000.0)[1] == (
        "sampling: 10 of 1000 samples in 10 h, 1/h"
    )


def test_no_rate_is_stated_before_anything_is_done() -> None:
    clock, stream = Clock(), io.StringIO()
    with Counting("sampling", total=1000, unit="samples", stream=stream, clock=clock) as counting:
        clock.now += 11.0
        counting.set(0)
    assert stream.getvalue().splitlines() == [
        "sampling: 0 of 1000 samples, time left unknown",
        "sampling: 0 of 1000 samples in 11 s",
    ]


def test_a_terminal_gets_a_bar_that_ends_with_the_rate_of_the_whole_work() -> None:
    stream = Terminal()
    counted_to(Clock(), stream, steps=100, seconds=2.0)
    last = stream.getvalue()[-400:]
    for words in ("sampling", "1000/1000", "5/s", "in 3 min 20 s"):
        assert words in last


def test_nothing_stays_on_a_terminal_of_a_work_that_was_short() -> None:
    streams = Terminal(), Terminal()
    counted_to(Clock(), streams[0], steps=3, seconds=0.25)
    counted_to(Clock(), streams[1], steps=5, seconds=0.25)
    erased = "\x1b[1A\x1b[2K"
    assert [stream.getvalue().endswith(erased) for stream in streams] == [True, False]


def test_large_rates_have_no_exponent() -> None:
    clock, stream = Clock(), io.StringIO()
    with Counting("sampling", total=1_000_000, stream=stream, clock=clock) as counting:
        clock.now += 20.0
        counting.advance(152_222)
    assert "7,610/s" in stream.getvalue()


def test_a_narrow_terminal_shortens_the_name_and_not_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    clock, stream = Clock(), Terminal()
    with Counting("reading a/long/path/to/the/checkpoint", total=28, unit="MB", stream=stream, clock=clock) as counting:
        clock.now += 20.0
        counting.set(14)
    shown = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", stream.getvalue()).strip().splitlines()[-1]
    assert re.fullmatch(r".*reading a/[a-z/]*… .*14/28 MB 0.7/s in 20 s *", shown)


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    clock, stream = Clock(), io.StringIO()
    with Counting("sampling", total=10, active=False, stream=stream, clock=clock) as counting:
        clock.now = 100.0
        counting.advance(5)
    assert stream.getvalue() == ""
    assert list(counted(range(3), "images", total=3)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_what_failed_does_not_say_that_it_is_done() -> None:
    clock, stream = Clock(), io.StringIO()

    def fail() -> None:
        with Counting("sampling", total=10, stream=stream, clock=clock) as counting:
            clock.now = 20.0
            counting.advance(5)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert stream.getvalue().splitlines() == ["sampling: 5 of 10 images, 0.25/s, 20 s left"]


@pytest.mark.parametrize(
    ("seconds", "words"), [(5, "5 s"), (61, "1 min 1 s"), (3600, "1 h"), (7320, "2 h 2 min"), (90000, "1 d 1 h")]
)
def test_spans_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
