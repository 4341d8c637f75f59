"""Which checkpoints of a run are committed: the same answer for a local folder and for any other storage."""

from pathlib import Path

import pytest

from cmscale.io.local import LocalStorage
from cmscale.io.protocol import Entry
from cmscale.runs.checkpoints import committed_steps, named_steps
from cmscale.runs.folder import RunDir


class Remote(LocalStorage):
    """Local files without local paths, as on a remote storage."""

    def sub(self, prefix: str) -> "Remote":
        return Remote(self.root / prefix)

    def local_path(self, key: str) -> None:
        return None


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Two committed checkpoints, one without manifest, and much that is none."""
    run = RunDir(tmp_path / "run")
    for name in (
        "step-000000020/manifest.json",
        "step-000000020/rank-0000-of-0001.safetensors",
        "step-000000003/manifest.json",
        "step-000000100/rank-0000-of-0001.safetensors",
        ".step-000000200.start-1.save-1/manifest.json",
        "damaged-step-000000300/manifest.json",
        "step-000000400.old/manifest.json",
        "step-500/manifest.json",
        "step-000000600",
        "step-000000700/copy/manifest.json",
        "notes.txt",
    ):
        path = run.checkpoints / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (run.checkpoints / "step-latest").symlink_to("step-000000020")
    return run


def test_committed_are_the_folders_named_as_steps_that_have_a_manifest(run: RunDir) -> None:
    assert committed_steps(run) == [3, 20]


def test_every_way_of_naming_a_run_gives_the_same_answer(run: RunDir) -> None:
    ways = [run.root, str(run.root), f"file://{run.root}", LocalStorage(run.root), Remote(run.root)]
    assert [committed_steps(way) for way in ways] == [[3, 20]] * 5


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert committed_steps(RunDir(tmp_path / "none")) == []
    assert committed_steps(Remote(tmp_path / "none")) == []


def test_a_resume_looks_at_a_checkpoint_that_lost_its_manifest(run: RunDir) -> None:
    assert named_steps(run) == [3, 20, 100, 700]


def test_entries_of_another_storage_are_not_needed_in_order(run: RunDir) -> None:
    class Unordered(Remote):
        def sub(self, prefix: str) -> "Unordered":
            return Unordered(self.root / prefix)

        def list(self, prefix: str = ""):
            entries: list[Entry] = list(super().list(prefix))
            yield from reversed(entries)

    assert committed_steps(Unordered(run.root)) == [3, 20]
