"""Damaged, missing, stale and foreign files of a data set: none is trusted, each is refused, fetched or replaced."""

import hashlib
import shutil
import subprocess
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import (
    COUNT,
    FORMATS,
    collect,
    data,
    encoded,
    encoded_images,
    make,
    smooth_image,
    spoil,
    world,
    write_lmdb,
)

from cmscale.data import open_batches
from cmscale.data.formats.mds import MDSShards
from cmscale.data.samples import Samples
from cmscale.errors import UserError
from cmscale.io.storage import open_storage
from cmscale.runs.manifests import dataset_fingerprint, read_dataset_manifest


def test_mistakes_are_one_line(sets: dict[str, str], tmp_path: Path) -> None:
    def open_(path: str, size: int = 16, batch: int = 4, ranks: int = 1) -> None:
        open_batches(data(path), world(0, ranks), seed=0, global_batch_size=batch, image_size=size)

    with pytest.raises(UserError, match="no prepared data set there"):
        open_(str(tmp_path))
    with pytest.raises(UserError, match=r"holds images of 16 px, model.image_size is 32"):
        open_(sets["mds"], size=32)
    with pytest.raises(UserError, match="4 is not divisible by the number of ranks, 3"):
        open_(sets["mds"], ranks=3)
    with pytest.raises(UserError, match="not a URL that can be opened"):
        open_("pipe:cat /etc/passwd")


SPOILT = ("flipped", "cut at a member", "cut inside", "missing")


@pytest.mark.parametrize(
    ("place", "format", "how"),
    [*(("folder", format, how) for format in FORMATS for how in SPOILT), ("s3", "mds", "flipped")]
    + [("s3", "webdataset", how) for how in ("cut at a member", "missing")],
)
def test_a_damaged_shard_stops_the_run_naming_it_and_its_hash(source, tmp_path, s3, format, how, place, monkeypatch):
    monkeypatch.setattr("cmscale.data.cache.ATTEMPTS", 2)
    monkeypatch.setattr("cmscale.data.cache._wait", lambda _: None)
    url = make(source, str(tmp_path / "set") if place == "folder" else f"{s3}/set", format)
    shard = read_dataset_manifest(open_storage(url)).shards[2]
    spoil(url, shard.name, how)
    config = data(url, cache_dir=None if place == "folder" else str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match=shard.sha256) as caught:
        collect(config, num_ranks=1, batch=COUNT, start=0, steps=1)
    assert shard.name in str(caught.value)


@pytest.mark.parametrize(
    ("format", "how"),
    [("webdataset", how) for how in (*SPOILT, "stale")] + [("mds", how) for how in ("flipped", "missing", "stale")],
)
def test_a_bad_file_in_the_cache_is_fetched_again(source, sets, tmp_path, s3, format: str, how: str) -> None:
    url = make(source, f"{s3}/set", format)
    config = data(url, cache_dir=str(tmp_path))
    expected = collect(config, num_ranks=1, batch=COUNT, start=0, steps=1)
    manifest = read_dataset_manifest(open_storage(url))
    cached = tmp_path / manifest.fingerprint[:16]
    if how == "stale":
        (cached / manifest.shards[2].name).write_bytes((cached / manifest.shards[1].name).read_bytes())
    else:
        spoil(str(cached), manifest.shards[2].name, how)
    assert collect(config, num_ranks=1, batch=COUNT, start=0, steps=1) == expected


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "pipe:cat x", "s3://b/x", "a/../../b"])
def test_names_that_leave_the_data_set_are_refused(sets: dict[str, str], tmp_path: Path, name: str) -> None:
    manifest = read_dataset_manifest(open_storage(sets["mds"]))
    shards = (manifest.shards[0].model_copy(update={"name": name}), *manifest.shards[1:])
    fingerprint = dataset_fingerprint(format="mds", image_size=16, preprocess="adm", encoding="jpeg", shards=shards)
    changed = manifest.model_copy(update={"shards": shards, "fingerprint": fingerprint})
    open_storage(tmp_path).write("manifest.json", changed.to_bytes())
    with pytest.raises(UserError, match="leaves the data set"):
        Samples(str(tmp_path))


def test_an_index_of_other_shards_is_refused(source: Path, tmp_path: Path) -> None:
    url = make(source, str(tmp_path / "set"), "mds")
    manifest = read_dataset_manifest(open_storage(url))
    with pytest.raises(UserError, match="does not list the manifest's shards"):
        MDSShards(tmp_path / "set" / "index.json", manifest.shards[1:])


def test_undecodable_images_stop_the_run_or_are_replaced_within_the_budget(tmp_path: Path) -> None:
    """Only a data set that was published so can have them; the replacement is the same on any rank."""
    samples = encoded_images(8)
    source = write_lmdb(tmp_path / "lmdb", samples)
    make(source, str(tmp_path / "set"), "webdataset")
    keys = sorted(samples)
    bad = encoded(smooth_image(0, width=8, height=8), "jpeg")
    _publish_with(tmp_path / "set", index=1, image=bad)
    config = data(str(tmp_path / "set"), max_bad_samples=1)
    whole, _ = collect(config, num_ranks=1, batch=8, start=0, steps=2)
    assert [sample[0] for sample in whole.values()].count(keys[2]) == 4
    assert keys[1] not in {sample[0] for sample in whole.values()}
    assert collect(config, num_ranks=2, batch=8, start=0, steps=2)[0] == whole
    with pytest.raises(RuntimeError, match=f"{keys[1]}: is 8x8, not 16x16"):
        collect(data(str(tmp_path / "set")), num_ranks=1, batch=8, start=0, steps=2)


