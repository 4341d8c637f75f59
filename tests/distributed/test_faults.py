"""Tests of training through faults on gloo ranks: signals, non-finite values, ranks that stop or hang."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import run_ranks, start_ranks, wait
from safetensors import safe_open
from small_runs import STEPS, assert_equal, events, last_weights, launch, losses, make_data, make_run, outcomes

from cmscale.runs.folder import RunDir
from cmscale.runs.log import latest_metrics, read_lines

OVERRIDES = {
    "workers": ("data.workers=1",),
    "nan for ever": ("train.max_rollbacks=1",),
    "overflow": ("engine.precision=fp16", "engine.initial_loss_scale_power=24"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder with the runs of `fault_work.scenarios`, all trained by the same two ranks, and how each ended."""
    root = tmp_path_factory.mktemp("runs")
    for name in (
        "golden",
        "signals",
        "workers",
        "nan once",
        "nan three times",
        "nan for ever",
        "straggler",
        "no space",
        "overflow",
    ):
        make_run(root / name, data, *OVERRIDES.get(name, ()))
    first, second = outcomes(run_ranks(2, "fault_work:scenarios", str(root)))
    assert first == second
    return root, first


def golden(runs: tuple[Path, dict[str, str]]) -> RunDir:
    return RunDir(runs[0] / "golden")


def test_both_signals_twice_during_a_save_are_one_save_and_one_preemption(runs: tuple[Path, dict[str, str]]) -> None:
    root, ends = runs
    run = RunDir(root / "signals")
    assert (ends["golden"], ends["signals"], ends["signals, resumed"]) == ("finished", "preempted", "finished")
    (left,) = events(run, "preempted")
    saved = [record["step"] for record in events(run, "checkpoint")]
    assert saved.count(left["step"]) == 1
    assert len(saved) == len(set(saved))
    assert [record["step"] for record in read_lines(run.metrics)] == list(range(1, STEPS + 1))  # no step twice
    assert_equal(run, golden(runs))


def test_signals_to_a_data_worker_are_ignored(runs: tuple[Path, dict[str, str]]) -> None:
    root, ends = runs
    assert ends["workers"] == "finished"
    assert_equal(RunDir(root / "workers"), golden(runs))


def test_a_batch_without_a_finite_loss_is_not_applied_and_is_kept(runs: tuple[Path, dict[str, str]]) -> None:
    root, ends = runs
    run = RunDir(root / "nan once")
    assert ends["nan once"] == "finished"
    metrics, expected = latest_metrics(run), latest_metrics(golden(runs))
    assert losses(run)[:4] == losses(golden(runs))[:4]
    assert [record["samples"] for record in metrics] == [8, 16, 24, 32, 48, 56, 64, 72, 80]  # the fifth is not applied
    for name in ("num_scales", "target_ema", "lr"):
        assert [record[name] for record in metrics] == [record[name] for record in expected]
    files = sorted(run.logs.glob("nonfinite-*"))
    assert [file.name[-21:-12] for file in files] == ["rank-0000", "rank-0001"]
    with safe_open(files[1], framework="pt") as file:
        assert file.metadata()["positions"] == "33,35,37,39"
        assert tuple(file.get_tensor("images").shape) == (4, 3, 8, 8)
    assert events(run, "rolled_back") == []


def test_bad_batches_in_a_row_roll_back_and_are_passed_over(runs: tuple[Path, dict[str, str]]) -> None:
    root, ends = runs
    run = RunDir(root / "nan three times")
    assert ends["nan three times"] == "finished"
    (back,) = events(run, "rolled_back")
    assert back["step"] == 4
    taken = [(record["step"], record["samples"]) for record in read_lines(run.metrics)]
    assert taken == [(1, 8), (2, 16), (3, 24), (4, 32), (4, 64), (5, 72), (6, 80), (7, 88), (8, 96), (9, 104)]
    assert [record["step"] for record in events(run, "checkpoint")] == [0, 3, 6, 9]  # as their copies stay


def test_going_back_is_bounded(runs: tuple[Path, dict[str, str]]) -> None:
    root, ends = runs
    run = RunDir(root / "nan for ever")
    assert ends["nan for ever"].startswith("RuntimeError: after step 3: 3 consecutive batches without finite loss")
    assert "after 1 rollbacks" in ends["nan for ever"]
    assert len(events(run, "rolled_back")) == 1
    assert "after 1 rollbacks" in events(run, "fault")[-1]["why"]


