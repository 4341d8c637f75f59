"""A device in the place of a run's document is a damaged document: it is never read to its end, which it has not."""

from pathlib import Path

from cmscale.runs.folder import RunDir
from cmscale.runs.starts import read_starts


def test_a_device_in_the_place_of_the_provenance_is_set_aside(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.provenance.symlink_to("/dev/zero")
    assert read_starts(run) == []
    assert not run.provenance.is_symlink()