def _png_claiming(side: int) -> bytes:
    chunks = (b"IHDR" + side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0]), b"IDAT" + zlib.compress(b"\0"), b"IEND")
    written = ((len(c) - 4).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def _jpeg_claiming(side: int) -> bytes:
    data = bytearray(encoded(smooth_image(0, width=8, height=8), "jpeg"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = side.to_bytes(2, "big") * 2
    return bytes(data)


BOMBS = {"png": _png_claiming(10_000), "larger png": _png_claiming(60_000), "jpeg": _jpeg_claiming(60_000)}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_a_decompression_bomb_is_never_unpacked_and_counts_within_the_budget(tmp_path: Path, bomb: bytes) -> None:
    samples = encoded_images(8)
    make(write_lmdb(tmp_path / "lmdb", samples), str(tmp_path / "set"), "webdataset")
    keys = sorted(samples)
    _publish_with(tmp_path / "set", index=1, image=bomb)
    whole, _ = collect(data(str(tmp_path / "set"), max_bad_samples=1), num_ranks=1, batch=8, start=0, steps=2)
    assert [sample[0] for sample in whole.values()].count(keys[2]) == 4
    with pytest.raises(RuntimeError, match=f"{keys[1]}: (claims|Image size).*0000"):
        collect(data(str(tmp_path / "set")), num_ranks=1, batch=8, start=0, steps=2)


def test_reading_a_shard_runs_no_shell_and_rewrites_no_url(sets, monkeypatch) -> None:
    """webdataset's own opener applies GOPEN_REWRITE and runs a shell for URLs that begin with `pipe:`."""
    expected = collect(data(sets["webdataset"]), num_ranks=1, batch=COUNT, start=0, steps=1)
    monkeypatch.setenv("GOPEN_REWRITE", f"{sets['webdataset']}=pipe:echo;file:=pipe:")
    for name in ("Popen", "run", "call", "check_output"):
        monkeypatch.setattr(subprocess, name, lambda *_, **__: pytest.fail("a process was started"))
    monkeypatch.setattr("os.system", lambda *_: pytest.fail("a shell was started"))
    assert collect(data(sets["webdataset"]), num_ranks=1, batch=COUNT, start=0, steps=1) == expected


@pytest.mark.parametrize("format", FORMATS)
def test_bad_shards_are_replaced_alike_on_any_ranks_within_the_budget_and_named(sets, tmp_path, format: str) -> None:
    shutil.copytree(sets[format], tmp_path / "set")
    url = str(tmp_path / "set")
    shards = read_dataset_manifest(open_storage(url)).shards
    spoil(url, shards[1].name, "flipped")
    spoil(url, shards[5].name, "missing")
    keys = sorted(encoded_images(COUNT))
    lost = {*keys[4:8], *keys[20:23]}

    straight, _ = collect(data(sets[format]), num_ranks=1, batch=COUNT, start=0, steps=2)
    whole, _ = collect(data(url, max_bad_shards=2), num_ranks=1, batch=COUNT, start=0, steps=2)
    stand_ins = {key: keys[(keys.index(key) + 4) % 24] for key in lost}  # the last shard holds 3: it wraps to the first
    for position, (key, flip, pixels) in straight.items():
        if key in lost:
            assert whole[position][0] == stand_ins[key]
        else:
            assert whole[position] == (key, flip, pixels)
    for num_ranks, workers in ((2, 0), (1, 2)):
        config = data(url, max_bad_shards=2, workers=workers)
        assert collect(config, num_ranks=num_ranks, batch=4, start=0, steps=11)[0].items() <= whole.items()

    with closing(
        open_batches(data(url, max_bad_shards=2), world(), seed=4, global_batch_size=46, image_size=16)
    ) as some:
        next(some)
        assert set(some.bad_shards) == {shards[1].name, shards[5].name}
    with pytest.raises(RuntimeError, match=r"data.max_bad_shards allows 1"):
        collect(data(url, max_bad_shards=1), num_ranks=1, batch=COUNT, start=0, steps=2)


def test_a_data_set_of_bad_shards_alone_is_refused_whatever_the_budget(sets, tmp_path: Path) -> None:
    shutil.copytree(sets["mds"], tmp_path / "set")
    for shard in read_dataset_manifest(open_storage(tmp_path / "set")).shards:
        spoil(str(tmp_path / "set"), shard.name, "cut inside")
    with pytest.raises(RuntimeError, match="damaged"):
        collect(data(str(tmp_path / "set"), max_bad_shards=99), num_ranks=1, batch=4, start=0, steps=1)


def _publish_with(folder: Path, *, index: int, image: bytes) -> None:
    """Replaces an image in the first shard by one no longer than it, and publishes the outcome."""
    storage = open_storage(folder)
    manifest = read_dataset_manifest(storage)
    begin, end = map(int, np.load(folder / "index.npy")[index])
    name = manifest.shards[0].name
    content = bytearray(storage.read(name))
    room = end - begin - 512
    assert len(image) <= room
    content[begin + 512 : end] = image.ljust(room, b"\0")
    storage.write(name, bytes(content))
    digest = hashlib.sha256(content).hexdigest()
    shards = (manifest.shards[0].model_copy(update={"sha256": digest}), *manifest.shards[1:])
    fingerprint = dataset_fingerprint(
        format="webdataset", image_size=16, preprocess="adm", encoding="jpeg", shards=shards
    )
    storage.write(
        "manifest.json", manifest.model_copy(update={"shards": shards, "fingerprint": fingerprint}).to_bytes()
    )