def test_an_fp16_overflow_lowers_the_scale_and_is_no_bad_batch(runs: tuple[Path, dict[str, str]]) -> None:
    root, ends = runs
    run = RunDir(root / "overflow")
    assert ends["overflow"] == "finished"
    assert events(run, "step_not_applied")
    assert events(run, "rolled_back", "nonfinite_step") == []
    assert latest_metrics(run)[0]["loss_scale"] < 2**24
    assert len(losses(run)) == STEPS
    assert last_weights(run)


def test_a_disk_that_is_full_loses_that_save_alone_and_says_so(runs: tuple[Path, dict[str, str]]) -> None:
    root, ends = runs
    run = RunDir(root / "no space")
    assert ends["no space"] == "finished"
    failed = events(run, "checkpoint_failed")
    assert {record["step"] for record in failed} == {6}
    assert any("no space left on the device" in record["why"] for record in failed if record["rank"] == 1)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [f"step-00000000{step}" for step in (0, 3, 9)]
    assert_equal(run, golden(runs))


def test_damaged_checkpoints_are_named_and_all_ranks_take_the_one_before(runs: tuple[Path, dict[str, str]]) -> None:
    root, ends = runs
    run = RunDir(root / "damaged")
    assert ends["damaged"] == "finished"
    named = events(run, "damaged_checkpoint")
    assert [record["step"] for record in named] == [9, 6]
    assert "rank-0001-of-0002.safetensors: its contents are not what was written" in named[0]["why"]
    assert "no manifest.json" in named[1]["why"]
    assert events(run, "resumed")[-1]["step"] == 3
    assert_equal(run, golden(runs))


def test_a_slow_rank_is_named_though_all_take_as_long(runs: tuple[Path, dict[str, str]]) -> None:
    root, ends = runs
    run = RunDir(root / "straggler")
    assert ends["straggler"] == "finished"
    named = events(run, "straggler")
    assert {record["rank"] for record in named} == {1}
    assert "rank 1 needs" in named[0]["why"]
    assert_equal(run, golden(runs))


@pytest.mark.parametrize("how", ["stops", pytest.param("holds the GIL", marks=pytest.mark.slow)])
def test_a_rank_that_hangs_is_named_with_its_stacks_and_the_job_goes_on_by_itself(
    runs: tuple[Path, dict[str, str]], data: Path, tmp_path: Path, how: str
) -> None:
    run = make_run(tmp_path / "run", data, "engine.step_timeout_minutes=0.2")
    job = launch(run, "fault_work:main", how)
    _, output = job.communicate(timeout=200)
    assert job.returncode == 0, output
    named = [record for record in events(run, "fault") if "no step within 12 s" in record["why"]]
    assert sorted((record["rank"], record["step"]) for record in named) == [(0, 4), (1, 4)]
    assert [record["rank"] for record in named if record["waits_for_others"]] == [0]
    stopped = [record["rank"] for record in named if "was stopped" in record["why"]]
    assert stopped == ([1] if how == "stops" else [])
    stacks = [(run.logs / f"stacks-rank-{rank}.txt").read_text() for rank in (0, 1)]
    function = {"stops": "in stop", "holds the GIL": "in hold_the_gil"}[how]
    assert [function in text for text in stacks] == [False, True]
    (requeued,) = events(run, "requeued")
    assert re.match(r"rank 1 on \S+: no step within 12 s.*; stacks in ", requeued["why"])
    assert_equal(run, golden(runs))


