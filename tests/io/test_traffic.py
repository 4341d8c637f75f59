"""Whoever waits for files to be fetched, sent, checked or written sees how many bytes have moved and what is left."""

import io
import sys
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from flat_state import StandIn, flat_config
from outages import pass_time

from cmscale.distributed.world import World
from cmscale.engine.checkpoint import Checkpoints
from cmscale.engine.checkpoint_reader import read_weights, verify_checkpoint
from cmscale.engine.fence import claim_generation
from cmscale.interop.files import readable, writable
from cmscale.io import s3, s3_download, s3_upload, traffic
from cmscale.io.counting import Counting
from cmscale.io.fetch import file_sha256, local_file
from cmscale.io.storage import open_storage
from cmscale.runs.folder import RunDir
from cmscale.runs.manifests import TrainState

MB = 10**6


@pytest.fixture(autouse=True)
def every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmscale.io.counting.FIRST_SECONDS", 0.0)
    monkeypatch.setattr("cmscale.io.counting.EVERY_SECONDS", 0.0)
    for module in (s3_download, s3_upload):
        monkeypatch.setattr(module, "PART_BYTES", 6 * MB)
    monkeypatch.setattr(s3, "_IN_ONE_PART", 1)


def counts(text: str, what: str) -> list[int]:
    """The megabytes in the lines about a work; the last line is the one that says how long it took."""
    lines = [line for line in text.splitlines() if line.startswith(f"{what}: ")]
    assert all(" of 12 MB" in line for line in lines), text
    assert " in " in lines[-1]
    assert all(line.endswith(" left") for line in lines[:-1])
    return [int(line.removeprefix(f"{what}: ").split()[0]) for line in lines]


def test_uploads_and_downloads_count_their_bytes(s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = open_storage(s3)
    with writable(storage, "weights", size=12 * MB) as path:
        path.write_bytes(bytes(12 * MB))
    sent = counts(capsys.readouterr().err, f"uploading {s3}/weights")
    assert sorted(sent) == sent
    assert sent[-1] == 12
    assert len(sent) == 3  # two parts, and the end

    local_file(f"{s3}/weights")
    fetched = counts(capsys.readouterr().err, f"downloading {s3}/weights")
    assert fetched[-1] == 12
    assert len(fetched) > 3

    local_file(f"{s3}/weights")
    assert capsys.readouterr().err == ""  # from the cache
    with readable(storage, "weights") as path:
        assert path.stat().st_size == 12 * MB
    assert counts(capsys.readouterr().err, f"downloading {s3}/weights")[-1] == 12


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ("answer 404 NoSuchUpload", "POST .*uploadId"),  # all parts are sent again
        ("answer 404 NoSuchUpload", "PUT .*partNumber=2"),
        ("reset", "PUT .*partNumber=2"),  # one part is
        ("truncate", "GET .*/a"),
        ("cut", "GET .*/a"),  # all parts are fetched again
    ],
)
def test_what_moves_again_after_a_failure_counts_once(
    s3: str, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, match: str
) -> None:
    for module in (s3_download, s3_upload):
        monkeypatch.setattr(module, "PART_BYTES", 5 << 20)
    pass_time(monkeypatch)
    most = 0.0

    class Recorded(Counting):
        def set(self, done: float) -> None:
            nonlocal most
            most = max(most, done)
            super().set(done)

    size = 12 << 20
    (tmp_path / "a").write_bytes(bytes(size))
    storage = open_storage(f"{s3}/x")
    is_upload = not match.startswith("GET")
    if not is_upload:
        storage.upload("a", tmp_path / "a")
    rule = proxy.add(fault, match=match, times=1)
    counting = Recorded("moving", total=13, active=False)
    traffic.adopt(traffic.Traffic(counting, 2 * size))
    try:
        storage.upload("a", tmp_path / "a") if is_upload else storage.download("a", tmp_path / "b")
    finally:
        traffic.adopt(None)
    assert rule.used == 1
    assert most == counting.done == size / MB


def test_what_a_library_writes_is_counted_by_the_size_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(traffic, "_POLL_SECONDS", 0.001)
    with writable(open_storage(tmp_path), "weights", size=12 * MB) as path, path.open("wb") as file:
        file.write(bytes(5 * MB))
        file.flush()
        shown = ""
        while "writing weights: 5 of 12 MB" not in shown:
            shown += capsys.readouterr().err


def test_reading_a_checkpoint_counts_each_of_its_files_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(traffic, "_BYTES", 1)
    run = RunDir(tmp_path / "run")
    writer = Checkpoints(run, flat_config(), World(), generation=claim_generation(run), data_fingerprint="data")
    writer.save(TrainState(step=10, cursor=80), StandIn(0, 1, seed=1))  # pyright: ignore[reportArgumentType]
    assert writer.close()
    folder = run.checkpoint(10)
    capsys.readouterr()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    for read in (verify_checkpoint, lambda url: read_weights(url, "master")):
        read(folder)
        assert f": {size} of {size} MB in " in capsys.readouterr().err.splitlines()[-1]


def test_bytes_within_another_work_count_for_that_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").write_bytes(bytes(2 * MB))
    with traffic.showing("both", 4 * MB), traffic.showing("one", 2 * MB):
        for _ in range(2):
            file_sha256(tmp_path / "a", shown=True)
    shown = capsys.readouterr().err
    assert "one" not in shown
    assert shown.splitlines()[-1].startswith("both: 4 of 4 MB in ")


def test_the_background_and_other_ranks_show_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").write_bytes(bytes(MB))
    open_storage(tmp_path).upload("b", tmp_path / "a")  # nobody has asked to see it
    monkeypatch.setenv("RANK", "1")
    with traffic.showing("reading", MB):
        file_sha256(tmp_path / "a", shown=True)
    assert capsys.readouterr().err == ""


def test_results_that_are_printed_beside_a_bar_reach_the_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    pipe, terminal = io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setattr(sys, "stderr", terminal)
    with traffic.showing("checking", MB), traffic.showing("within", MB):
        print("step 5: good")
    assert pipe.getvalue() == "step 5: good\n"
    assert "step 5" not in terminal.getvalue()
