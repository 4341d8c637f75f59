"""Runs continued from their exports: which checkpoint is taken, what comes with it, and which folder may go on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from evaluation_fixtures import TEXT, write_checkpoint, write_snapshot
from launch_fixtures import dataset

from cmscale.config import dump_config, parse_config, read_config
from cmscale.engine import copying
from cmscale.engine.checkpoint import Checkpoints
from cmscale.engine.checkpoint_reader import verify_checkpoint
from cmscale.engine.copying import export_checkpoint
from cmscale.engine.export import Exporter
from cmscale.engine.fence import Fenced
from cmscale.engine.pending_export import export_pending
from cmscale.errors import UserError
from cmscale.io.storage import Storage, open_storage
from cmscale.runs.checkpoints import committed_steps, read_manifest
from cmscale.runs.folder import RunDir, rank_file, step_name
from cmscale.runs.homes import WentElsewhere, claim, homes, must_be_home
from cmscale.runs.log import append_line, read_lines
from cmscale.runs.manifests import read_dataset_manifest
from cmscale.runs.starts import read_starts
from launchers import submit
from launchers.clusters import CLUSTERS
from launchers.clusters.local import LocalMachine
from launchers.jobs import JobSpec


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle(LocalMachine):
        def run(self, job: JobSpec, *, wait: bool) -> int:
            del job, wait
            return 0

    monkeypatch.setitem(CLUSTERS, "local", Idle())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def here(tmp_path: Path, s3: str) -> RunDir:
    """A run with checkpoints of steps 3 and 7, a history, and copies of both on S3."""
    run, data = RunDir(tmp_path / "here" / "one"), dataset(tmp_path / "data")
    text = TEXT.format(kind="ct", method="distance: l2", data=data, samples=10)
    config = parse_config(text, [f"checkpoint.export_to={s3}/runs"])
    fingerprint = read_dataset_manifest(open_storage(data)).fingerprint
    for step in (3, 7):
        write_checkpoint(run, config, step=step, data_fingerprint=fingerprint)
        append_line(run.metrics, {"step": step, "loss": 1.0 / step})
    run.config.write_text(dump_config(config))
    placement = {"cluster": "local", "nodes": 1, "gpus_per_node": 1, "partition": None, "minutes": None}
    run.placement.write_text(json.dumps(placement))
    run.logs.mkdir()
    (run.samples).mkdir()
    run.sample_grid(3).write_bytes(b"png")
    (run.evaluations / ".blocks").mkdir(parents=True)
    (run.evaluations / "step-3.json").write_text("{}")
    (run.evaluations / ".blocks" / "part.json").write_text("{}")
    exporter = Exporter(run, f"{s3}/runs")
    assert exporter.close(patience=60) == set()
    return run


def resume(url: str, folder: Path, *words: str) -> RunDir:
    assert submit.main(["--cluster", "local", "--resume", url, "--runs-dir", str(folder), *words]) == 0
    return RunDir(folder / "one")


def exported(s3: str) -> Storage:
    return open_storage(f"{s3}/runs/one")


def test_a_run_goes_on_from_its_newest_export_with_its_history_and_without_its_placement(
    here: RunDir, s3: str, tmp_path: Path
) -> None:
    there = resume(f"{s3}/runs/one/", tmp_path / "there", "train.micro_batch_size=4")
    assert committed_steps(there) == [7]
    assert {path.name for path in there.checkpoint(7).iterdir()} == {"manifest.json", rank_file(0, 1)}
    assert [record["step"] for record in read_lines(there.metrics)] == [3, 7]
    assert there.sample_grid(3).read_bytes() == b"png"
    assert [path.name for path in there.evaluations.iterdir()] == ["step-3.json"]
    config = read_config(there.config, resolved=True)
    assert (config.train.micro_batch_size, config.checkpoint.export_to) == (4, f"{s3}/runs")
    assert read_starts(there)[-1]["continued_from"] == {"exports": f"{s3}/runs/one", "step": 7}
    events = [record["event"] for record in read_lines(there.events)]
    assert events == ["exported", "continued"]  # what was exported before the last copy
    assert [home.folder for home in homes(exported(s3))] == [str(here.root), str(there.root)]
    assert resume(f"{s3}/runs/one", tmp_path / "there") == there  # the same command again resumes the folder
    assert len(homes(exported(s3))) == 2


@pytest.mark.parametrize("damage", ["no manifest", "file missing", "file damaged", "manifest damaged"])
def test_an_incomplete_newest_export_is_passed_over_and_can_be_exported_again(
    here: RunDir, s3: str, tmp_path: Path, damage: str
) -> None:
    newest = exported(s3).sub(f"checkpoints/{step_name(7)}")
    file = next(entry.key for entry in newest.list("rank-"))
    match damage:
        case "no manifest":
            newest.delete("manifest.json")
        case "file missing":
            newest.delete(file)
        case "file damaged":
            newest.write(file, newest.read(file)[:-1] + b"x")
        case "manifest damaged":
            newest.write("manifest.json", newest.read("manifest.json").replace(b'"cursor": 56', b'"cursor": 57'))
    there = resume(f"{s3}/runs/one", tmp_path / "there")
    assert committed_steps(there) == [3]
    assert committed_steps(exported(s3)) == [3]


def test_the_snapshots_of_averages_up_to_the_checkpoint_come_along(
    here: RunDir, s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"checkpoint.export_to={s3}/runs", "ema.lengths=[0.05,0.1]"]
    config = parse_config(here.config.read_text(), overrides)
    for step in (1, 2, 7, 8):
        write_snapshot(here, config, step=step)
    assert Exporter(here, f"{s3}/runs").finish(patience=60) == ""
    part = next(entry.key for entry in exported(s3).list("snapshots/step-000000002/rank"))
    exported(s3).write(part, b"damaged")
    there = resume(f"{s3}/runs/one", tmp_path / "there")
    assert committed_steps(there, within="snapshots") == [1, 7]
    assert "note: the snapshot of step 2 is not taken" in capsys.readouterr().err
    for step in (1, 7):
        assert verify_checkpoint(there.snapshot(step)) == []
    assert (there.snapshot(7) / rank_file(0, 1)).read_bytes() == (here.snapshot(7) / rank_file(0, 1)).read_bytes()
    exported(s3).write(part, (here.snapshot(2) / rank_file(0, 1)).read_bytes())
    (there.snapshot(7) / "manifest.json").unlink()  # as if it had been lost since
    claim(exported(s3), here, step=7)
    kept = (there.snapshot(1) / rank_file(0, 1)).stat().st_ino
    resume(f"{s3}/runs/one", tmp_path / "there")
    assert committed_steps(there, within="snapshots") == [1, 2, 7]
    assert (there.snapshot(1) / rank_file(0, 1)).stat().st_ino == kept


def test_where_nothing_is_one_line_says_so(s3: str, tmp_path: Path) -> None:
    for url, said in (
        (f"{s3}/runs/nobody", "no complete checkpoint of a run there"),
        ("s3://nobody-has-this/runs/one", "no bucket 'nobody-has-this'"),
        (f"{s3}/", "no complete checkpoint of a run there"),
    ):
        with pytest.raises(UserError, match=said) as refused:
            resume(url, tmp_path / "there")
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "there").exists()


def test_another_run_of_the_name_is_refused_and_left(here: RunDir, s3: str, tmp_path: Path) -> None:
    other = RunDir(tmp_path / "there" / "one")
    other.root.mkdir(parents=True)
    other.config.write_text(here.config.read_text().replace(f"{s3}/runs", "null"))
    before = other.config.read_bytes()
    with pytest.raises(UserError, match="is there and is not this run; give another --runs-dir"):
        resume(f"{s3}/runs/one", tmp_path / "there")
    assert other.config.read_bytes() == before
    assert len(homes(exported(s3))) == 1


def test_the_folder_before_exports_nothing_more_and_its_start_ends(here: RunDir, s3: str, tmp_path: Path) -> None:
    resume(f"{s3}/runs/one", tmp_path / "there")
    config = read_config(here.config)
    write_checkpoint(here, config, step=9)
    exporter = Exporter(here, f"{s3}/runs", retry_seconds=0.01)
    assert 9 in exporter.close(patience=60)
    assert "goes on elsewhere" in exporter.went_elsewhere
    assert committed_steps(exported(s3)) == [3, 7]
    from cmscale.distributed.world import World

    writer = Checkpoints(here, config, World(), generation=0, data_fingerprint="", exporter=exporter)
    writer._fence._looked -= 60  # it looks every ten seconds
    assert writer.overtaken()
    with pytest.raises(Fenced, match=r"goes on elsewhere, in .*there/one"):
        writer.end_if_overtaken()


def test_a_copy_that_is_under_way_when_the_run_goes_elsewhere_is_not_committed(
    here: RunDir, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(here, read_config(here.config), step=9)
    upload = copying._upload_checked

    def upload_and_lose_the_run(*arguments: Any) -> None:
        upload(*arguments)
        monkeypatch.setattr(copying, "_upload_checked", upload)
        resume(f"{s3}/runs/one", tmp_path / "there")

    monkeypatch.setattr(copying, "_upload_checked", upload_and_lose_the_run)
    exporter = Exporter(here, f"{s3}/runs", retry_seconds=0.01)
    assert 9 in exporter.close(patience=60)
    assert "goes on elsewhere" in exporter.went_elsewhere
    assert committed_steps(exported(s3)) == [3, 7]
    with pytest.raises(UserError, match="goes on elsewhere"):
        export_pending(here, f"{s3}/runs")  # as `cmscale export` does


def test_a_folder_that_is_lost_and_replaced_by_an_empty_one_did_not_go_elsewhere(here: RunDir, s3: str) -> None:
    exporter = Exporter(here, f"{s3}/runs", retry_seconds=0.01)
    assert exporter.close(patience=60) == set()
    here.root.rename(here.root.with_name("lost"))
    here.root.mkdir()
    assert exporter._home(exported(s3)) == 1
    with pytest.raises(UserError, match="goes on elsewhere"):
        must_be_home(exported(s3), here)  # to a new start it is another folder


def test_a_copy_of_a_runs_folder_does_not_export_to_the_place_of_the_first_and_a_moved_one_does(
    here: RunDir, s3: str, tmp_path: Path
) -> None:
    assert Exporter(here, f"{s3}/runs").close(patience=60) == set()
    (tmp_path / "link").symlink_to(here.root.parent)
    must_be_home(exported(s3), RunDir(tmp_path / "link" / "one"))
    copy = RunDir(tmp_path / "copy" / "one")
    shutil.copytree(here.root, copy.root)
    with pytest.raises(WentElsewhere, match=r"belongs to .*, of which .*copy/one is a copy; give the copy"):
        must_be_home(exported(s3), copy)
    must_be_home(exported(s3), here)
    here.root.rename(here.root.with_name("elsewhere"))
    must_be_home(exported(s3), RunDir(here.root.with_name("elsewhere")))


def test_a_copy_committed_in_the_moment_of_the_takeover_gives_way_to_the_new_home(
    here: RunDir, s3: str, tmp_path: Path
) -> None:
    there = resume(f"{s3}/runs/one", tmp_path / "there")
    fingerprint = read_dataset_manifest(open_storage(tmp_path / "data")).fingerprint
    for step in (9, 11):  # the folder before had looked for a newer home just before there was one
        write_checkpoint(here, read_config(here.config), step=step, data_fingerprint=fingerprint)
        target = exported(s3).sub(f"checkpoints/{step_name(step)}")
        assert export_checkpoint(here.checkpoint(step), target, home=lambda: 1)
    different = {"loss_scale": 2.0}
    write_checkpoint(there, read_config(there.config), step=9, data_fingerprint=fingerprint, scalars=different)
    assert Exporter(there, f"{s3}/runs").close(patience=60) == set()
    assert [event["step"] for event in read_lines(there.events) if event["event"] == "exported"][-1] == 9
    third = resume(f"{s3}/runs/one", tmp_path / "third")
    assert committed_steps(third) == [9]
    manifest = read_manifest(open_storage(third.checkpoint(9)))
    assert (manifest.scalars, manifest.home) == (different, 0)


def test_a_run_comes_back_unless_its_folder_has_trained_on(here: RunDir, s3: str, tmp_path: Path) -> None:
    there = resume(f"{s3}/runs/one", tmp_path / "there")
    fingerprint = read_dataset_manifest(open_storage(tmp_path / "data")).fingerprint
    write_checkpoint(there, read_config(there.config), step=12, data_fingerprint=fingerprint)
    append_line(there.metrics, {"step": 12, "loss": 0.1})
    assert Exporter(there, f"{s3}/runs").close(patience=60) == set()
    write_checkpoint(here, read_config(here.config), step=9, data_fingerprint=fingerprint)
    with pytest.raises(UserError, match=r"has a checkpoint of step 9, but the run went on from step 7 in .*there/one"):
        resume(f"{s3}/runs/one", here.root.parent)
    for path in here.checkpoint(9).iterdir():
        path.unlink()
    here.checkpoint(9).rmdir()
    assert resume(f"{s3}/runs/one", here.root.parent) == here
    assert committed_steps(here) == [3, 7, 12]
    assert [record["step"] for record in read_lines(here.metrics)] == [3, 7, 12]
    assert homes(exported(s3))[-1].folder == str(here.root)
    must_be_home(exported(s3), here)
    with pytest.raises(UserError, match="goes on elsewhere"):
        must_be_home(exported(s3), there)


def test_a_run_whose_exports_have_no_metrics_comes_back(here: RunDir, s3: str, tmp_path: Path) -> None:
    there = resume(f"{s3}/runs/one", tmp_path / "there")
    fingerprint = read_dataset_manifest(open_storage(tmp_path / "data")).fingerprint
    write_checkpoint(there, read_config(there.config), step=12, data_fingerprint=fingerprint)
    assert Exporter(there, f"{s3}/runs").close(patience=60) == set()
    exported(s3).delete(there.metrics.name)
    assert resume(f"{s3}/runs/one", here.root.parent) == here
    assert committed_steps(here) == [3, 7, 12]


def test_two_folders_that_claim_at_once_get_different_numbers(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "exports")
    runs = [RunDir(tmp_path / name) for name in ("a", "b")]
    for run in runs:
        run.root.mkdir()
    real = storage.write_if_absent

    def raced(key: str, data: bytes) -> bool:
        storage.write_if_absent = real  # pyright: ignore[reportAttributeAccessIssue]
        claim(storage, runs[1], step=0)
        return real(key, data)

    storage.write_if_absent = raced  # pyright: ignore[reportAttributeAccessIssue]
    assert claim(storage, runs[0], step=0).number == 2
    assert [home.folder for home in homes(storage)] == [str(runs[1].root), str(runs[0].root)]


def test_exports_of_earlier_releases_hold_no_config_and_the_checkpoints_is_taken(
    here: RunDir, s3: str, tmp_path: Path
) -> None:
    for entry in list(exported(s3).list()):
        if not entry.key.startswith("checkpoints/"):
            exported(s3).delete(entry.key)
    there = resume(f"{s3}/runs/one", tmp_path / "there")
    assert read_config(there.config, resolved=True) == read_config(here.config, resolved=True)
    assert homes(exported(s3))[-1].folder == str(there.root)


def test_a_local_folder_of_exports_is_continued_elsewhere_too_and_never_trained_in(
    here: RunDir, tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    here.config.write_text(here.config.read_text().replace("s3://", str(copies) + "#"))
    assert Exporter(here, str(copies)).close(patience=60) == set()
    there = resume(str(copies / "one"), tmp_path / "there")
    assert committed_steps(there) == [7]
    assert read_config(there.config).checkpoint.export_to == str(copies)
