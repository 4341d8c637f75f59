"""Checkpoints: what a save writes, which checkpoint a resume accepts, and which start of a run may commit."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flat_state import StandIn, flat_config, ranks_of
from fsyncs import record_fsyncs
from safetensors import SafetensorError
from safetensors.torch import save_file

from cmscale.config import Config, Wandb
from cmscale.distributed.world import World
from cmscale.engine import fence, resume, staged
from cmscale.engine.checkpoint import Checkpoints
from cmscale.engine.checkpoint_reader import list_checkpoints, read_manifest, read_weights, verify_checkpoint
from cmscale.engine.fence import Fenced, claim_generation
from cmscale.errors import UserError
from cmscale.io.local import LocalStorage
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.folder import RunDir
from cmscale.runs.log import append_line, read_lines
from cmscale.runs.manifests import TrainState
from cmscale.training.metrics_log import MetricsLog


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def save(run: RunDir, *steps: int, num_ranks: int = 2, zero_stage: int = 2, config: Config | None = None) -> None:
    """Saves as a new start of the run, all ranks in this process."""
    config = config or flat_config(f"engine.zero_stage={zero_stage}")
    generation = claim_generation(run)
    writers = [
        Checkpoints(run, config, world, generation=generation, data_fingerprint="data") for world in ranks_of(num_ranks)
    ]
    for step in steps:
        for rank, writer in enumerate(writers):
            state = StandIn(rank, num_ranks, zero_stage=zero_stage, seed=step)
            writer.save(TrainState(step=step, cursor=8 * step), state)  # pyright: ignore[reportArgumentType]
    for writer in writers:
        writer.wait()


def events(run: RunDir, kind: str) -> list[dict]:
    return [event for event in read_lines(run.events) if event["event"] == kind]


def newest(run: RunDir, config: Config | None = None, **more: bool) -> resume.Found | None:
    return resume.newest(run, config or flat_config(), World(), data_fingerprint="data", **more)


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("saved_by", "stage"), [(1, 0), (2, 3), (3, 2)])
@pytest.mark.parametrize(("loaded_by", "other"), [(1, 2), (4, 3), (2, 1)])
def test_any_world_and_stage_gets_back_the_same_bits(
    run: RunDir, saved_by: int, stage: int, loaded_by: int, other: int
) -> None:
    save(run, 10, num_ranks=saved_by, zero_stage=stage)
    found = newest(run, flat_config(f"engine.zero_stage={other}"))
    assert found is not None
    written = StandIn(0, 1, seed=10)
    for rank in range(loaded_by):
        engine = StandIn(rank, loaded_by, zero_stage=other, seed=999)
        state = resume.restore(found, engine)  # pyright: ignore[reportArgumentType]
        assert state == TrainState(step=10, cursor=80)
        assert engine.scalars() == {"optimizer_step": 10.0}
        for quantity in engine.shards.quantities:
            local = engine.shards.local(quantity)
            for s in engine.shards.segments:
                assert torch.equal(local[s.at : s.at + s.length], written.whole[quantity][s.start : s.start + s.length])
        assert torch.equal(engine.published, engine.shards.local("target"))


def test_weights_are_read_by_name_without_an_engine(run: RunDir) -> None:
    save(run, 10, 20)
    (first, last) = list_checkpoints(run.root)
    assert (first.step, last.step) == (10, 20)
    read = read_weights(last.url, "ema_0.5")
    whole = StandIn(0, 1, seed=20).whole["ema_0.5"]
    assert torch.equal(read["a_weight"], whole[:15].view(3, 5))
    assert read["b_bias"].shape == ()
    assert verify_checkpoint(last.url) == []
    with pytest.raises(UserError, match=r"no 'ema_0.7', only master, .*ema_0.9"):
        read_weights(last.url, "ema_0.7")


def test_a_save_leaves_a_manifest_and_one_file_a_rank_and_nothing_staged(run: RunDir) -> None:
    save(run, 10)
    names = sorted(path.name for path in run.checkpoint(10).iterdir())
    assert names == ["manifest.json", "rank-0000-of-0002.safetensors", "rank-0001-of-0002.safetensors"]
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000000010"]
    assert [event["step"] for event in events(run, "checkpoint")] == [10]


def test_retention_keeps_the_last_and_every_nth_and_not_the_untrained_one(run: RunDir) -> None:
    save(run, *range(0, 100, 10), config=flat_config("checkpoint.keep_last=2", "checkpoint.keep_every=30"))
    assert [listed.step for listed in list_checkpoints(run.root)] == [30, 60, 80, 90]
    assert len(list(run.checkpoints.iterdir())) == 4


class WaitingExporter:
    """An exporter that never finishes an upload."""

    went_elsewhere = ""

    def __init__(self) -> None:
        self.steps: set[int] = set()

    def offer(self, step: int) -> None:
        self.steps.add(step)

    def waiting(self) -> set[int]:
        return set(self.steps)


def test_retention_keeps_what_waits_for_its_upload_for_twice_as_long(run: RunDir) -> None:
    exporter = WaitingExporter()
    writer = Checkpoints(
        run,
        flat_config("checkpoint.keep_last=2"),
        World(),
        generation=claim_generation(run),
        data_fingerprint="data",
        exporter=exporter,  # pyright: ignore[reportArgumentType]
    )

    def kept_after(step: int) -> list[int]:
        writer.save(TrainState(step=step, cursor=step), StandIn(0, 1, seed=step))  # pyright: ignore[reportArgumentType]
        assert writer.close()
        return committed_steps(run)

    assert [kept_after(step) for step in (10, 20, 30, 40)][-1] == [10, 20, 30, 40]  # each is the only copy
    assert kept_after(50) == [20, 30, 40, 50]  # storage that stays away must not fill the disk
    exporter.steps -= {30, 50}
    assert kept_after(60) == [40, 50, 60]
    exporter.steps.clear()
    assert kept_after(70) == [60, 70]


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_save_and_its_metrics_are_durable_before_it_is_committed_with_the_users_umask(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    generation = claim_generation(run)
    synced = record_fsyncs(monkeypatch)
    log = MetricsLog(run, Wandb(mode="off"), config={}, active=True)
    writer = Checkpoints(
        run, flat_config(), World(), generation=generation, data_fingerprint="data", before_commit=log.sync
    )
    log.write({"step": 10})
    writer.save(TrainState(step=10, cursor=80), StandIn(0, 1, seed=10))  # pyright: ignore[reportArgumentType]
    assert writer.close()
    (mode,) = {path.stat().st_mode & 0o777 for path in run.checkpoint(10).iterdir()}
    assert mode == 0o666 & ~umask
    staged = f".step-000000010.start-{generation}.save-1"
    names = [re.sub(r"^\.(.*)\.\w+$", r"\1", path.name) if path.parent.name == staged else path.name for path in synced]
    assert names[: names.index("checkpoints") + 1] == [
        "rank-0000-of-0001.safetensors",  # the weights
        staged,  # their name
        "metrics.jsonl",
        "run",
        "manifest.json",
        staged,
        "checkpoints",  # the rename that commits
    ]


@pytest.mark.parametrize("damage", ["flip", "delete", "truncate", "manifest", "pickle", "cut_manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run: RunDir, damage: str) -> None:
    save(run, 10, 20)
    part = run.checkpoint(20) / "rank-0001-of-0002.safetensors"
    manifest = run.checkpoint(20) / "manifest.json"
    match damage:
        case "flip":
            flip_byte(part)
        case "delete":
            part.unlink()
        case "truncate":
            part.write_bytes(part.read_bytes()[:-4])
        case "pickle":
            torch.save({"master": torch.zeros(3)}, part)
        case "manifest":
            manifest.unlink()
        case "cut_manifest":
            manifest.write_bytes(manifest.read_bytes()[:-20])
    found = newest(run)
    assert found is not None
    assert found.manifest.state.step == 10
    (event,) = events(run, "damaged_checkpoint")
    assert event["step"] == 20
    named = "manifest.json" if "manifest" in damage else part.name
    assert named in event["why"]
    aside = run.checkpoints / "damaged-step-000000020"  # kept for a look, and counted as none
    assert named in verify_checkpoint(aside)[0]
    assert not run.checkpoint(20).exists()


def test_where_none_is_valid_a_fresh_start_is_never_silent(run: RunDir) -> None:
    assert newest(run) is None
    save(run, 10)
    flip_byte(run.checkpoint(10) / "rank-0000-of-0002.safetensors")
    with pytest.raises(UserError, match=r"none of the 1 checkpoints is valid .*rank-0000.*--fresh"):
        newest(run)
    assert newest(run, fresh=True) is None


def test_a_run_that_took_steps_and_has_no_checkpoint_does_not_start_anew_by_itself(run: RunDir) -> None:
    run.root.mkdir()
    append_line(run.metrics, {"step": 1, "loss": 0.5})
    with pytest.raises(UserError, match=r"no checkpoint there, though .*metrics.jsonl has steps.*--fresh"):
        newest(run)
    assert newest(run, fresh=True) is None


def test_a_manifest_that_names_a_file_outside_is_refused(run: RunDir) -> None:
    save(run, 10)
    path = run.checkpoint(10) / "manifest.json"
    manifest = read_manifest(LocalStorage(path.parent))
    first, *others = manifest.parts
    outside = first.model_copy(update={"file": first.file.model_copy(update={"name": f"../{first.file.name}"})})
    path.write_bytes(manifest.model_copy(update={"parts": (outside, *others)}).to_bytes())
    assert "refused" in verify_checkpoint(run.checkpoint(10))[0]


def test_another_config_is_refused_with_the_difference(run: RunDir) -> None:
    save(run, 10)
    with pytest.raises(UserError, match=r"train.seed: 0 -> 5") as raised:
        newest(run, flat_config("train.seed=5", "train.global_batch_size=16"))
    assert "train.global_batch_size: 8 -> 16" in str(raised.value)
    assert newest(run, flat_config("engine.zero_stage=3", "train.micro_batch_size=1")) is not None


def test_another_data_set_is_refused(run: RunDir) -> None:
    save(run, 10)
    with pytest.raises(UserError, match="another data set"):
        resume.newest(run, flat_config(), World(), data_fingerprint="other")


def test_an_older_start_can_commit_no_more(run: RunDir) -> None:
    save(run, 10)
    old = Checkpoints(run, flat_config(), World(), generation=claim_generation(run), data_fingerprint="data")
    claim_generation(run)
    old.save(TrainState(step=20, cursor=160), StandIn(0, 1, seed=20))  # pyright: ignore[reportArgumentType]
    assert old.close() is False
    assert [listed.step for listed in list_checkpoints(run.root)] == [10]
    (event,) = events(run, "checkpoint_failed")
    assert "taken over" in event["why"]
    with pytest.raises(Fenced, match="taken over"):  # and it does not go on beside the new one
        old.save(TrainState(step=30, cursor=240), StandIn(0, 1, seed=30))  # pyright: ignore[reportArgumentType]


def test_a_start_killed_between_the_two_renames_of_a_commit_loses_nothing(run: RunDir) -> None:
    """A checkpoint that is written again is moved aside first; the next start moves it back."""
    save(run, 10)
    aside = run.checkpoints / ".step-000000010.replaced-1"
    run.checkpoint(10).rename(aside)
    assert committed_steps(run) == []
    claim_generation(run)
    assert committed_steps(run) == [10]
    assert not aside.exists()
    verify_checkpoint(LocalStorage(run.checkpoint(10)))


@pytest.mark.timeout(120)  # it would wait for as long as a collective, ten minutes
def test_an_older_start_that_waits_for_its_ranks_ends_as_soon_as_a_newer_one_exists(run: RunDir) -> None:
    generation = claim_generation(run)
    first, _ = ranks_of(2)
    old = Checkpoints(run, flat_config(), first, generation=generation, data_fingerprint="data")
    old.save(TrainState(step=20, cursor=160), StandIn(0, 2, seed=20))  # pyright: ignore[reportArgumentType]
    claim_generation(run)
    assert old.close() is False
    (event,) = events(run, "checkpoint_failed")
    assert "taken over" in event["why"]


def test_a_start_learns_between_saves_that_another_took_over_and_ends(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fence, "LOOK_SECONDS", 0.0)
    old = Checkpoints(run, flat_config(), World(), generation=claim_generation(run), data_fingerprint="data")
    assert not old.overtaken()
    old.end_if_overtaken()
    claim_generation(run)
    assert old.overtaken()
    assert old.close() is False
    with pytest.raises(Fenced, match="start 2 of the run has taken over from start 1"):
        old.end_if_overtaken()
    with pytest.raises(Fenced):
        old.save(TrainState(step=20, cursor=160), StandIn(0, 1, seed=20))  # pyright: ignore[reportArgumentType]


def test_an_older_start_leaves_what_a_newer_one_is_writing(run: RunDir) -> None:
    """Two starts at once: the one with the lower number may come to clear up last."""
    save(run, 10)
    staged = run.checkpoints / ".step-000000020.start-3.save-1"
    staged.mkdir()
    assert claim_generation(run) == 2
    assert staged.exists()
    assert claim_generation(run) == 3
    assert claim_generation(run) == 4
    assert not staged.exists()


def test_a_new_start_clears_what_a_killed_one_left_half_written_and_records_it(run: RunDir) -> None:
    save(run, 10)
    shutil.copytree(run.checkpoint(10), run.checkpoints / ".step-000000020.start-1.save-2")
    shutil.copytree(run.checkpoint(10), run.checkpoints / ".step-000000005.removed-1")
    assert claim_generation(run) == 2
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000000010"]
    (event,) = events(run, "unfinished_save")
    assert (event["step"], ".step-000000020.start-1.save-2" in event["why"]) == (20, True)


def test_names_of_other_people_in_the_folder_are_harmless(run: RunDir) -> None:
    save(run, 10, 20)
    foreign = ["latest", "step-best", "step-30", "step-0000000400", ".step-latest.save-1", ".step-copy.replaced-1"]
    for name in [*foreign, ".step-000000050.start-x.save-1", "damaged-step-000000001"]:
        (run.checkpoints / name).mkdir()
    for name in ("notes.txt", "step-000000060", ".step-note.removed-1", "step-000000070.tar"):
        (run.checkpoints / name).write_text("mine")
    (run.checkpoints / "step-latest").symlink_to("step-000000020")
    (run.checkpoints / "step-000000080").symlink_to("nowhere")
    names = {path.name for path in run.checkpoints.iterdir()}
    found = newest(run)
    assert found is not None
    assert found.manifest.state.step == 20
    save(run, 90, config=flat_config("checkpoint.keep_last=1"))
    assert [listed.step for listed in list_checkpoints(run.root)] == [90]
    assert {path.name for path in run.checkpoints.iterdir()} == names - {"step-000000010", "step-000000020"} | {
        "step-000000090"
    }
    (run.checkpoints / "step-000000095").symlink_to("step-000000090")  # a link as a checkpoint: its step is another
    assert "manifest is of step 90" in verify_checkpoint(run.checkpoint(95))[0]
    assert committed_steps(run) == [90, 95]
    save(run, 97, config=flat_config("checkpoint.keep_last=1"))
    assert committed_steps(run) == [97]


def test_a_step_saved_again_replaces_the_damaged_one(run: RunDir) -> None:
    save(run, 10)
    flip_byte(run.checkpoint(10) / "rank-0000-of-0002.safetensors")
    save(run, 10, num_ranks=1)
    assert verify_checkpoint(run.checkpoint(10)) == []
    assert len(list(run.checkpoint(10).iterdir())) == 2


def no_space(*_: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_full_disk_fails_the_save_loudly_and_keeps_the_old_one(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(run, 10)
    writer = Checkpoints(run, flat_config(), World(), generation=claim_generation(run), data_fingerprint="data")
    with monkeypatch.context() as broken:
        broken.setattr(staged, "save_file", no_space)
        writer.save(TrainState(step=20, cursor=160), StandIn(0, 1, seed=20))  # pyright: ignore[reportArgumentType]
        assert writer.close() is False
    (event,) = events(run, "checkpoint_failed")
    assert "no space left" in event["why"]
    assert capsys.readouterr().out.startswith("checkpoint of step 20 was not written: ")
    assert isinstance(writer.failed("the last checkpoint was not written"), UserError)
    assert [listed.step for listed in list_checkpoints(run.root)] == [10]
    assert verify_checkpoint(run.checkpoint(10)) == []
    writer.save(TrainState(step=30, cursor=240), StandIn(0, 1, seed=30))  # pyright: ignore[reportArgumentType]
    assert writer.close() is True


def test_a_failed_save_stops_training_where_the_config_says_so(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    config = flat_config("checkpoint.stop_on_failure=true")
    writer = Checkpoints(run, config, World(), generation=claim_generation(run), data_fingerprint="data")
    monkeypatch.setattr(staged, "save_file", no_space)
    writer.save(TrainState(step=20, cursor=160), StandIn(0, 1))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"no space left .*--resume"):  # which no restart would mend
        writer.save(TrainState(step=30, cursor=240), StandIn(0, 1))  # pyright: ignore[reportArgumentType]


def test_the_failure_of_one_rank_keeps_rank_0_from_committing(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    generation = claim_generation(run)
    writers = [
        Checkpoints(run, flat_config(), world, generation=generation, data_fingerprint="data") for world in ranks_of(2)
    ]

    def fails_on_rank_1(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "rank-0001" in path.name:
            no_space()
        save_file(tensors, path)

    monkeypatch.setattr(staged, "save_file", fails_on_rank_1)
    for rank, writer in enumerate(writers):
        writer.save(TrainState(step=10, cursor=80), StandIn(rank, 2))  # pyright: ignore[reportArgumentType]
    for writer in writers:
        writer.wait()
    assert list_checkpoints(run.root) == []
    assert any(event["rank"] == 0 and "rank 1: " in event["why"] for event in events(run, "checkpoint_failed"))


def test_the_same_state_is_saved_once(run: RunDir) -> None:
    writer = Checkpoints(run, flat_config(), World(), generation=claim_generation(run), data_fingerprint="data")
    engine = StandIn(0, 1)
    for step in (9, 10, 10):
        writer.maybe_save(TrainState(step=step, cursor=8 * step), engine)  # pyright: ignore[reportArgumentType]
    writer.save(TrainState(step=10, cursor=80), engine)  # pyright: ignore[reportArgumentType]
    assert writer.close()
    assert [event["step"] for event in events(run, "checkpoint")] == [10]


def test_a_step_is_saved_again_only_after_training_went_back(run: RunDir) -> None:
    writer = Checkpoints(run, flat_config(), World(), generation=claim_generation(run), data_fingerprint="data")
    engine = StandIn(0, 1)
    for step, cursor in ((10, 80), (20, 160), (20, 168)):  # the last batch was not applied
        writer.save(TrainState(step=step, cursor=cursor), engine)  # pyright: ignore[reportArgumentType]
    writer.went_back(TrainState(step=10, cursor=80))
    for step, cursor in ((10, 176), (20, 256)):
        writer.save(TrainState(step=step, cursor=cursor), engine)  # pyright: ignore[reportArgumentType]
    assert writer.close()
    assert [event["step"] for event in events(run, "checkpoint")] == [10, 20, 20]
    assert read_manifest(LocalStorage(run.checkpoint(20))).state.cursor == 256


def test_a_node_that_has_lost_the_shared_folder_does_not_take_that_for_a_newer_start(run: RunDir) -> None:
    writer = Checkpoints(run, flat_config(), World(), generation=claim_generation(run), data_fingerprint="data")
    run.generations.rename(run.generations.with_name("elsewhere"))
    run.generation.unlink()
    writer._fence._looked -= 60  # it looks every ten seconds
    assert not writer.overtaken()
    writer.end_if_overtaken()
    with pytest.raises(OSError, match="shows no start 1, which is this one; was it moved or removed"):
        writer._fence.must_be_newest()


def test_a_damaged_generation_file_is_one_clear_line(run: RunDir) -> None:
    run.root.mkdir()
    run.generation.write_text(json.dumps([]))
    with pytest.raises(UserError, match=r"generation.json: damaged"):
        claim_generation(run)


def test_a_link_among_the_checkpoints_is_removed_and_what_it_names_stays(run: RunDir) -> None:
    save(run, 10)
    link = run.checkpoints / "link"
    link.symlink_to(run.checkpoint(10))
    staged.remove(link)
    assert not link.is_symlink()
    verify_checkpoint(LocalStorage(run.checkpoint(10)))
