"""Tests of the mirrors to TensorBoard and Prometheus, on what their own parsers read."""

import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from launch_fixtures import CONFIG, dataset
from PIL import Image
from run_folder import write_evaluation

from cmscale.cli.app import run as run_cmscale
from cmscale.commands.ending import guarded
from cmscale.config import Prometheus, Tensorboard, Wandb, dump_config, parse_config
from cmscale.errors import NoSpace, UserError
from cmscale.io.durable import replace_durably
from cmscale.io.json_text import parse_json
from cmscale.runs import log
from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines, write_event
from cmscale.training import mirror, prometheus_file, tensorboard_mirror
from cmscale.training.metrics_log import MetricsLog
from launchers.checks import check_inputs
from launchers.run_folders import with_absolute_paths

NAME = 'a "run"\\\nof two lines'


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / NAME)
    run.samples.mkdir(parents=True)
    return run


def train(run: RunDir, steps: list[int], **mirrors: Any) -> None:
    """A start of a run that logs these steps."""
    log = MetricsLog(run, Wandb(mode="off"), config={"train": {"total_steps": 40}}, active=True, **mirrors)
    for step in steps:
        log.write({"step": step, "samples": 8 * step, "loss": 1.0 / step, "loss_q1": None, "mfu": float("nan")})
    for each in log._mirrors:
        each.close(patience=300)


def parsed(path: Path) -> dict[tuple[str, str], float]:
    """Value by metric and label of its own."""
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is not installed")
    found = {}
    for family in parser.text_string_to_metric_families(path.read_text()):
        assert family.type == "gauge"
        assert family.documentation
        for sample in family.samples:
            assert sample.labels.pop("run") == NAME
            assert sample.labels.pop("folder") == str(path.parent)
            sample.labels.pop("step", None)
            found[sample.name, ", ".join(sample.labels.values())] = sample.value
    return found


