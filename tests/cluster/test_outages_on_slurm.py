"""Storage that goes away under jobs of a real Slurm: whenever and however, the run ends as if nothing had happened.

The object store speaks http, or https with a certificate of a private authority. The run's folder is on a small disk
that fills up, or that one node loses.
"""

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import write_certificates
from fault_proxy import FaultProxy
from outages import IN_ORDER, SHORT, away_at_a_later_shard, upload_set
from ranks import run_ranks
from small_runs import STEPS, assert_equal, make_data, make_run
from test_faults_on_slurm import logged, preempt, submit_training
from test_launching import attempts, events, wait, wait_until

from cmscale.config import Restart
from cmscale.engine.checkpoint_reader import list_checkpoints, verify_checkpoint
from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def remote(data: Path, s3_server: str) -> str:
    return upload_set(data, s3_server, bucket="data-of-jobs")


@pytest.fixture(scope="module")
def golden(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """An undisturbed run on two ranks, whose data was never away."""
    run = make_run(tmp_path_factory.mktemp("golden") / "run", data, *IN_ORDER)
    run_ranks(2, "train_work:to_the_end", str(run.root))
    return run


@pytest.fixture(scope="module")
def golden_of_one_rank(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = make_run(tmp_path_factory.mktemp("golden") / "run", data, *IN_ORDER)
    run_ranks(1, "train_work:to_the_end", str(run.root))
    return run


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def store(
    request: pytest.FixtureRequest,
    s3: str,
    s3_server: str,
    certificates: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[FaultProxy]:
    """A store that can go away, by http, or by https as Ceph's, that takes no checksums behind bodies."""
    is_https = request.param == "https"
    if is_https:
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificates[0]))
    with FaultProxy(s3_server, certificate=certificates[1] if is_https else None, refuses_trailers=is_https) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


BOTH = pytest.mark.parametrize("store", ["http", "https"], indirect=True)


def train(run: RunDir, *stays: int, restart: Restart | None = None) -> None:
    submit_training(run, "stay", stays, restart=restart)


def said(run: RunDir, line: str) -> int:
    """How often the ranks have printed a line so far."""
    return sum(path.read_text().count(line) for path in run.logs.glob("*_log.out"))


def end_as_if_nothing_had_happened(run: RunDir, golden: RunDir) -> None:
    assert wait(run) == 0
    assert attempts(run) == ["finished"]
    assert [event for event in events(run) if event in ("fault", "requeued", "checkpoint_failed")] == []
    assert logged(run) == list(range(1, STEPS + 1))
    assert_equal(run, golden)


def exported(run: RunDir, s3: str) -> list[int]:
    """The steps of the copies, each of which is complete."""
    copies = list_checkpoints(f"{s3}/{run.name}")
    assert all(verify_checkpoint(copy.url) == [] for copy in copies)
    return [copy.step for copy in copies]


@pytest.mark.parametrize("store", ["https", pytest.param("http", marks=pytest.mark.slow)], indirect=True)
def test_a_store_away_at_the_start_of_a_job_and_while_a_checkpoint_is_exported(
    slurm: Path, store: FaultProxy, s3: str, remote: str, golden: RunDir, tmp_path: Path
) -> None:
    run = make_run(
        tmp_path / "run", remote, *IN_ORDER, f"data.cache_dir={tmp_path / 'cache'}", f"checkpoint.export_to={s3}"
    )
    store.away()
    train(run)
    wait_until(lambda: said(run, "waiting for storage, "), seconds=300)  # the client's own tries are used up
    away = store.add("away", match="PUT .*rank-", times=1, after=1)
    store.back()
    wait_until(lambda: away.used, seconds=300)
    waits = said(run, "storage answers again")
    wait_until(lambda: said(run, "waiting for storage, ") > waits, seconds=300)
    store.back()
    end_as_if_nothing_had_happened(run, golden)
    assert exported(run, s3) == [0, 3, 6, 9]


@pytest.mark.slow
@BOTH
def test_a_store_away_in_the_middle_of_training_for_longer_than_a_collective_may_take(
    slurm: Path,
    store: FaultProxy,
    remote: str,
    golden: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run(tmp_path / "run", remote, *IN_ORDER, *SHORT, f"data.cache_dir={tmp_path / 'cache'}")
    away_at_a_later_shard(store, monkeypatch)
    train(run)
    wait_until(lambda: "storage_away" in events(run), seconds=300)
    time.sleep(25)
    store.back()
    end_as_if_nothing_had_happened(run, golden)
    (back,) = [event for event in read_lines(run.events) if event["event"] == "storage_back"]
    assert back["seconds"] > 20


@pytest.mark.slow
@BOTH
def test_a_store_away_until_training_has_ended_gets_every_copy(
    slurm: Path, store: FaultProxy, s3: str, data: Path, golden: RunDir, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", data, *IN_ORDER, *SHORT, f"checkpoint.export_to={s3}")
    store.add("away", match="PUT .*rank-", times=1, after=1)
    train(run)
    wait_until(lambda: logged(run)[-1:] == [STEPS], seconds=300)
    time.sleep(25)  # rank 0 has ended its training, and the others have left
    assert not (run.logs / "submissions" / "one" / "ending.json").exists()
    store.back()
    end_as_if_nothing_had_happened(run, golden)
    assert exported(run, s3) == [0, 3, 6, 9]


@pytest.mark.slow
@BOTH
def test_a_job_that_is_preempted_while_it_waits_saves_goes_back_and_waits_again(
    slurm: Path,
    store: FaultProxy,
    remote: str,
    golden: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run(tmp_path / "run", remote, *IN_ORDER, *SHORT, f"data.cache_dir={tmp_path / 'cache'}")
    away_at_a_later_shard(store, monkeypatch)
    train(run)
    wait_until(lambda: "storage_away" in events(run), seconds=300)
    preempt(nodes=2)
    wait_until(lambda: len(list(run.logs.glob("submissions/*/*.1/rank-*.json"))) == 2, seconds=300)
    time.sleep(20)
    store.back()
    assert wait(run) == 0
    assert attempts(run) == ["preempted", "finished"]
    assert logged(run) == list(range(1, STEPS + 1))
    assert_equal(run, golden)


@pytest.mark.slow
@BOTH
def test_a_store_away_for_longer_than_its_patience_uses_up_no_restart(
    slurm: Path, store: FaultProxy, remote: str, golden: RunDir, tmp_path: Path
) -> None:
    run = make_run(
        tmp_path / "run",
        remote,
        *IN_ORDER,
        f"data.cache_dir={tmp_path / 'cache'}",
        "storage.patience_minutes=0.02",
    )
    store.away()
    train(run, restart=Restart(signal_seconds=5, backoff_seconds=1, max_restarts=0))
    wait_until(lambda: attempts(run) == ["fault", "fault"], seconds=300)
    store.back()
    assert wait(run) == 0
    assert set(attempts(run)[:-1]) == {"fault"}
    assert attempts(run)[-1] == "finished"
    assert_equal(run, golden)


def go_on(run: RunDir, step: int) -> None:
    (run.root / f"go-on-{step}").touch()


@pytest.mark.slow
def test_a_disk_that_is_full_while_a_checkpoint_is_due_costs_that_checkpoint_alone(
    small: Path, data: Path, golden: RunDir
) -> None:
    run = make_run(small / "run", data, *IN_ORDER)
    submit_training(run, "pause", [4, 7])
    wait_until(lambda: (run.root / "paused-4").exists(), seconds=300)
    one = sum(path.stat().st_size for path in run.checkpoint(3).glob("rank-*"))
    filling = small / "filling"
    filling.write_bytes(bytes(shutil.disk_usage(small).free - one // 2))
    go_on(run, 4)
    wait_until(lambda: (run.root / "paused-7").exists(), seconds=300)
    filling.unlink()
    preempt(nodes=2)
    assert wait(run) == 0
    assert attempts(run) == ["preempted", "finished"]
    assert logged(run) == list(range(1, STEPS + 1))
    failed = [event for event in read_lines(run.events) if event["event"] == "checkpoint_failed"]
    assert {event["step"] for event in failed} == {6}
    assert all("no space left" in event["why"] for event in failed)
    assert_equal(run, golden)


@pytest.mark.slow
def test_a_node_that_loses_the_shared_folder_for_a_while_ends_its_start_and_the_next_goes_on(
    small: Path, data: Path, golden: RunDir
) -> None:
    run = make_run(small / "run", data, *IN_ORDER)
    submit_training(run, "pause", [4])
    wait_until(lambda: (run.root / "paused-4").exists(), seconds=300)
    node = (small.parent / "slurmd-node2.pid").read_text().strip()
    inside = ["nsenter", f"--target={node}", "--mount"]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", small], check=True)
    try:
        go_on(run, 4)
        wait_until(lambda: "fault" in attempts(run), seconds=300)
    finally:
        subprocess.run([*inside, "umount", small], check=True)
    assert wait(run) == 0
    assert set(attempts(run)[:-1]) == {"fault"}
    assert attempts(run)[-1] == "finished"
    assert_equal(run, golden)


@pytest.mark.slow
def test_a_node_whose_cache_is_on_a_full_disk_is_left_out_of_the_next_start(
    slurm: Path, s3: str, remote: str, golden_of_one_rank: RunDir, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    inside = ["nsenter", f"--target={(slurm.parent / 'slurmd-node1.pid').read_text().strip()}", "--mount"]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", cache], check=True)
    try:
        run = make_run(tmp_path / "run", remote, *IN_ORDER, f"data.cache_dir={cache}")
        submit_training(run, "stay", (), nodes=1)
        assert wait(run) == 0
    finally:
        subprocess.run([*inside, "umount", "--lazy", cache], check=True)
    assert attempts(run) == ["no_space", "finished"]
    assert ", without node1" in "".join(path.read_text() for path in run.logs.glob("*_batch.log"))
    assert_equal(run, golden_of_one_rank)
