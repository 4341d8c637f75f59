"""Tests with storage that is slow, failing, wrong or absent: training continues, and copies on S3 are complete."""

import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from fault_proxy import FaultProxy
from outages import IN_ORDER, SHORT, away_at_a_later_shard, upload_set
from ranks import run_ranks
from small_runs import CHECKOUT, assert_equal, events, launch, make_data, make_run

from cmscale.engine.checkpoint_reader import list_checkpoints, verify_checkpoint
from cmscale.engine.export import Exporter
from cmscale.export.weights import finish_copies
from cmscale.io.s3 import S3Storage
from cmscale.io.storage import open_storage
from cmscale.report.facts import read_facts
from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines, state_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def golden(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run on one rank without copies on S3."""
    run = make_run(tmp_path_factory.mktemp("golden") / "run", data, "wandb.mode=off")
    run_ranks(1, "train_work:to_the_end", str(run.root))
    return run


def copies(run: RunDir, s3: str) -> list[int]:
    """The steps of the checkpoints on S3, after checking that each is complete."""
    found = list_checkpoints(f"{s3}/{run.name}")
    assert all(verify_checkpoint(copy.url) == [] for copy in found)
    return [copy.step for copy in found]


def copy_all(run: RunDir, s3: str, *, patience: float = 60) -> set[int]:
    """Copies in a thread like training does; returns the steps that are not copied."""
    return Exporter(run, s3, retry_seconds=0.05).close(patience)


SLOW = (pytest.param(fault, marks=pytest.mark.slow) for fault in ("slow", "reset"))


@pytest.mark.parametrize("fault", ["503", "reset after", *SLOW])
def test_storage_that_fails_for_a_while_gets_every_copy(golden: RunDir, s3: str, proxy: FaultProxy, fault: str) -> None:
    rule = proxy.add(fault, times=3)
    assert copy_all(golden, s3) == set()
    assert rule.used == 3
    assert copies(golden, s3) == [0, 3, 6, 9]


def test_a_proxy_that_alters_the_body_is_caught_and_shows_nothing(golden: RunDir, s3: str, proxy: FaultProxy) -> None:
    proxy.add("corrupt upload", match="PUT .*rank-")
    assert copy_all(golden, s3) == {0, 3, 6, 9}
    assert "came back changed, 3 times" in events(golden, "export_failed")[-1]["why"]
    assert copies(golden, s3) == []
    proxy.clear()
    assert copy_all(golden, s3) == set()
    assert copies(golden, s3) == [0, 3, 6, 9]


@pytest.mark.slow
def test_an_exporter_killed_in_a_multipart_upload_shows_nothing_and_the_next_ends_its_parts(
    golden: RunDir, s3: str, proxy: FaultProxy
) -> None:
    rule = proxy.add("stall", match="PUT .*partNumber=2")
    code = """
        import sys
        from pathlib import Path
        from cmscale.engine.pending_export import export_pending
        from cmscale.io import s3_upload
        from cmscale.io.s3 import S3Storage
        from cmscale.runs.folder import RunDir

        s3_upload.PART_BYTES = 5 * 2**20
        plain = S3Storage.upload

        def upload(self, key, path):  # in parts, which otherwise only large files are
            padded = path.with_name("padded")
            padded.write_bytes(path.read_bytes() + bytes(11 * 2**20))
            plain(self, key, padded)

        S3Storage.upload = upload
        export_pending(RunDir(Path(sys.argv[1])), sys.argv[2])
    """
    exporter = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(golden.root), s3], cwd=CHECKOUT)
    until = time.monotonic() + 60
    while not rule.used:
        assert time.monotonic() < until, "the second part never came"
        time.sleep(0.02)
    exporter.kill()
    exporter.wait()
    for padded in golden.checkpoints.glob("*/padded"):
        padded.unlink()
    proxy.clear()
    storage = open_storage(f"{s3}/{golden.name}")
    assert isinstance(storage, S3Storage)
    pending = storage.client.list_multipart_uploads(Bucket=storage.bucket).get("Uploads", [])
    assert len(pending) == 1
    assert copies(golden, s3) == []
    assert copy_all(golden, s3) == set()
    assert storage.client.list_multipart_uploads(Bucket=storage.bucket).get("Uploads", []) == []
    assert copies(golden, s3) == [0, 3, 6, 9]


@pytest.mark.slow
def test_a_run_trains_on_exactly_while_storage_fails_is_slow_and_cuts_connections(
    golden: RunDir, data: Path, s3: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    rules = [proxy.add(fault, times=2) for fault in ("503", "slow", "reset", "reset after")]
    run = make_run(tmp_path / "run", data, f"checkpoint.export_to={s3}")
    job = launch(run, "cmscale.training.loop:main", num_ranks=1)
    _, output = job.communicate(timeout=200)
    assert job.returncode == 0, output
    assert [rule.used for rule in rules] == [2, 2, 2, 2]
    assert_equal(run, golden)
    finish_copies(run.root)  # the copies that failed
    assert copies(run, s3) == [0, 3, 6, 9]


def test_storage_away_through_the_exit_holds_up_neither_training_nor_its_end(
    golden: RunDir, data: Path, s3: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    rule = proxy.add("stall", match="PUT .*rank-")
    run = make_run(tmp_path / "run", data, f"checkpoint.export_to={s3}", "storage.patience_minutes=0.1")
    job = launch(run, "cmscale.training.loop:main", num_ranks=1)
    _, output = job.communicate(timeout=200)
    assert job.returncode == 1, output
    last = output.splitlines()[-1]
    assert last.startswith(f"finished, not exported: step 0, 3, 6, 9 is not in {s3}: ")
    assert "--resume copies the rest" in last
    assert read_facts(run).state()[0] == state_of(read_lines(run.events)) == "finished, not exported"
    assert rule.used
    assert events(run, "requeued") == events(run, "fault") == []
    (finished,) = events(run, "finished")
    assert time.time() - finished["time"] < 60  # after its patience, not after an upload's minutes
    assert_equal(run, golden)
    assert copies(run, s3) == []
    proxy.clear()
    assert [copy.step for copy in finish_copies(run.root)] == [0, 3, 6, 9]
    assert copies(run, s3) == [0, 3, 6, 9]


@pytest.mark.slow
def test_a_disk_that_fills_up_is_said_at_once_and_in_the_end_and_training_is_not_repeated(
    data: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs root, to mount a small disk")
    try:
        run = make_run(disk / "run", data, "train.total_steps=6")
        size = 0
        job = launch(run, "cmscale.training.loop:main", num_ranks=1)
        while not size:  # the first checkpoint is there: nothing more of its size fits
            assert job.poll() is None
            size = sum(path.stat().st_size for path in run.checkpoints.glob("step-000000000/rank-*"))
            time.sleep(0.05)
        free = shutil.disk_usage(disk).free
        (disk / "filling").write_bytes(bytes(free - size // 2))
        printed, output = job.communicate(timeout=200)
        assert "checkpoint of step 3 was not written: " in printed
        assert "checkpoint of step 6 was not written: " in printed
        assert job.returncode == 1
        last = output.splitlines()[-1]
        assert last.startswith("error: the last checkpoint, of step 6, was not written: ")
        assert "no space left" in last
        assert [event["event"] for event in read_lines(run.events)].count("start") == 1
        (disk / "filling").unlink()
        job = launch(run, "cmscale.training.loop:main", num_ranks=1)
        _, output = job.communicate(timeout=200)
        assert job.returncode == 0, output
    finally:
        subprocess.run(["umount", "-l", disk], check=False)


@pytest.fixture(scope="module")
def remote(data: Path, s3_server: str) -> str:
    return upload_set(data, s3_server, bucket="data-of-runs")


def await_that(happened: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not happened():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_a_server_that_is_restarted_at_the_start_and_in_between_costs_time_alone(
    data: Path, remote: str, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = make_run(tmp_path / "golden", data, *IN_ORDER)
    assert launch(golden, "cmscale.training.loop:main", num_ranks=2).wait(timeout=200) == 0
    run = make_run(tmp_path / "run", remote, f"data.cache_dir={tmp_path / 'cache'}", *IN_ORDER, *SHORT)
    proxy.away()
    began = time.monotonic()
    job = launch(run, "cmscale.training.loop:main", num_ranks=2)
    time.sleep(20)
    proxy.back()
    away_at_a_later_shard(proxy, monkeypatch)
    await_that(lambda: bool(events(run, "storage_away")), job)
    time.sleep(25)
    proxy.back()
    printed, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert time.monotonic() - began > 45
    assert events(run, "fault", "restarted", "checkpoint_failed") == []
    assert [event["event"] for event in events(run, "start", "resumed", "finished")] == ["start", "finished"]
    assert events(run, "storage_back")[0]["seconds"] > 20
    assert "waiting for storage, " in printed + said
    assert "storage answers again, after " in printed + said
    assert state_of(read_lines(run.events)) == "finished"
    assert_equal(run, golden)


@pytest.mark.slow
def test_a_run_that_waits_for_storage_saves_when_it_is_asked_to_stop(
    remote: str, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", remote, f"data.cache_dir={tmp_path / 'cache'}", *IN_ORDER, *SHORT)
    away_at_a_later_shard(proxy, monkeypatch)
    job = launch(run, "cmscale.training.loop:main", num_ranks=2)
    await_that(lambda: bool(events(run, "storage_away")), job)
    ranks = [each for each in psutil.Process(job.pid).children(recursive=True) if "launchers.job" in each.cmdline()]
    ranks[-1].send_signal(signal.SIGTERM)
    await_that(lambda: bool(events(run, "preempted")), job)
    (preempted,) = events(run, "preempted")
    assert preempted["step"] > 0
    assert run.checkpoint(preempted["step"]).is_dir()
    proxy.back()  # the launcher has started the run again, which waits
    _, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert events(run, "fault") == []


@pytest.mark.slow
def test_storage_that_stays_away_is_no_fault_of_the_program(remote: str, proxy: FaultProxy, tmp_path: Path) -> None:
    """Many starts in a row end so, and the last one finishes: more than faults of the program may be."""
    run = make_run(
        tmp_path / "run",
        remote,
        f"data.cache_dir={tmp_path / 'cache'}",
        "storage.patience_minutes=0.02",
        "restart.max_restarts=1",
    )
    proxy.away()
    job = launch(run, "cmscale.training.loop:main", num_ranks=1)
    await_that(lambda: len(events(run, "fault")) >= 4, job)
    proxy.back()
    _, output = job.communicate(timeout=300)
    assert job.returncode == 0, output
    assert all("StorageAway" in event["why"] for event in events(run, "fault"))
