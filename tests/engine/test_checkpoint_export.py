"""Copies of checkpoints on S3: complete or invisible, compared, and never a reason for training to stop."""

import time
from pathlib import Path

import pytest
from flat_state import StandIn, flat_config

from cmscale.config import dump_config
from cmscale.distributed.world import World
from cmscale.engine import export
from cmscale.engine.checkpoint import Checkpoints, claim_generation
from cmscale.engine.checkpoint_reader import list_checkpoints, read_weights, verify_checkpoint
from cmscale.engine.export import DamagedUpload, Exporter, export_checkpoint, export_pending, pending_exports
from cmscale.errors import UserError
from cmscale.export.weights import finish_copies
from cmscale.io.local import LocalStorage
from cmscale.io.s3 import S3Storage
from cmscale.io.storage import open_storage
from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines
from cmscale.runs.manifests import TrainState


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "run")
    save(run, 10, 20)
    return run


def save(run: RunDir, *steps: int, exporter: Exporter | None = None, seed: int = 0) -> None:
    config = flat_config("checkpoint.keep_last=9")
    writer = Checkpoints(
        run, config, World(), generation=claim_generation(run), data_fingerprint="data", exporter=exporter
    )
    for step in steps:
        writer.save(TrainState(step=step, cursor=step), StandIn(0, 1, seed=seed + step))  # pyright: ignore[reportArgumentType]
    assert writer.close()


def events(run: RunDir) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in read_lines(run.events) if event["event"].startswith("export")]


def test_a_copy_on_s3_has_the_same_layout_and_reads_as_the_original(run: RunDir, s3: str) -> None:
    assert export_pending(run, s3) == [10, 20]
    copies = list_checkpoints(f"{s3}/run")
    assert [copy.step for copy in copies] == [10, 20]
    assert verify_checkpoint(copies[-1].url) == []
    here, there = read_weights(run.checkpoint(20), "ema_0.9"), read_weights(copies[-1].url, "ema_0.9")
    assert all((here[name] == there[name]).all() for name in here)
    assert pending_exports(run, s3) == []


def test_what_an_earlier_start_left_is_copied_by_the_next_and_new_saves_follow(run: RunDir, s3: str) -> None:
    exporter = Exporter(run, s3)
    save(run, 30, exporter=exporter)
    assert exporter.close(patience=60) == set()
    assert [copy.step for copy in list_checkpoints(f"{s3}/run")] == [10, 20, 30]
    assert events(run) == [("exported", 10), ("exported", 20), ("exported", 30)]


