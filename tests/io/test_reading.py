"""Small files, pipes with and without somebody who writes to them, and devices."""

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from cmscale.errors import UserError
from cmscale.io import reading
from cmscale.io.reading import read_small, reason


def test_a_pipe_is_read_to_its_end_however_slowly_it_is_written(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write() -> None:
        with pipe.open("wb") as file:
            for part in (b"a" * 70_000, b"b"):
                time.sleep(0.3)
                file.write(part)
                file.flush()

    writer = threading.Thread(target=write)
    writer.start()
    assert read_small(pipe, what="a config") == b"a" * 70_000 + b"b"
    writer.join()


def test_the_output_of_a_command_is_read() -> None:
    with subprocess.Popen(["sh", "-c", "sleep 0.3; echo x"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert read_small(f"/dev/fd/{process.stdout.fileno()}", what="a config") == b"x\n"


def test_a_pipe_to_which_nobody_writes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_WRITER_SECONDS", 0.1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(
        UserError, match=r"^\S*pipe: is a pipe that holds nothing, or to which nobody writes; give a file$"
    ):
        read_small(tmp_path / "pipe", what="a config")


def test_a_device_without_an_end_is_refused() -> None:
    with pytest.raises(UserError, match="/dev/zero: has more than 0 MiB"):
        read_small("/dev/zero", what="a config", limit=1 << 10)
    assert read_small("/dev/null", what="a config") == b""


def test_of_what_torch_says_of_a_foreign_file_only_the_cause_is_taken(tmp_path: Path) -> None:
    """The rest is an advice to load the file all the same, with escape sequences in it."""
    torch.save({"a": os.getcwd}, tmp_path / "code.pth")
    (tmp_path / "text.pth").write_bytes(b"garbage")
    (tmp_path / "empty.pth").touch()
    said = {}
    for path in tmp_path.iterdir():
        with pytest.raises(Exception) as raised:
            torch.load(path, weights_only=True)
        said[path.name] = reason(raised.value)
    assert "GLOBAL posix.getcwd" in said["code.pth"]
    assert said["text.pth"].startswith("Unsupported operand")
    assert all("trust" not in text and "\x1b" not in text and len(text) < 120 for text in said.values())
