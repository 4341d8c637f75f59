"""Copies of checkpoints on S3: complete or invisible, compared, and never a reason for training to stop."""

import errno
import shutil
import threading
import time
from pathlib import Path

import pytest
from flat_state import StandIn, flat_config
from outages import pass_time, use_patience

from cmscale.config import dump_config
from cmscale.distributed.world import World
from cmscale.engine import export
from cmscale.engine.checkpoint import Checkpoints
from cmscale.engine.checkpoint_reader import list_checkpoints, read_weights, verify_checkpoint
from cmscale.engine.copying import DamagedUpload, export_checkpoint
from cmscale.engine.export import Exporter
from cmscale.engine.fence import claim_generation
from cmscale.engine.pending_export import export_pending
from cmscale.errors import NotExported, UserError
from cmscale.export.weights import finish_copies
from cmscale.io.fetch import file_sha256
from cmscale.io.local import LocalStorage
from cmscale.io.s3 import S3Storage
from cmscale.io.storage import open_storage
from cmscale.runs.copies import Copied, exported_run, pending_copies
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
    assert export_pending(run, s3) == [Copied(10), Copied(20)]
    copies = list_checkpoints(f"{s3}/run")
    assert [copy.step for copy in copies] == [10, 20]
    assert verify_checkpoint(copies[-1].url) == []
    here, there = read_weights(run.checkpoint(20), "ema_0.9"), read_weights(copies[-1].url, "ema_0.9")
    assert all((here[name] == there[name]).all() for name in here)
    assert pending_copies(run, s3) == []


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
    assert pending_copies(run, str(tmp_path / "copies")) == [Copied(10), Copied(20)]
    assert export_pending(run, str(tmp_path / "copies")) == [Copied(10), Copied(20)]


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
        with pytest.raises(DamagedUpload, match=r"rank-0000-of-0001.[0-9a-f]{16}.safetensors: came back changed"):
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
    storage = exported_run(run, s3)
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
    assert finish_copies(run.root) == [Copied(10), Copied(20)]
    assert verify_checkpoint(copies / "run" / "checkpoints" / "step-000000020") == []
    assert finish_copies(run.root) == []
    run.config.write_text(dump_config(flat_config()))
    with pytest.raises(UserError, match=r"checkpoint.export_to is not set"):
        finish_copies(run.root)