def test_storage_that_fails_is_logged_tried_again_and_left_for_the_next_start(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise ConnectionError("the S3 server does not answer")

    with monkeypatch.context() as broken:
        broken.setattr(LocalStorage, "upload", away)
        exporter = Exporter(run, str(tmp_path / "copies"), retry_seconds=0.01)
        assert exporter.close(patience=60) == {10, 20}
    assert events(run)[0] == ("export_failed", 10)
    assert pending_exports(run, str(tmp_path / "copies")) == [10, 20]
    assert export_pending(run, str(tmp_path / "copies")) == [10, 20]


def test_a_body_that_is_corrupted_on_the_way_is_caught_and_no_manifest_follows(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = open_storage(tmp_path / "copies")

    def corrupt(storage: LocalStorage, key: str, path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        storage.write(key, bytes(data))

    with monkeypatch.context() as broken:
        broken.setattr(LocalStorage, "upload", corrupt)
        with pytest.raises(DamagedUpload, match=r"rank-0000-of-0001.safetensors: came back changed"):
            export_checkpoint(run.checkpoint(10), target)
    assert list(target.list()) == []


def test_a_corruption_that_passes_is_mended_by_sending_again(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = open_storage(tmp_path / "copies")
    plain, sent = LocalStorage.upload, []

    def corrupt_once(storage: LocalStorage, key: str, path: Path) -> None:
        plain(storage, key, path)
        if not sent:
            storage.write(key, b"?")
        sent.append(key)

    monkeypatch.setattr(LocalStorage, "upload", corrupt_once)
    assert export_checkpoint(run.checkpoint(10), target)
    assert len(sent) == 2
    assert verify_checkpoint(target.url) == []


def test_of_two_exporters_one_manifest_wins_and_the_other_changes_nothing(run: RunDir, s3: str) -> None:
    target = open_storage(s3)
    assert export_checkpoint(run.checkpoint(10), target)
    assert export_checkpoint(run.checkpoint(10), target)
    save(run, 10, seed=5)
    assert not export_checkpoint(run.checkpoint(10), target)
    assert verify_checkpoint(s3) == []


def test_a_checkpoint_without_a_manifest_is_not_copied(run: RunDir, tmp_path: Path) -> None:
    (run.checkpoint(10) / "manifest.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        export_checkpoint(run.checkpoint(10), open_storage(tmp_path / "copies"))


def test_uploads_that_a_killed_exporter_left_are_ended(run: RunDir, s3: str) -> None:
    storage = export.exported_run(run, s3)
    assert isinstance(storage, S3Storage)
    storage.client.create_multipart_upload(Bucket=storage.bucket, Key=f"{storage.prefix}/checkpoints/part")
    storage.client.create_multipart_upload(Bucket=storage.bucket, Key="another/run")
    exporter = Exporter(run, s3)
    assert exporter.close(patience=60) == set()
    left = storage.client.list_multipart_uploads(Bucket=storage.bucket)["Uploads"]
    assert [upload["Key"] for upload in left] == ["another/run"]


def test_a_checkpoint_removed_before_its_copy_is_recorded_as_dropped(run: RunDir, tmp_path: Path) -> None:
    exporter = Exporter(run, str(tmp_path / "copies"))
    exporter.offer(77)
    assert exporter.close(patience=60) == set()
    assert ("export_dropped", 77) in events(run)


def test_the_export_command_finishes_the_copies_of_a_run(run: RunDir, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    run.config.write_text(dump_config(flat_config(f"checkpoint.export_to={copies}")))
    assert finish_copies(run.root) == [10, 20]
    assert verify_checkpoint(copies / "run" / "checkpoints" / "step-000000020") == []
    assert finish_copies(run.root) == []
    run.config.write_text(dump_config(flat_config()))
    with pytest.raises(UserError, match=r"checkpoint.export_to is not set"):
        finish_copies(run.root)


def test_a_place_that_refuses_is_said_once_and_in_the_end_with_the_steps(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = tmp_path / "copies"
    copies.write_text("a file where the folder should be")
    exporter = Exporter(run, str(copies), retry_seconds=0.01)
    while len(events(run)) < 3:
        time.sleep(0.01)
    began = time.monotonic()
    missing = exporter.finish(patience=60)
    assert time.monotonic() - began < 30  # waiting would not help
    assert missing.startswith(f"step 10, 20 is not in {copies}: ")
    assert "is a file, not a folder" in missing
    assert capsys.readouterr().out.count("checkpoints are not exported to") == 1
    copies.unlink()
    assert Exporter(run, str(copies)).finish(patience=60) == ""
    assert pending_exports(run, str(copies)) == []


def test_storage_that_is_away_when_the_run_ends_is_asked_again_and_then_named(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upload, tries = LocalStorage.upload, []

    def away(storage: LocalStorage, key: str, path: Path) -> None:
        tries.append(key)
        if len(tries) < 4:
            raise ConnectionError("the S3 server does not answer")
        upload(storage, key, path)

    monkeypatch.setattr(LocalStorage, "upload", away)
    assert Exporter(run, str(tmp_path / "one"), retry_seconds=0.01).finish(patience=60) == ""
    assert capsys.readouterr().out.splitlines()[-1] == f"checkpoints are exported to {tmp_path / 'one'} again"
    tries.clear()
    monkeypatch.setattr(LocalStorage, "upload", fail)
    missing = Exporter(run, str(tmp_path / "two"), retry_seconds=0.01).finish(patience=0.2)
    assert missing == f"step 10, 20 is not in {tmp_path / 'two'}: the S3 server does not answer"


def fail(*_: object) -> None:
    raise ConnectionError("the S3 server does not answer")


def test_one_checkpoint_that_cannot_be_copied_holds_up_no_other(run: RunDir, tmp_path: Path) -> None:
    (run.checkpoint(10) / "manifest.json").write_text("{}")
    missing = Exporter(run, str(tmp_path / "copies"), retry_seconds=0.01).finish(patience=60)
    assert missing.startswith("step 10 is not in")
    assert "not a valid CheckpointManifest" in missing
    assert [copy.step for copy in list_checkpoints(tmp_path / "copies" / "run")] == [20]


def test_a_copy_that_another_run_keeps_from_being_made_is_missing_in_the_end(run: RunDir, s3: str) -> None:
    exporter = Exporter(run, s3)
    assert exporter.close(patience=60) == set()
    save(run, 10, seed=5)
    exporter = Exporter(run, s3)
    exporter.offer(10)
    assert "step 10 is not in" in exporter.finish(patience=60)