@pytest.mark.slow
def test_the_same_fault_at_the_same_step_stops_the_run_after_three(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", data)
    job = launch(run, "fault_work:main", "raises")
    _, output = job.communicate(timeout=200)
    assert job.returncode == 1
    why = "fault: 3 failures without progress since step 3: RuntimeError: rank 1 is out of luck"
    assert output.splitlines()[-1].startswith(why)
    assert "--- the end of" in output
    assert "in fail\n" in output  # the log's tail has the place
    assert [record["event"] for record in events(run, "requeued", "start", "resumed")] == [
        "start",
        "requeued",
        "resumed",
        "requeued",
        "resumed",
    ]


@pytest.mark.slow
def test_wandb_that_is_away_holds_up_neither_training_nor_its_end(
    runs: tuple[Path, dict[str, str]], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    run = make_run(tmp_path / "run", data, "wandb.mode=online")
    job = launch(run, "cmscale.training.loop:main")
    _, output = job.communicate(timeout=200)
    assert job.returncode == 0, output
    (finished,) = events(run, "finished")
    assert time.time() - finished["time"] < 60  # ten seconds of patience; wandb's own at exit are sixty
    assert_equal(run, golden(runs))


@pytest.mark.slow
def test_wandb_that_goes_away_in_the_middle_and_hangs_at_the_end_changes_nothing_and_stays_one_run(
    runs: tuple[Path, dict[str, str]], data: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", data, "wandb.mode=online")
    assert outcomes(run_ranks(2, "train_work:while_wandb_breaks", str(run.root), 3, 5)) == ["preempted"] * 2
    assert outcomes(run_ranks(2, "train_work:while_wandb_breaks", str(run.root), 99, None)) == ["finished"] * 2
    assert "ConnectionError: wandb went away" in events(run, "wandb_failed")[0]["why"]
    first, second = (run.root / "wandb-ids").read_text().splitlines()
    assert first == second == f"{run.wandb_id.read_text()} allow"
    assert_equal(run, golden(runs))


@pytest.mark.slow
def test_a_run_goes_on_over_other_numbers_of_ranks_and_stages(
    runs: tuple[Path, dict[str, str]], data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for number, (num_ranks, stage, until) in enumerate([(2, 1, 3), (1, 3, 6), (4, 2, None)]):
        made = make_run(tmp_path / str(number), data, f"engine.zero_stage={stage}")
        shutil.copytree(made.root, run, dirs_exist_ok=True)
        if until is None:
            assert outcomes(run_ranks(num_ranks, "train_work:to_the_end", str(run))) == ["finished"] * num_ranks
            continue
        ranks = start_ranks(num_ranks, "train_work:until_signalled", str(run), until, int(signal.SIGTERM))
        assert wait(ranks, timeout=200) == []
        assert outcomes([rank.output() for rank in ranks]) == ["preempted"] * num_ranks
    assert losses(RunDir(run)) == pytest.approx(losses(golden(runs)), rel=2e-5)
    for record, expected in zip(latest_metrics(RunDir(run)), latest_metrics(golden(runs)), strict=True):
        assert record["samples"] == expected["samples"]
    assert len(list(RunDir(run).checkpoint(STEPS).glob("rank-*"))) == 4


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces, connected only by a bridge."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"cms{os.getpid() % 100000}{letter}" for letter in "ab"]
    bridge = f"cmsbr{os.getpid() % 100000}"

    def ip(*words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words], check=check, capture_output=True)

    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for number, name in enumerate(names, start=1):
            ip("netns", "add", name)
            ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", name, "master", bridge, "up")
            ip("-n", name, "address", "add", f"10.213.7.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    else:
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)
        ip("link", "delete", bridge, check=False)


@pytest.mark.slow
def test_ranks_cut_off_from_each_other_leave_together_and_the_next_start_is_exact(
    runs: tuple[Path, dict[str, str]], data: Path, tmp_path: Path, namespaces: list[str]
) -> None:
    overrides = ("engine.collective_timeout_minutes=0.2", "train.log_every=1")
    run = make_run(tmp_path / "run", data, *overrides)
    places = [["ip", "netns", "exec", name] for name in namespaces]
    # gloo must be given its interface, as the host name resolves to no address in the namespaces
    where = {"MASTER_ADDR": "10.213.7.1", "GLOO_SOCKET_IFNAME": "eth0"}
    ranks = start_ranks(2, "fault_work:as_a_job_does", str(run.root), inside=places, more=where)
    until = time.monotonic() + 120
    while not any(record["step"] >= 2 for record in read_lines(run.metrics)):
        assert time.monotonic() < until, "training never came to step 2"
        time.sleep(0.002)
    subprocess.run(["ip", "link", "set", namespaces[1], "down"], check=True)
    cut = time.monotonic()
    while None in [rank.process.poll() for rank in ranks] and time.monotonic() - cut < 60:
        time.sleep(0.05)
    ended = [rank.process.poll() for rank in ranks]
    wait(ranks, timeout=0)  # kills what is left
    assert ended == [1, 1], ranks[0].output() + ranks[1].output()  # each by itself: neither saw the other leave
    subprocess.run(["ip", "link", "set", namespaces[1], "up"], check=True)
    again = start_ranks(2, "train_work:to_the_end", str(run.root), inside=places, more=where)
    assert wait(again, timeout=200) == [], again[0].errors()[-2000:]
    assert_equal(run, golden(runs))