def test_a_place_that_refuses_is_said_once_and_in_the_end_with_the_steps(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = tmp_path / "copies"
    copies.write_text("a file where the folder should be")
    monkeypatch.setattr(export, "REFUSED_SECONDS", 0.3)
    exporter = Exporter(run, str(copies), retry_seconds=0.01)
    while len(events(run)) < 3:
        time.sleep(0.01)
    began = time.monotonic()
    missing = exporter.finish(patience=60)
    assert time.monotonic() - began < 60  # waiting would not help
    assert missing.startswith(f"step 10, 20 is not in {copies}: ")
    assert "is a file, not a folder" in missing
    assert capsys.readouterr().out.count("checkpoints are not exported to") == 1
    copies.unlink()
    assert Exporter(run, str(copies)).finish(patience=60) == ""
    assert pending_copies(run, str(copies)) == []


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
    missing = Exporter(run, str(tmp_path / "two"), retry_seconds=0.01).finish(patience=3)
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


def names(url: str | Path) -> list[str]:
    return [entry.key for entry in open_storage(url).list()]


def test_an_older_start_that_still_uploads_replaces_nothing_that_is_published(
    run: RunDir, s3: str, monkeypatch
) -> None:
    """It began before the newer one published its own checkpoint of the same step, and ends after it."""
    target, uploads = open_storage(s3), S3Storage.upload
    newer = RunDir(run.root.parent / "newer")
    save(newer, 10, seed=5)

    def slow(storage: S3Storage, key: str, path: Path) -> None:
        monkeypatch.setattr(S3Storage, "upload", uploads)
        assert export_checkpoint(newer.checkpoint(10), open_storage(s3))
        uploads(storage, key, path)

    monkeypatch.setattr(S3Storage, "upload", slow)
    assert not export_checkpoint(run.checkpoint(10), target)
    assert verify_checkpoint(s3) == []
    here, there = read_weights(newer.checkpoint(10), "master"), read_weights(s3, "master")
    assert all((here[name] == there[name]).all() for name in here)


def test_a_copy_names_its_files_by_their_hashes_and_one_of_an_earlier_release_counts_too(run: RunDir, s3: str) -> None:
    assert export_checkpoint(run.checkpoint(10), open_storage(s3).sub("new"))
    (part,) = [name for name in names(f"{s3}/new") if name != "manifest.json"]
    digest = file_sha256(run.checkpoint(10) / "rank-0000-of-0001.safetensors")
    assert part == f"rank-0000-of-0001.{digest[:16]}.safetensors"
    old = open_storage(s3).sub("old")
    for path in run.checkpoint(10).iterdir():  # as earlier releases copied it
        old.upload(path.name, path)
    assert verify_checkpoint(old.url) == []
    before = names(old.url)
    assert export_checkpoint(run.checkpoint(10), old)
    assert names(old.url) == before


def test_a_copy_that_was_brought_back_is_exported_under_the_same_names(run: RunDir, tmp_path: Path) -> None:
    assert export_checkpoint(run.checkpoint(10), open_storage(tmp_path / "one"))
    assert export_checkpoint(tmp_path / "one", open_storage(tmp_path / "two"))
    assert names(tmp_path / "one") == names(tmp_path / "two")
    assert verify_checkpoint(tmp_path / "two") == []


def test_a_file_that_an_earlier_try_left_is_not_sent_again(run: RunDir, tmp_path: Path, monkeypatch) -> None:
    target = open_storage(tmp_path / "copies")
    assert export_checkpoint(run.checkpoint(10), target)
    target.delete("manifest.json")
    sent: list[str] = []
    monkeypatch.setattr(LocalStorage, "upload", lambda storage, key, path: sent.append(key))
    assert export_checkpoint(run.checkpoint(10), target)
    assert sent == []


@pytest.mark.parametrize("name", ["manifest.json", "rank-0000-of-0001.safetensors"])
def test_a_checkpoint_that_is_damaged_here_holds_up_no_other_and_is_named(
    run: RunDir, tmp_path: Path, name: str
) -> None:
    damaged = run.checkpoint(10) / name
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    missing = Exporter(run, str(tmp_path / "copies"), retry_seconds=0.01).finish(patience=60)
    assert missing.startswith(f"step 10 is not in {tmp_path / 'copies'}: step 10: {damaged}")
    assert [copy.step for copy in list_checkpoints(tmp_path / "copies" / "run")] == [20]
    shutil.rmtree(tmp_path / "copies")
    done: list[Copied] = []
    with pytest.raises(NotExported, match=rf"step 10 is not in {tmp_path}/copies: {damaged}"):
        export_pending(run, str(tmp_path / "copies"), copied=done.append)
    assert done == [Copied(20)]


def test_a_disk_that_is_full_for_a_while_ends_neither_the_thread_nor_the_copies(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything fails: events, the job's log, the copies, and what nobody thought of."""
    import builtins

    failed = threading.Event()
    with monkeypatch.context() as full:

        def refuse(*_: object, **__: object) -> None:
            failed.set()
            raise OSError(errno.ENOSPC, "No space left on device")

        full.setattr(builtins, "print", refuse)
        full.setattr(export, "write_event", refuse)
        full.setattr(LocalStorage, "upload", refuse)
        full.setattr(export, "wanted_copies", refuse)
        exporter = Exporter(run, str(tmp_path / "copies"), retry_seconds=0.01)
        assert failed.wait(60)
        time.sleep(0.1)
        assert exporter._thread.is_alive()
    assert exporter.finish(patience=60) == ""


def test_closing_goes_on_for_as_long_as_the_patience(run: RunDir, tmp_path: Path, monkeypatch) -> None:
    """A disk that is full while the run ends, and has space again a moment later."""
    upload, tries = LocalStorage.upload, []

    def full(storage: LocalStorage, key: str, path: Path) -> None:
        tries.append(key)
        if len(tries) < 30:
            raise UserError(f"{key}: no space left on the device")
        upload(storage, key, path)

    monkeypatch.setattr(export, "REFUSED_SECONDS", 0.0)  # which is for other refusals
    monkeypatch.setattr(LocalStorage, "upload", full)
    assert Exporter(run, str(tmp_path / "copies"), retry_seconds=0.01).finish(patience=60) == ""


def test_old_copies_are_removed_and_not_made_again(run: RunDir, s3: str) -> None:
    kept = flat_config("checkpoint.export_keep_last=2", "checkpoint.export_keep_every=30").checkpoint
    exporter = Exporter(run, s3, settings=kept)
    save(run, 30, 40, 50, exporter=exporter)
    assert exporter.finish(patience=60) == ""
    assert [copy.step for copy in list_checkpoints(f"{s3}/run")] == [30, 40, 50]
    assert not [name for name in names(f"{s3}/run") if "000010" in name or "000020" in name]
    assert pending_copies(run, s3, kept) == []
    exporter = Exporter(run, s3, settings=kept)
    assert exporter.finish(patience=60) == ""
    assert [event for event in events(run) if event[0] == "exported"].count(("exported", 10)) <= 1
    assert [copy.step for copy in list_checkpoints(f"{s3}/run")] == [30, 40, 50]


def test_where_deleting_is_not_allowed_copies_stay_and_nothing_fails(run: RunDir, s3: str, proxy, capsys) -> None:
    proxy.add("answer 403 AccessDenied", match="DELETE")
    assert Exporter(run, s3).finish(patience=60) == ""
    kept = flat_config("checkpoint.export_keep_last=1").checkpoint
    assert Exporter(run, s3, settings=kept).finish(patience=60) == ""
    save(run, 30)
    assert Exporter(run, s3, settings=kept).finish(patience=60) == ""
    assert "old copies stay in" in capsys.readouterr().out
    assert [copy.step for copy in list_checkpoints(f"{s3}/run")] == [10, 20, 30]


def test_a_conflict_with_nothing_there_does_not_lose_the_step(run: RunDir, s3: str, proxy, monkeypatch) -> None:
    pass_time(monkeypatch)
    use_patience(30)
    rule = proxy.add("answer 409 ConditionalRequestConflict", match="if-none-match", times=3)
    assert Exporter(run, s3).finish(patience=60) == ""
    assert rule.used == 3
    assert [copy.step for copy in list_checkpoints(f"{s3}/run")] == [10, 20]


def test_a_server_that_is_restarted_delays_the_copies_only(run: RunDir, s3: str, proxy, monkeypatch) -> None:
    use_patience(30)
    clock = pass_time(monkeypatch, lambda number: proxy.back() if number == 5 else None)
    proxy.away()
    assert Exporter(run, s3).finish(patience=60) == ""
    assert len(clock.waits) >= 5
    assert [copy.step for copy in list_checkpoints(f"{s3}/run")] == [10, 20]
    assert events(run) == [("exported", 10), ("exported", 20)]
