"""How commands end: after a mistake, a fault, Ctrl-C and a reader that left; at most one line, and its status."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from cmscale.commands.ending import guarded
from cmscale.errors import NoSpace, UserError
from cmscale.io.process import CHECKOUT


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (UserError("two\nlines"), 2, "error: two lines"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ConnectionError("the storage does not answer"), 1, "error: the storage does not answer"),
        (PermissionError(errno.EACCES, "Permission denied", "secret"), 2, "error: secret: Permission denied"),
        (NoSpace("x.npz: no space left"), 1, "error: x.npz: no space left"),
        (OSError(errno.ENOSPC, "No space left on device", "x.npz"), 1, "error: x.npz: No space left on device"),
        (OSError(errno.EIO, "Input/output error", "x.npz"), 1, "error: x.npz: Input/output error"),
        (OSError(errno.EIO, "Input/output error"), 1, "fault: OSError: [Errno 5] Input/output error"),
        (MemoryError(), 1, "fault: not enough memory for this (MemoryError)"),
        (RuntimeError("CUDA out of memory. Tried"), 1, "fault: not enough memory for this (CUDA out of memory. Tried)"),
        (LookupError("of the surroundings"), 1, "error: of the surroundings"),
        (None, 0, ""),
    ],
)
def test_every_ending_is_one_line(raised: BaseException | None, status: int, line: str, capsys) -> None:
    def main(arguments: list[str]) -> None:
        if raised is not None:
            raised.args = raised.args or ("",)
            raise raised

    assert guarded(main, [], faults=(LookupError,)) == status
    assert capsys.readouterr().err.strip() == line


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("ascii", b"\\xfc \\u2581 \\udcff\n"),
        ("latin-1", b"\xfc \\u2581 \\udcff\n"),
        ("utf-8", b"\xc3\xbc \xe2\x96\x81 \xff\n"),
    ],
)
def test_what_an_encoding_lacks_is_written_out(encoding: str, printed: bytes, monkeypatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert guarded(lambda _: print("ü ▁ \udcff"), []) == 0
    assert stdout.buffer.getvalue() == printed  # pyright: ignore[reportAttributeAccessIssue]


def test_a_bug_keeps_its_traceback() -> None:
    def main(arguments: list[str]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        guarded(main, [])


SCRIPTS = [
    ["-m", "cmscale", "schema"],
    ["launchers/submit.py", "--dry-run", "configs/demo_edm.yaml"],
    ["-m", "cmscale", "--help"],
    ["-m", "cmscale", "sample", "--help"],
    ["launchers/evaluate.py", "--help"],
]


@pytest.mark.parametrize("script", SCRIPTS, ids=" ".join)
def test_a_reader_that_leaves_ends_a_command_without_a_word(script: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run([sys.executable, *script], cwd=CHECKOUT, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (141, b"")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
@pytest.mark.parametrize("command", ["schema", "runs cmscale"])
def test_a_command_that_was_started_without_an_output_does_its_work(command: str, closed: str) -> None:
    line = f"exec {sys.executable} -m cmscale {command} {closed}"
    ran = subprocess.run(["bash", "-c", line], cwd=CHECKOUT, capture_output=True, check=False)
    said = b"cmscale: holds no runs\n" if command != "schema" and "2>" not in closed else b""
    assert (ran.returncode, ran.stderr) == (0, said)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("config explain train.seed", "cmscale: standard output: No space left on device\n"),  # when it ends
        ("schema", "fault: OSError: [Errno 28] No space left on device\n"),  # before, as it prints much
    ],
)
def test_a_full_disk_behind_the_output_is_a_fault(command: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with Path("/dev/full").open("wb") as full:
        whole = [sys.executable, "-m", "cmscale", *command.split()]
        ran = subprocess.run(whole, cwd=CHECKOUT, stdout=full, stderr=subprocess.PIPE, check=False, text=True)
    assert (ran.returncode, ran.stderr) == (1, said)


@pytest.mark.parametrize(
    ("script", "module"),
    [
        ("cmscale/__main__.py", "typer"),
        ("launchers/submit.py", "yaml"),
        ("launchers/evaluate.py", "yaml"),
        ("data_prep/prepare.py", "pydantic"),
        ("data_prep/demo.py", "lmdb"),
    ],
)
def test_ctrl_c_is_one_line_while_modules_are_imported(script: str, module: str) -> None:
    """It comes while the script imports `module`."""
    code = f"""
import builtins, runpy, sys, time
real = builtins.__import__
def slow(name, *more, **named):
    if name == {module!r}:
        print("importing", flush=True)
        time.sleep(60)
    return real(name, *more, **named)
builtins.__import__ = slow
sys.argv = [{script!r}, "runs"]
runpy.run_path({script!r}, run_name="__main__")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    time.sleep(0.5)  # it sleeps now, and is not still printing
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (130, "interrupted\n")


def test_ctrl_c_that_comes_while_a_text_is_executed_ends_with_its_status_too(tmp_path: Path) -> None:
    """Python itself would end `python -m` by the signal, although the exception was caught."""
    code = """
from cmscale.commands.ending import guarded, leave

def main(arguments):
    exec("import signal; signal.raise_signal(signal.SIGINT)")

leave(guarded(main, []))
"""
    (tmp_path / "interrupted.py").write_text(code)
    ran = subprocess.run(
        [sys.executable, "-m", "interrupted"],
        env={**os.environ, "PYTHONPATH": f"{CHECKOUT}:{tmp_path}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (130, "interrupted\n")


def test_ctrl_c_that_a_library_turned_into_an_error_of_its_own_is_ctrl_c(capsys) -> None:
    def main(arguments: list[str]) -> None:
        try:
            raise KeyboardInterrupt
        except BaseException as error:
            raise ModuleNotFoundError("Could not import module") from error

    assert guarded(main, []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_error_after_a_ctrl_c_that_a_library_swallowed_is_ctrl_c() -> None:
    code = """
import contextlib, signal
from cmscale.commands.ending import end_early_interrupts, guarded, leave

def main(arguments):
    with contextlib.suppress(BaseException):
        signal.raise_signal(signal.SIGINT)
    raise RuntimeError("half-imported")

end_early_interrupts()
leave(guarded(main, []))
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (130, "interrupted\n")


def test_a_command_says_nothing_of_what_pillow_warns_of(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.resetwarnings()
        said = {"message": "Corrupt EXIF data", "category": UserWarning, "filename": "a.py", "lineno": 1}
        assert guarded(lambda _: warnings.warn_explicit(**said, module="PIL.TiffImagePlugin"), []) == 0
    assert capfd.readouterr() == ("", "")
