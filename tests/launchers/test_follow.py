"""What a waiting launcher shows: every line as it was written, and on a terminal a bar."""

import io
import sys
from pathlib import Path

import pytest

from launchers.follow import Follower, show_end


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_lines_are_shown_as_they_come_and_steps_move_the_bar(
    stream: type[io.StringIO], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = stream()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setenv("TERM", "xterm")
    log, follower = tmp_path / "log", Follower()
    follower.show(log)
    for text in ("hello\n", "step 1/4  loss 0.5  10.0 images/s\n", "step 4/4  loss 0.25  11.0 images/s\nbye\n"):
        with log.open("a") as file:
            file.write(text)
        follower.show(log)
    follower.close()
    said = shown.getvalue()
    assert "hello" in said
    assert "bye" in said
    assert "loss 0.25  11.0 images/s" in said
    if shown.isatty():
        assert "step 4/4" in said
        assert "step 4/4  loss" not in said  # a bar is between them
    else:
        assert said == log.read_text()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_line_that_is_written_in_pieces_is_shown_whole(
    stream: type[io.StringIO], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python writes a line and its end by two calls, and a file system shows what it has, half a character too."""
    shown = stream()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setenv("TERM", "xterm")
    log, follower = tmp_path / "log", Follower()
    written = "Grüße\nstep 1/4  loss 0.5  10.0 images/s\nlast".encode()
    with log.open("ab", buffering=0) as file:
        for byte in written:
            file.write(bytes([byte]))
            follower.show(log)
    assert "last" not in shown.getvalue()
    follower.close()
    said = shown.getvalue()
    assert "Grüße\n" in said
    assert "last" in said
    assert ("step 1/4  loss" in said) != shown.isatty()  # there it is a bar's
    assert "\n\n" not in said


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_the_first_line_of_the_next_log_does_not_follow_on_half_a_line_of_the_last(
    stream: type[io.StringIO], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = stream()
    monkeypatch.setattr(sys, "stdout", shown)
    follower = Follower()
    for name, text in (("1", "one\nha"), ("2", "two\nlf")):
        (tmp_path / name).write_text(text)
        follower.show(tmp_path / name)
    follower.close()
    assert shown.getvalue() == "one\nha\ntwo\nlf\n"


def test_a_narrow_terminal_shows_all_numbers_and_one_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    log, follower = tmp_path / "log", Follower()
    log.write_text("step 345/800000  loss 0.00029103  16.2 images/s  13 min 35 s left\n")
    follower.show(log)
    follower.close()
    said = shown.getvalue()
    assert "step 345/800000" in said
    assert "loss 0.00029103  16.2 images/s  13 min 35 s left" in said
    assert "━" in said
    assert ":" not in said.replace("━", "")


@pytest.mark.parametrize(("stream", "times"), [(Terminal, 1), (io.StringIO, 2)])
def test_a_terminal_shows_a_refusal_once(
    stream: type[io.StringIO], times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = stream()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", shown)
    log, follower = tmp_path / "log", Follower()
    log.write_text("error: one is missing\nhello\nerror: two is wrong\nerror: three is wrong\n")
    follower.show(log)
    follower.close()
    assert show_end("user_error", "two is wrong; three is wrong", log=log, told=follower.told) == 2
    assert shown.getvalue().count("three is wrong") == times
    assert show_end("user_error", "one is missing", log=log, told=follower.told) == 2
    assert shown.getvalue().count("one is missing") == 2  # it was not the end of that log


def test_an_output_on_a_full_disk_ends_no_job_and_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log, follower = tmp_path / "log", Follower()
    log.write_text("one\n")
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=True))
        follower.show(log)
        with log.open("a") as file:
            file.write("two\n")
        follower.show(log)
        follower.close()
    assert capsys.readouterr().err == f"note: standard output: No space left on device; all lines are in {log}\n"


def test_an_end_is_judged_where_it_can_not_be_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(full, write_through=True))
        assert show_end("fault", "why", log=tmp_path / "none") == 1
        assert show_end("user_error", "why", log=None) == 2
