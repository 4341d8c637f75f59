"""The manifest of a checkpoint: every changed bit is found, by `verify` and by a resume; older ones are still read."""

import random
import shutil
from pathlib import Path

import pytest
from flat_state import StandIn, as_version, flat_config, parameters_of, ranks_of

from cmscale.distributed.world import World
from cmscale.engine import resume
from cmscale.engine.checkpoint import Checkpoints
from cmscale.engine.checkpoint_reader import read_manifest, verify_checkpoint
from cmscale.engine.fence import claim_generation
from cmscale.errors import UserError
from cmscale.io.local import LocalStorage
from cmscale.runs.folder import RunDir
from cmscale.runs.log import append_line
from cmscale.runs.manifests import CheckpointManifest, TrainState, read_checkpoint_manifest

PARAMETERS = StandIn(0, 1).parameters
FLIPS = 200  # of each kind of manifest; 400 were tried once


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with checkpoints of steps 10 and 20."""
    run = RunDir(tmp_path / "run")
    writer = Checkpoints(run, flat_config(), World(), generation=claim_generation(run), data_fingerprint="data")
    for step in (10, 20):
        writer.save(TrainState(step=step, cursor=8 * step), StandIn(0, 1, seed=step))  # pyright: ignore[reportArgumentType]
    assert writer.close()
    return run


def newest_step(run: RunDir) -> int:
    """The step that a resume starts from."""
    found = resume.newest(run, flat_config(), World(), data_fingerprint="data", parameters=PARAMETERS)
    assert found is not None
    return found.manifest.state.step


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_every_single_flipped_bit_is_found_by_verify_and_a_resume_takes_the_one_before(
    run: RunDir, zero_stage: int
) -> None:
    if zero_stage == 3:
        generation = claim_generation(run)
        config = flat_config("engine.zero_stage=3", "checkpoint.every_steps=20")
        ranks = [
            Checkpoints(run, config, world, generation=generation, data_fingerprint="data") for world in ranks_of(2)
        ]
        for world, writer in zip(ranks_of(2), ranks, strict=True):
            state = StandIn(world.rank, 2, zero_stage=3, seed=20)
            writer.save(TrainState(step=20, cursor=160), state)  # pyright: ignore[reportArgumentType]
        for writer in ranks:
            writer.wait()
    assert newest_step(run) == 20
    folder = run.checkpoint(20)
    intact = (folder / "manifest.json").read_bytes()
    backup = run.root / "backup"
    shutil.copytree(folder, backup)
    source = random.Random(0)
    missed = []
    for bit in source.sample(range(8 * len(intact)), FLIPS):
        flipped = bytearray(intact)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / "manifest.json").write_bytes(flipped)
        if not verify_checkpoint(folder) or newest_step(run) != 10:
            missed.append(bit)
        shutil.rmtree(run.checkpoints / "damaged-step-000000020", ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(backup, folder)
    assert missed == []
    assert newest_step(run) == 20


def rewrite(run: RunDir, **changed: object) -> CheckpointManifest:
    """Writes the manifest of step 20 as an earlier version, without a hash, with other values."""
    folder = run.checkpoint(20)
    manifest = read_manifest(LocalStorage(folder))
    manifest = (as_version(1, manifest) if manifest.version > 1 else manifest).model_copy(update=changed)
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    return manifest


def test_a_manifest_of_an_earlier_version_is_read_with_a_notice(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = rewrite(run)
    assert b"sha256" not in manifest.to_bytes().splitlines()[-2]
    assert verify_checkpoint(run.checkpoint(20)) == []
    assert newest_step(run) == 20
    assert "step-000000020: its manifest has no hash of its own" in capsys.readouterr().out


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_manifest_of_version_2_says_the_same_with_a_list_of_segments(run: RunDir, zero_stage: int) -> None:
    manifest = read_manifest(LocalStorage(run.checkpoint(20))).model_copy(update={"zero_stage": zero_stage})
    former = as_version(2, manifest)
    raw = former.to_bytes()
    assert b"part_size" not in raw
    assert b'"segments"' in raw
    assert b'"segments"' not in manifest.to_bytes()
    assert read_checkpoint_manifest(raw, origin="here") == former
    (run.checkpoint(20) / "manifest.json").write_bytes(raw)
    assert verify_checkpoint(run.checkpoint(20)) == []
    assert newest_step(run) == 20


@pytest.mark.parametrize(
    ("version", "changed", "words"),
    [
        (3, {"part_size": None}, "version 3 has part_size and no segments"),
        (2, {"part_size": 27}, "version 2 has segments and no part_size"),
        (2, {"parts": "without"}, "version 2 has segments and no part_size"),
        (3, {"parts": "with"}, "version 3 has part_size and no segments"),
    ],
)
def test_a_manifest_says_where_elements_are_in_one_way_alone(
    run: RunDir, version: int, changed: dict[str, object], words: str
) -> None:
    manifest = read_manifest(LocalStorage(run.checkpoint(20)))
    former = as_version(2, manifest)
    if "parts" in changed:
        changed = {"parts": (manifest if changed["parts"] == "without" else former).parts}
    raw = (manifest if version == 3 else former).model_copy(update=changed).to_bytes()
    with pytest.raises(UserError, match=words):
        read_checkpoint_manifest(raw, origin="here")


def test_a_part_size_that_leaves_elements_out_is_found(run: RunDir) -> None:
    manifest = read_manifest(LocalStorage(run.checkpoint(20)))
    (run.checkpoint(20) / "manifest.json").write_bytes(manifest.model_copy(update={"part_size": 26}).to_bytes())
    assert any("holds 26 elements of 27" in problem for problem in verify_checkpoint(run.checkpoint(20)))


def test_what_an_earlier_versions_manifest_contradicts_is_found_without_a_hash(run: RunDir) -> None:
    manifest = as_version(1, read_manifest(LocalStorage(run.checkpoint(20))))
    first, *others = manifest.parameters
    config = {**manifest.config, "train": {**manifest.config["train"], "seed": 5}}
    assert manifest.parts[0].segments is not None
    (segment,) = manifest.parts[0].segments
    shifted = manifest.parts[0].model_copy(update={"segments": (segment.model_copy(update={"at": 1}),)})
    contradictions: dict[str, dict[str, object]] = {
        "manifest is of step 21": {"state": TrainState(step=21, cursor=168)},
        "cursor 164 is not": {"state": TrainState(step=20, cursor=164)},
        "cursor 152 is not": {"state": TrainState(step=20, cursor=152)},
        "optimizer_step 19 is not": {"scalars": {"optimizer_step": 19.0}},
        "is at 1, not 0": {"parameters": (first.model_copy(update={"offset": 1}), *others)},
        "of 28": {"num_elements": 28},
        "a parameter twice": {"parameters": (first, others[0].model_copy(update={"name": first.name}), *others[1:])},
        "config_fingerprint": {"config_fingerprint": "0" * 64},
        "train.seed is 5": {"config": config},
        "files of 2 ranks": {"num_ranks": 2},
        "a segment is at 1, not 0": {"parts": (shifted,)},
        "lists no exp_avg_sq": {"quantities": tuple(set(manifest.quantities) - {"exp_avg_sq"})},
    }
    for words, changed in contradictions.items():
        rewrite(run, **changed)
        problems = verify_checkpoint(run.checkpoint(20))
        assert any(words in problem for problem in problems), (words, problems)
        rewrite(run, **{name: getattr(manifest, name) for name in changed})
    assert verify_checkpoint(run.checkpoint(20)) == []


@pytest.mark.parametrize("damage", ["a name", "the cursor"])
def test_a_resume_compares_an_earlier_versions_manifest_with_the_run(run: RunDir, damage: str) -> None:
    append_line(run.metrics, {"step": 20, "samples": 160})
    if damage == "a name":
        first, *others = PARAMETERS
        rewrite(run, parameters=(first.model_copy(update={"name": "a_weighs"}), *others))
    else:
        rewrite(run, state=TrainState(step=20, cursor=168))
    assert newest_step(run) == 10


def test_another_network_in_every_checkpoint_is_named(run: RunDir) -> None:
    other = parameters_of({"a.weight": (3, 5), "c": (2,)})
    with pytest.raises(UserError, match=r"none of the 2 checkpoints is valid .*another network \(from c on\)"):
        resume.newest(run, flat_config(), World(), data_fingerprint="data", parameters=other)
    assert resume.newest(run, flat_config(), World(), data_fingerprint="data") is not None


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_a_damaged_one(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = run.checkpoint(20) / "rank-0000-of-0001.safetensors"
    allowed = resume.os.access
    monkeypatch.setattr(resume.os, "access", lambda path, mode: path != part and allowed(path, mode))  # root may all
    with pytest.raises(UserError, match=rf"{part}: not allowed to read it; .*chmod"):
        newest_step(run)
    assert run.checkpoint(20).exists()


def test_a_manifest_says_what_is_wrong_with_it(run: RunDir) -> None:
    raw = (run.checkpoint(20) / "manifest.json").read_bytes()
    for changed in (raw.replace(b'"cursor": 160', b'"cursor": 168'), raw.replace(b'"version": 3', b'"version": 1')):
        with pytest.raises(UserError, match=r"here: its contents are not what was written \(SHA-256 differs\)"):
            read_checkpoint_manifest(changed, origin="here")
    seal = raw.splitlines(keepends=True)[-2]
    unsealed = raw.replace(b",\n" + seal, b"\n")
    with pytest.raises(UserError, match="its own SHA-256 is damaged"):
        read_checkpoint_manifest(unsealed, origin="here")
