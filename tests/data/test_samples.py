"""Samples by id: open files are bounded, and what replaces a sample stays in its bounds."""

import io
from pathlib import Path

import pytest
from data_fixtures import COUNT, FORMATS

from cmscale.data import read_images
from cmscale.data.samples import Samples
from cmscale.errors import NoSpace, UserError


@pytest.mark.parametrize("format", FORMATS)
def test_open_files_are_a_small_part_of_the_cache_and_the_least_recently_used_are_closed(
    sets: dict[str, str], tmp_path: Path, format: str
) -> None:
    largest = max(shard.size for shard in Samples(sets[format]).manifest.shards)
    samples = Samples(sets[format], cache_dir=str(tmp_path), cache_gb=8 * largest * 2 / 1e9)
    whole = Samples(sets[format])
    for shard in samples.manifest.shards:
        samples.cache.path(shard.name)
    opened = {}
    for index in (0, 4, 8, 4, 12):
        assert samples.read(index) == whole.read(index)
        file = samples._files[samples.shard_of(index)]
        assert opened.setdefault(index, file) is file
    assert list(samples._files) == [2, 1, 3]
    closed = samples._files[2]
    samples.read(16)
    assert list(samples._files) == [1, 3, 4]
    assert closed.closed
    assert not samples._files[1].closed


def test_a_file_that_is_evicted_before_every_opening_is_an_error_and_not_an_endless_loop(sets, tmp_path, monkeypatch):
    samples = Samples(sets["mds"], cache_dir=str(tmp_path))
    path = samples.cache.path
    asked = []

    def evicted(name: str) -> Path:
        asked.append(name)
        found = path(name)
        if len(asked) < allowed:
            found.unlink()
        return found

    monkeypatch.setattr(samples.cache, "path", evicted)
    allowed = 10
    samples.read(0)
    assert len(asked) == 10
    asked.clear()
    allowed = 99
    with pytest.raises(RuntimeError, match=r"evicted 10 times .*data.cache_gb"):
        samples.read(4)
    assert len(asked) == 10


def test_every_sample_has_a_replacement_in_its_own_shard_and_one_in_the_next(sets: dict[str, str]) -> None:
    samples = Samples(sets["mds"])
    sizes = [shard.count for shard in samples.manifest.shards]
    assert sizes == [4, 4, 4, 4, 4, 3]
    assert len(samples) == COUNT
    assert [samples.shard_of(index) for index in (0, 3, 4, 22)] == [0, 0, 1, 5]
    assert [samples.after(index) for index in (0, 3, 19, 20, 22)] == [1, 0, 16, 21, 20]
    assert [samples.in_next_shard(index) for index in (0, 3, 18, 19, 20, 22)] == [4, 7, 22, 20, 0, 2]


@pytest.mark.parametrize("index", [-1, COUNT])
def test_an_id_that_does_not_exist_is_refused(sets: dict[str, str], index: int) -> None:
    with pytest.raises(UserError, match=f"no sample {index}, there are {COUNT}"):
        list(read_images(sets["mds"], indices=[0, COUNT - 1, index]))


def test_a_manifest_without_an_index_is_one_line(sets: dict[str, str], tmp_path: Path) -> None:
    text = (Path(sets["mds"]) / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"index.json"', '"other.json"'))
    with pytest.raises(UserError, match=r"lists no index.json; run data_prep/prepare.py again"):
        Samples(str(tmp_path))


def test_on_a_full_disk_files_that_are_open_give_their_space_back(
    sets: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = Samples(sets["mds"], cache_dir=str(tmp_path))
    first = samples.read(0)
    held = samples._files[0]
    opened = samples.cache.open

    def only_when_nothing_is_held(name: str) -> io.FileIO:
        if not held.closed:
            raise NoSpace("no space left on the device")
        return opened(name)

    monkeypatch.setattr(samples.cache, "open", only_when_nothing_is_held)
    assert samples.read(4)[0] != first[0]
    assert samples.read(0) == first
