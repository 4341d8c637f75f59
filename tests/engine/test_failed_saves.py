"""Saves that fail: the room that they took is free again before anything is recorded, and the error says why."""

import errno
import os
from pathlib import Path

import pytest
import torch
from flat_state import StandIn, flat_config
from safetensors.torch import save_file

from cmscale.distributed.world import World
from cmscale.engine import checkpoint, staged
from cmscale.engine.checkpoint import Checkpoints
from cmscale.engine.fence import CheckpointFailed, claim_generation
from cmscale.errors import NoSpace
from cmscale.io.durable import NO_SPACE
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines
from cmscale.runs.manifests import TrainState

LENGTHS = (0.1,)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def writer_of(run: RunDir) -> Checkpoints:
    """Of a run that keeps snapshots beside its checkpoints."""
    config = flat_config("ema.lengths=[0.1]", "ema.snapshot_every=10")
    return Checkpoints(run, config, World(), generation=claim_generation(run), data_fingerprint="data")


def fail_to_save(writer: Checkpoints, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Saves step 10; the snapshot's file is written, the checkpoint's half."""

    def broken(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file(tensors, path)
        if path.parent.parent.name == "checkpoints":
            path.write_bytes(path.read_bytes()[:100])
            raise error

    monkeypatch.setattr(staged, "save_file", broken)
    writer.save(TrainState(step=10, cursor=80), StandIn(0, 1, lengths=LENGTHS))  # pyright: ignore[reportArgumentType]
    assert writer.close() is False


def test_a_failed_save_frees_its_room_before_its_event_is_written(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def record(run: RunDir, event: str, **_: object) -> None:
        left = [path.name for folder in (run.checkpoints, run.snapshots) for path in folder.iterdir()]
        seen.append((event, left))

    writer = writer_of(run)
    monkeypatch.setattr(checkpoint, "write_event", record)
    fail_to_save(writer, monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert seen == [("checkpoint_failed", [])]


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (OSError(errno.EIO, "Input/output error"), CheckpointFailed, "[Errno 5] Input/output error; see EVENTS"),
        (RuntimeError("anything else"), CheckpointFailed, "anything else; see EVENTS"),
    ],
)
def test_the_error_of_a_failed_save_says_why_and_where_more_stands(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], text: str
) -> None:
    writer = writer_of(run)
    fail_to_save(writer, monkeypatch, error)
    raised = writer.failed("the last checkpoint was not written")
    assert type(raised) is kind
    assert str(raised) == f"the last checkpoint was not written: {text.replace('EVENTS', str(run.events))}"


def test_the_error_of_a_full_disk_is_for_the_user_to_mend(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = writer_of(run)
    fail_to_save(writer, monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    raised = writer.failed("the last checkpoint was not written")
    assert type(raised) is NoSpace
    text = str(raised)
    assert text.startswith("the last checkpoint was not written: ")
    assert text.endswith("; then continue with --resume")
    assert NO_SPACE in text.lower()
    assert "\n" not in text


def test_of_a_failure_that_no_rank_knows_the_error_says_so(run: RunDir) -> None:
    assert str(writer_of(run).failed("gone")) == f"gone: unknown; see {run.events}"


def test_a_run_that_was_moved_while_it_trains_ends_after_two_saves(run: RunDir) -> None:
    writer = Checkpoints(run, flat_config(), World(), generation=claim_generation(run), data_fingerprint="data")
    engine = StandIn(0, 1)
    moved = run.root.rename(run.root.with_name("moved"))
    for step in (10, 20):
        writer.save(TrainState(step=step, cursor=8 * step), engine)  # pyright: ignore[reportArgumentType]
    with pytest.raises(CheckpointFailed, match="was it moved or removed, or is it not mounted"):
        writer.save(TrainState(step=30, cursor=240), engine)  # pyright: ignore[reportArgumentType]
    assert not run.root.exists()
    assert RunDir(moved).claimed_generation(1).exists()


def test_a_run_whose_mount_point_may_not_be_written_ends_after_two_saves(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    writer = Checkpoints(run, flat_config(), World(), generation=claim_generation(run), data_fingerprint="data")
    monkeypatch.setattr("cmscale.engine.checkpoint.write_part", refused)
    engine = StandIn(0, 1)
    for step in (10, 20, 30, 40):  # the folder is there: each save fails by itself
        writer.save(TrainState(step=step, cursor=8 * step), engine)  # pyright: ignore[reportArgumentType]
    writer.wait()
    run.root.rename(run.root.with_name("moved"))
    run.root.mkdir()
    for step in (50, 60):
        writer.save(TrainState(step=step, cursor=8 * step), engine)  # pyright: ignore[reportArgumentType]
    with pytest.raises(CheckpointFailed, match="Permission denied"):
        writer.save(TrainState(step=70, cursor=560), engine)  # pyright: ignore[reportArgumentType]


def test_an_old_checkpoint_that_can_not_be_removed_fails_no_save(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    config = flat_config("checkpoint.keep_last=1")
    exporter = Offered()
    writer = Checkpoints(
        run,
        config,
        World(),
        generation=claim_generation(run),
        data_fingerprint="data",
        exporter=exporter,  # pyright: ignore[reportArgumentType]
    )
    (run.checkpoints / ".step-000000010.removed-1" / "of an earlier one").mkdir(parents=True)
    for step in (10, 20, 30):
        writer.save(TrainState(step=step, cursor=8 * step), StandIn(0, 1))  # pyright: ignore[reportArgumentType]
    assert writer.close()
    assert exporter.steps == [10, 20, 30]
    assert f"{run.checkpoint(10)}: is not removed (Directory not empty)" in capsys.readouterr().out
    assert committed_steps(run) == [10, 30]
    assert [record["event"] for record in read_lines(run.events)] == ["checkpoint"] * 3


class Offered:
    """An exporter that copies nothing."""

    went_elsewhere = ""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def offer(self, step: int) -> None:
        self.steps.append(step)

    def waiting(self) -> set[int]:
        return set()


def test_a_folder_that_is_away_during_one_save_ends_nothing(run: RunDir) -> None:
    writer = Checkpoints(run, flat_config(), World(), generation=claim_generation(run), data_fingerprint="data")
    engine = StandIn(0, 1)
    for step in (10, 20, 30, 40):
        away = run.generations.with_name("away")
        if step in (10, 30):
            run.generations.rename(away)
            run.generation.unlink()
        writer.save(TrainState(step=step, cursor=8 * step), engine)  # pyright: ignore[reportArgumentType]
        assert writer.close() is (step in (20, 40))
        if step in (10, 30):
            away.rename(run.generations)
            run.generation.write_text('{"generation": 1}')