def test_prometheus_reads_of_runs_whose_names_are_no_utf8(tmp_path: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is not installed")
    odd = RunDir(tmp_path / 'caf\udce9\r"{}')
    odd.root.mkdir()
    train(odd, [10], prometheus=Prometheus(enabled=True))
    written = odd.prometheus.read_bytes().decode()
    names = {
        sample.labels["run"] for family in parser.text_string_to_metric_families(written) for sample in family.samples
    }
    assert names == {'caf\\udce9\r"{}'}


def test_prometheus_reads_the_newest_numbers_of_a_run(run: RunDir) -> None:
    write_event(run, "fault", step=3, rank=0)
    write_event(run, "fault", step=5, rank=0)
    write_evaluation(run, step=10, nfe=1, values=(9.0,))
    write_evaluation(run, step=20, nfe=1, values=(3.0, 5.0))
    train(run, [10, 20], prometheus=Prometheus(enabled=True))
    found = parsed(run.prometheus)
    assert found["cmscale_step", ""] == 20
    assert found["cmscale_total_steps", ""] == 40
    assert found["cmscale_loss", ""] == 0.05
    assert found["cmscale_running", ""] == 0
    assert found["cmscale_events", "fault"] == 2
    assert found["cmscale_evaluation", "FD-EfficientNet, ema_0.999, 1, 500, 0123"] == 4.0
    assert math.isnan(found["cmscale_mfu", ""])
    assert ("cmscale_loss_q1", "") not in found


def test_after_a_resume_prometheus_reads_the_steps_that_are_made_again(run: RunDir) -> None:
    for steps in ([10, 20, 30], [10]):
        train(run, steps, prometheus=Prometheus(enabled=True))
    found = parsed(run.prometheus)
    assert (found["cmscale_step", ""], found["cmscale_loss", ""]) == (10, 0.1)


def test_a_disk_that_is_full_for_a_while_ends_no_mirror(run: RunDir, monkeypatch, capfd) -> None:
    """Neither the file nor the mark of what was sent could be written, until there was room again."""
    tries, freed = [], threading.Event()

    def write(path: Path, data: bytes, **more: Path) -> None:
        tries.append(path)
        if not freed.is_set():
            raise NoSpace(f"{path}: no space left on the device")
        replace_durably(path, data, **more)

    monkeypatch.setattr(prometheus_file, "replace_durably", write)
    monkeypatch.setattr(mirror, "replace_durably", write)
    monkeypatch.setattr(tensorboard_mirror, "_open", lambda *_: Collected(sent))
    sent: list[int] = []
    settings = {"prometheus": Prometheus(enabled=True), "tensorboard": Tensorboard(enabled=True)}
    log = MetricsLog(run, Wandb(mode="off"), config={}, active=True, **settings)
    log.write({"step": 1, "loss": 1.0})
    while len({*tries}) < 2:
        time.sleep(0.01)
    freed.set()
    log.write({"step": 2, "loss": 0.5})
    for each in log._mirrors:
        each.close(patience=300)
        assert not each.failure
    assert parsed(run.prometheus)["cmscale_step", ""] == 2
    assert sent == [1, 2]
    assert parse_json(run.mirror_mark("tensorboard").read_bytes())["step"] == 2
    assert not run.events.exists()
    assert capfd.readouterr().out == ""


class Collected:
    """A sink that keeps the steps it was sent."""

    def __init__(self, sent: list[int]) -> None:
        self._sent = sent

    def record(self, step: int, numbers: dict[str, float]) -> None:
        del numbers
        self._sent.append(step)

    def flush(self) -> None:
        pass

    close = flush


@pytest.mark.parametrize("folder", ["s3://bucket/metrics", "metrics"])
def test_the_collectors_folder_is_a_local_one_and_the_same_from_everywhere(folder: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_config(CONFIG.format(data="data"), ["prometheus.enabled=true", f"prometheus.folder={folder}"])
    if "://" not in folder:
        assert with_absolute_paths(config).prometheus.folder == str(tmp_path / "metrics")
        return
    with pytest.raises(UserError, match=r"prometheus\.folder: s3://bucket/metrics: the collector's folder must be on"):
        with_absolute_paths(config)


def test_the_file_for_prometheus_is_replaced_as_a_whole_under_a_name_of_its_own(run: RunDir, tmp_path: Path) -> None:
    folder = tmp_path / "collector"
    others = RunDir(tmp_path / "elsewhere" / NAME)
    others.samples.mkdir(parents=True)
    for each in (run, others):
        train(each, [10], prometheus=Prometheus(enabled=True, folder=str(folder)))
    files = sorted(folder.iterdir())
    assert len(files) == 2  # and no part of one that the collector could read
    for file in files:
        assert file.suffix == ".prom"
        assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()  # the collector is another user


def _umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before


def test_a_collectors_folder_that_cannot_be_written_is_an_event(run: RunDir, tmp_path: Path, capfd) -> None:
    (tmp_path / "file").write_text("")
    train(run, [1, 2], prometheus=Prometheus(enabled=True, folder=str(tmp_path / "file")))
    assert [record["event"] for record in read_lines(run.events)] == ["prometheus_failed"]
    assert "prometheus: no more is sent (" in capfd.readouterr().out
    assert [record["step"] for record in read_lines(run.metrics)] == [1, 2]


@pytest.mark.long
def test_tensorboard_reads_every_step_once(run: RunDir) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(run.sample_grid(20))
    write_evaluation(run, step=20, nfe=2, values=(4.0,))
    for steps in ([10, 20, 30], [20, 30, 40]):
        train(run, steps, tensorboard=Tensorboard(enabled=True))
    assert not run.events.exists()
    found = EventAccumulator(str(run.tensorboard))
    found.Reload()
    assert [each.step for each in found.Scalars("training/loss")] == [10, 20, 30, 40]
    assert found.Scalars("training/loss")[0].value == pytest.approx(0.1)
    (score,) = found.Scalars("evaluation/FD-EfficientNet/ema_0.999/nfe2/n500/ref0123")
    assert (score.step, score.value) == (20, 4.0)
    assert [each.step for each in found.Images("samples")] == [20]


def test_mirrors_say_what_a_branch_began_with(run: RunDir, monkeypatch) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    parent = {"parent": "s3://bucket/runs/first/", "step": 20, "samples": 160, "generation": 1}
    lineage = {**parent, "manifest_sha256": "0" * 64, "changed": {}, "averages": {}}
    run.provenance.write_text(json.dumps({"branch": lineage}))
    for at in (21, 22):
        train(run, [at], tensorboard=Tensorboard(enabled=True), prometheus=Prometheus(enabled=True))
    assert 'branch_of="first@20"} 1\n' in run.prometheus.read_text()
    written = b"".join(path.read_bytes() for path in run.tensorboard.iterdir())
    assert written.count(b"first@20") == 1

    given: dict[str, Any] = {}

    def init(**settings: Any) -> None:
        given.update(settings)
        raise ConnectionError

    monkeypatch.setattr(wandb, "init", init)
    log = MetricsLog(run, Wandb(mode="offline"), config={"seed": 1}, active=True)
    for each in log._mirrors:
        each.close(patience=300)
    assert given["config"] == {"seed": 1, "branch_of": "first@20"}


def test_tensorboard_that_is_missing_is_refused_before_anything_is_queued(tmp_path: Path, monkeypatch) -> None:
    config = parse_config(CONFIG.format(data=dataset(tmp_path / "data")), ["tensorboard.enabled=true"])
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"tensorboard\.enabled: the package tensorboard is not installed here; pip"):
        check_inputs(config)


def test_what_came_after_the_end_of_a_run_is_sent_by_a_command(tmp_path: Path) -> None:
    run = RunDir(tmp_path / NAME)
    run.root.mkdir()
    settings = ["wandb.mode=off", "prometheus.enabled=true"]
    run.config.write_text(dump_config(parse_config(CONFIG.format(data=dataset(tmp_path / "data")), settings)))
    write_event(run, "finished", step=10, rank=0)
    write_evaluation(run, step=10, nfe=1, values=(7.0,))
    assert guarded(run_cmscale, ["mirror", str(run.root)]) == 0
    assert parsed(run.prometheus)["cmscale_evaluation", "FD-EfficientNet, ema_0.999, 1, 500, 0123"] == 7.0
    write_event(run, "resumed", step=10, rank=0)
    assert guarded(run_cmscale, ["mirror", str(run.root)]) == 2  # it sends by itself


def test_a_run_whose_events_cannot_be_read_is_sent_all_the_same(tmp_path: Path, monkeypatch, capfd) -> None:
    run = RunDir(tmp_path / NAME)
    run.root.mkdir()
    settings = ["wandb.mode=off", "prometheus.enabled=true"]
    run.config.write_text(dump_config(parse_config(CONFIG.format(data=dataset(tmp_path / "data")), settings)))
    write_evaluation(run, step=10, nfe=1, values=(7.0,))
    write_event(run, "finished", step=10, rank=0)
    os.utime(run.events, (time.time() - 7200,) * 2)

    def refused(_: Path) -> list[Any]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(log, "read_lines", refused)
    assert guarded(run_cmscale, ["mirror", str(run.root)]) == 0
    assert "events.jsonl: can't be read (Permission denied); the rest is sent" in capfd.readouterr().err
    assert parsed(run.prometheus)["cmscale_evaluation", "FD-EfficientNet, ema_0.999, 1, 500, 0123"] == 7.0
