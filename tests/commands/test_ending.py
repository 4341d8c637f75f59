"""How commands end: after a mistake, a fault, Ctrl-C and a reader that left; at most one line, and its status."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from cmscale.commands.ending import guarded
from cmscale.errors import UserError
from cmscale.io.process import CHECKOUT


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (UserError("two\nlines"), 2, "error: two lines"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ConnectionError("the storage does not answer"), 1, "error: the storage does not answer"),
        (PermissionError(errno.EACCES, "Permission denied", "secret"), 2, "error: secret: Permission denied"),
        (OSError(errno.EIO, "Input/output error"), 1, "fault: OSError: [Errno 5] Input/output error"),
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


def test_a_bug_keeps_its_traceback() -> None:
    def main(arguments: list[str]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        guarded(main, [])


SCRIPTS = [
    ["-m", "cmscale.cli", "schema"],
    ["launchers/submit.py", "--dry-run", "configs/demo_edm.yaml"],
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script[1])
def test_a_reader_that_leaves_ends_a_command_without_a_word(script: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run([sys.executable, *script], cwd=CHECKOUT, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("script", "module"),
    [
        ("cmscale/cli/__main__.py", "typer"),
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
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "interrupted\n")
