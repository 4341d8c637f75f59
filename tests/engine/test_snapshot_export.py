"""Snapshots of averages by a power function are copied like checkpoints, before them, and are never removed."""

import random
from pathlib import Path

import pytest
import torch
from flat_state import StandIn, flat_config

from cmscale.config.schedules import ScheduleValues
from cmscale.distributed.world import World
from cmscale.engine.checkpoint import Checkpoints
from cmscale.engine.checkpoint_reader import list_checkpoints, verify_checkpoint
from cmscale.engine.export import Exporter
from cmscale.engine.fence import claim_generation
from cmscale.engine.pending_export import export_pending
from cmscale.engine.power_averages import reconstructed
from cmscale.errors import NotExported, UserError
from cmscale.io.s3 import S3Storage
from cmscale.runs.copies import Copied, pending_copies
from cmscale.runs.folder import RunDir, rank_file
from cmscale.runs.log import read_lines
from cmscale.runs.manifests import TrainState

LENGTHS = (0.1, 0.2)
FLIPS = 200  # 400 were tried once
OVERRIDES = ("ema.lengths=[0.1,0.2]", "checkpoint.every_steps=1", "ema.snapshot_every=1", "checkpoint.keep_last=2")


def snapshot(step: int) -> Copied:
    return Copied(step, is_checkpoint=False)


def train(run: RunDir, *steps: int, exporter: Exporter | None = None, overrides: tuple[str, ...] = ()) -> None:
    """Steps of one rank with other values each, all of them saved."""
    config = flat_config(*OVERRIDES, *overrides)
    writer = Checkpoints(
        run, config, World(), generation=claim_generation(run), data_fingerprint="data", exporter=exporter
    )
    state = StandIn(0, 1, lengths=LENGTHS)
    for step in steps:
        state.shards.local("master").copy_(torch.full((27,), float(step)))
        state.shards.update(ScheduleValues(step - 1, 1.0, target_ema=0.9))
        writer.save(TrainState(step=step, cursor=8 * step), state)  # pyright: ignore[reportArgumentType]
    assert writer.close()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of 5 steps: with all snapshots, and the checkpoints of the last two."""
    run = RunDir(tmp_path / "runs" / "run")
    train(run, *range(1, 6))
    return run


def steps_of(url: str | Path, within: str) -> list[int]:
    return [listed.step for listed in list_checkpoints(url, within=within)]


def test_averages_of_any_length_are_computed_from_the_copies_alone(run: RunDir, s3: str) -> None:
    expected = [*map(snapshot, range(1, 5)), Copied(4), snapshot(5), Copied(5)]
    assert pending_copies(run, s3) == expected
    assert export_pending(run, s3) == expected
    assert pending_copies(run, s3) == []
    copies = f"{s3}/run"
    assert steps_of(copies, "snapshots") == list(range(1, 6))
    for each in list_checkpoints(copies, within="snapshots"):
        assert verify_checkpoint(each.url) == []
    for length in (0.12, 0.15):
        assert torch.equal(reconstructed(copies, length, step=5), reconstructed(str(run.root), length, step=5))


def test_an_exporter_copies_a_snapshot_before_its_checkpoint_and_removes_none(
    run: RunDir, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    write = S3Storage.write_if_absent

    def record(storage: S3Storage, key: str, data: bytes) -> bool:
        made.append(storage.join(key))
        return write(storage, key, data)

    monkeypatch.setattr(S3Storage, "write_if_absent", record)
    settings = flat_config(*OVERRIDES, "checkpoint.export_keep_last=1").checkpoint
    exporter = Exporter(run, s3, settings=settings)
    train(run, 6, 7, exporter=exporter)
    assert exporter.finish(patience=60) == ""
    assert steps_of(f"{s3}/run", "checkpoints") == [7]
    assert steps_of(f"{s3}/run", "snapshots") == list(range(1, 8))
    manifests = [url for url in made if url.endswith("manifest.json")]
    assert manifests[-1].endswith("checkpoints/step-000000007/manifest.json")
    assert manifests.index(f"{s3}/run/snapshots/step-000000007/manifest.json") < len(manifests) - 1
    exported = [event.get("folder") for event in read_lines(run.events) if event["event"] == "exported"]
    assert "snapshots/step-000000001" in exported
    made.clear()
    again = Exporter(run, s3, settings=settings)
    assert again.finish(patience=60) == ""
    assert made == []


def test_a_snapshot_that_is_damaged_here_is_named_in_the_end_and_holds_up_nothing(run: RunDir, s3: str) -> None:
    (run.snapshot(3) / rank_file(0, 1)).write_bytes(b"damaged")
    exporter = Exporter(run, s3)
    said = exporter.finish(patience=60)
    assert said.startswith(f"step 3 (its snapshot) is not in {s3}: ")
    assert "SHA-256 differs" in said
    assert steps_of(f"{s3}/run", "snapshots") == [1, 2, 4, 5]
    assert steps_of(f"{s3}/run", "checkpoints") == [4, 5]
    with pytest.raises(NotExported, match=r"step 3 \(its snapshot\) is not in"):
        export_pending(run, s3)


def test_every_single_flipped_bit_of_a_snapshots_manifest_is_found_before_an_average_is_computed(run: RunDir) -> None:
    path = run.snapshot(3) / "manifest.json"
    intact = path.read_bytes()
    missed = []
    for bit in random.Random(0).sample(range(8 * len(intact)), FLIPS):
        flipped = bytearray(intact)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            reconstructed(str(run.root), 0.12, step=5)
        except UserError as error:
            found = f"{path}: " in str(error)
        else:
            found = False
        if not found or not verify_checkpoint(run.snapshot(3)):
            missed.append(bit)
    assert missed == []


def test_storage_that_fails_for_a_snapshot_is_tried_again(run: RunDir, s3: str, monkeypatch) -> None:
    upload, failures = S3Storage.upload, [ConnectionError("the S3 server does not answer")]

    def fail_once(storage: S3Storage, key: str, path: Path) -> None:
        if "snapshots/step-000000005" in storage.url and failures:
            raise failures.pop()
        upload(storage, key, path)

    monkeypatch.setattr(S3Storage, "upload", fail_once)
    exporter = Exporter(run, s3, retry_seconds=0.01)
    assert exporter.finish(patience=60) == ""
    assert failures == []
    assert steps_of(f"{s3}/run", "snapshots") == list(range(1, 6))
