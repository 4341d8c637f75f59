"""Locks: one holder at a time over threads, processes and forks, with flock and on file systems without it."""

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cmscale.errors import UserError
from cmscale.io.locks import LockTimeout, hold

TAKES = """
import errno, fcntl, sys
from pathlib import Path
from cmscale.io.locks import hold
if sys.argv[2] == "soft":
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")
    fcntl.flock = flock
with hold(Path(sys.argv[1]), timeout=30, what="another"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["flock", "soft"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kind of lock that the file system allows."""
    if request.param == "soft":
        refuse_flock(monkeypatch, errno.ENOSYS)
    return request.param


def refuse_flock(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@contextmanager
def another_process(path: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until its standard input is closed."""
    command = [sys.executable, "-c", TAKES, str(path), kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_another_process_is_refused_while_the_lock_is_held_and_gets_it_afterwards(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "folder" / "a.lock"
    with another_process(path, kind) as holder:
        refused = pytest.raises(LockTimeout, match=r"^the data: another process holds .*a\.lock.* \(waited 0\.1 s\)")
        with refused as raised, hold(path, timeout=0.1, what="the data"):
            pass
        assert "\n" not in str(raised.value)
        assert ("fuser" in str(raised.value)) == (kind == "flock")
        if kind == "soft":
            assert f"process {holder.pid} on this host" in str(raised.value)
        assert holder.stdin is not None
        holder.stdin.close()
        with hold(path, timeout=30, what="the data"):
            assert holder.wait(timeout=30) == 0


def test_a_lock_that_is_to_be_had_at_once_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.lock"
    with another_process(path, kind), pytest.raises(LockTimeout, match="did not wait"), hold(path, timeout=0, what="x"):
        pass


def test_the_lock_of_a_killed_holder_is_free(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.lock"
    with another_process(path, kind) as holder:
        holder.kill()
        holder.wait()
        with hold(path, timeout=5, what="x"):
            if kind == "soft":
                assert path.with_name("a.lock.held").read_text().splitlines()[:1] == [str(os.getpid())]


def test_a_holder_on_another_host_is_named_and_never_taken_over(tmp_path: Path, monkeypatch) -> None:
    refuse_flock(monkeypatch, errno.ENOSYS)
    marker = tmp_path / "a.lock.held"
    marker.write_text("4194000\nnode17\n")
    advice = re.escape("process 4194000 on host node17; if no such process runs there, delete the file")
    with pytest.raises(LockTimeout, match=advice), hold(tmp_path / "a.lock", timeout=0.1, what="x"):
        pass
    assert marker.exists()
    assert socket.gethostname() != "node17"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK])
def test_every_way_of_a_file_system_to_say_that_it_has_no_flock_is_known(number: int, tmp_path, monkeypatch) -> None:
    refuse_flock(monkeypatch, number)
    path = tmp_path / "a.lock"
    for _ in range(2):
        with hold(path, timeout=0, what="x"), pytest.raises(LockTimeout), hold(path, timeout=0, what="x"):
            pass
    assert not path.with_name("a.lock.held").exists()


def test_another_error_of_the_lock_file_is_not_taken_for_a_missing_flock(tmp_path: Path, monkeypatch) -> None:
    refuse_flock(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), hold(tmp_path / "a.lock", timeout=0, what="x"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path: Path, monkeypatch) -> None:
    def refuse(path: str, *_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "open", refuse)  # root, who may run the tests, may write anywhere
    with pytest.raises(UserError, match="not allowed to write"), hold(tmp_path / "a.lock", timeout=0, what="x"):
        pass


def test_a_path_below_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file is where a folder"), hold(tmp_path / "file" / "a", timeout=0, what="x"):
        pass


def test_a_forked_process_neither_frees_nor_keeps_the_lock(tmp_path: Path, kind: str) -> None:
    """Data workers are forked while a rank holds locks, and outlive the moment."""
    path = tmp_path / "a.lock"
    reader, writer = os.pipe()
    with hold(path, timeout=0, what="x"):
        short = os.fork()
        if short == 0:
            os._exit(0)
        os.waitpid(short, 0)
        long = os.fork()
        if long == 0:
            os.read(reader, 1)
            os._exit(0)
        freed = taken_by_another(path, kind)
    try:
        assert not freed, "a child's end freed its parent's lock"
        assert taken_by_another(path, kind), "a living child keeps its parent's lock"
    finally:
        os.write(writer, b"x")
        os.waitpid(long, 0)


def taken_by_another(path: Path, kind: str) -> bool:
    code = TAKES.replace("timeout=30", "timeout=0")
    command = [sys.executable, "-c", code, str(path), kind]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert ran.returncode == 0 or "LockTimeout" in ran.stderr, ran.stderr
    return ran.returncode == 0
