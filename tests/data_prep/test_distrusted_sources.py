"""Sources of images that are damaged, vanish or end their reader: one line, and the rest with `--max-bad`."""

import contextlib
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from data_fixtures import encoded, smooth_image, write_lmdb
from prepare_command import call

from cmscale.data import read_images
from cmscale.io.process import CHECKOUT
from data_prep.making import shards


def pictures(count: int = 6) -> dict[str, bytes]:
    return {f"{number:040x}": encoded(smooth_image(number), "png") for number in range(count)}


def write_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for key, content in pictures().items():
            archive.writestr(f"{key}.png", content)
    return path


def test_a_member_with_a_wrong_checksum_and_an_encrypted_one_are_named_or_skipped(tmp_path, capsys) -> None:
    path = write_zip(tmp_path / "images.zip")
    content = bytearray(path.read_bytes())
    entries = [at for at in range(len(content)) if content[at : at + 4] == b"PK\x01\x02"]
    content[entries[0] + 16] ^= 1  # its checksum
    content[entries[1] + 8] |= 1  # encrypted
    path.write_bytes(content)
    assert call(f"zip:{path}", str(tmp_path / "out"), format="webdataset") == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"{0:040x}.png: can't be read (Bad CRC-32" in line
    assert call(f"zip:{path}", str(tmp_path / "out"), "--max-bad", "2", format="webdataset") == 0
    assert len(list(read_images(str(tmp_path / "out")))) == 4


@pytest.mark.parametrize("allowed", [0, 1])
def test_an_image_that_vanishes_is_an_unusable_image(tmp_path, monkeypatch, capsys, allowed: int) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for key, content in pictures().items():
        (folder / f"{key}.png").write_bytes(content)
    original = shards.convert

    def vanishing(*arguments, **keywords):
        (folder / f"{3:040x}.png").unlink(missing_ok=True)
        return original(*arguments, **keywords)

    monkeypatch.setattr(shards, "convert", vanishing)
    out = str(tmp_path / "out")
    status = call(f"folder:{folder}", out, "--max-bad", str(allowed), "--workers", "1", format="webdataset")
    assert status == (0 if allowed else 2)
    printed = capsys.readouterr()
    assert f"{3:040x}.png: is not there any more" in printed.err + printed.out


def test_a_source_that_vanishes_is_no_unusable_image(tmp_path, monkeypatch, capsys) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for key, content in pictures().items():
        (folder / f"{key}.png").write_bytes(content)
    original = shards.convert

    def vanishing(*arguments, **keywords):
        if folder.exists():
            folder.rename(tmp_path / "moved")
        return original(*arguments, **keywords)

    monkeypatch.setattr(shards, "convert", vanishing)
    arguments = ("--max-bad", "100", "--workers", "1")
    assert call(f"folder:{folder}", str(tmp_path / "out"), *arguments, format="webdataset") == 2
    assert f"{folder}: is not there any more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "line"),
    [(signal.SIGKILL, "a worker was killed, as the system does when memory runs out"), (signal.SIGSEGV, "by SIGSEGV")],
)
def test_a_worker_that_is_killed_is_one_line(tmp_path, monkeypatch, capsys, number: signal.Signals, line: str) -> None:
    source = write_lmdb(tmp_path / "lsun/x_train_lmdb", pictures(12))
    original = shards.convert

    def dying(*arguments, **keywords):
        os.kill(os.getpid(), number)
        return original(*arguments, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "convert", dying)
        out = str(tmp_path / "out")
        assert call(f"lsun:{source}", out, "--workers", "2", format="webdataset") == 2
    printed = capsys.readouterr().err
    assert line in printed
    assert printed.count("\n") == 1
    assert call(f"lsun:{source}", out, "--workers", "2", format="webdataset") == 0


_KILLED = r"""
import multiprocessing, os, signal, threading, time
from cmscale.commands.ending import end_early_interrupts, leave
end_early_interrupts()
from data_prep import prepare
from data_prep.making import shards
convert, first, others = shards.convert, multiprocessing.Value("i", 0), multiprocessing.Value("i", 0)

def converted(*arguments, **keywords):
    with first.get_lock():
        first.value = first.value or os.getpid()
    if first.value != os.getpid():
        with others.get_lock():
            others.value += 1
        time.sleep(100)
    while others.value < 2:
        time.sleep(0.01)
    IDLE or os.kill(os.getpid(), signal.SIGKILL)
    threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return convert(*arguments, **keywords)

shards.convert = converted
leave(prepare.main())
"""


@pytest.mark.parametrize("idle", [True, False], ids=["idle", "making a shard"])
def test_a_worker_that_is_killed_ends_the_others_while_they_make_shards(tmp_path: Path, idle: bool) -> None:
    source = write_lmdb(tmp_path / "lsun/x_train_lmdb", pictures(12))
    command = [sys.executable, "-c", _KILLED.replace("IDLE", str(idle)), "--source", f"lsun:{source}"]
    command += ["--format", "webdataset", "--image-size", "16", "--samples-per-shard", "4", "--workers", "3"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, printed = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 2
    assert "a worker was killed, as the system does when memory runs out" in printed
    assert list((tmp_path / "out").rglob("scratch/*")) == []


def test_names_that_are_not_utf8_are_prepared_and_written_out(tmp_path, capsys) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, content in enumerate(pictures().values()):
        (folder / os.fsdecode(b"caf\xe9-%d.png" % number)).write_bytes(content)
    (folder / os.fsdecode(b"bad\xff.png")).write_bytes(b"no picture")
    out = str(tmp_path / "out")
    assert call(f"folder:{folder}", out) == 2
    assert r"bad\udcff.png" in capsys.readouterr().err
    assert call(f"folder:{folder}", out, "--max-bad", "1") == 0
    assert next(key for _, key in read_images(out)) == r"caf\udce9-0.png"
    odd = tmp_path / os.fsdecode(b"odd\xff")
    folder.rename(odd)
    fine = write_zip(tmp_path / "fine.zip")
    for source, out in ((f"folder:{odd}", str(tmp_path / "x")), (f"zip:{fine}", str(odd / "x"))):
        capsys.readouterr()
        assert call(source, out) == 2
        assert "is not UTF-8" in capsys.readouterr().err


def test_a_database_with_damaged_pages_is_one_line(tmp_path, capsys) -> None:
    source = write_lmdb(tmp_path / "x_train_lmdb", pictures(40))
    path = source / "data.mdb"
    content = path.read_bytes()
    found = set()
    for page in range(2, len(content) // 4096):
        for value in (b"\xff", b"\x00", b"\x7f"):
            path.write_bytes(content[: 4096 * page] + value * 4096 + content[4096 * (page + 1) :])
            status = call(f"lsun:{source}", str(tmp_path / f"out-{page}-{value.hex()}"), format="webdataset")
            printed = capsys.readouterr().err
            assert status in (0, 2)
            assert printed.count("\n") <= 3
            found.add(status)
    assert 2 in found
