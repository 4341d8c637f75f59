"""data_prep/prepare.py continues only what was made of the same images, and never writes over other files."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from data_fixtures import COUNT, encoded, encoded_images, smooth_image, tree, write_lmdb
from PIL import Image
from prepare_command import call, refused

from cmscale.data import read_images
from cmscale.io.s3 import S3Storage
from cmscale.io.storage import open_storage
from cmscale.runs.manifests import read_dataset_manifest
from data_prep import verify
from data_prep.making.preparation import Preparation


def _folder(root: Path, count: int = 10) -> Path:
    root.mkdir()
    for number in range(count):
        (root / f"{number:02d}.png").write_bytes(encoded(smooth_image(number), "png"))
    return root


def _stop_after(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    make = Preparation.make

    def make_or_stop(self, shard, **how):
        if shard == number:
            raise KeyboardInterrupt
        return make(self, shard, **how)

    monkeypatch.setattr(Preparation, "make", make_or_stop)


FOREIGN = {
    "a streaming set": {"index.json": b"{}", "shard.00000.mds": b"x"},
    "somebody's tars": {"00000.tar": b"x", "shard-00000.tar": b"x"},
    "a photograph in a sub-folder": {"holiday/beach.jpg": b"x"},
    "a damaged plan": {".progress/plan.json": b"{"},
    "another manifest": {"manifest.json": b'{"name": "an extension of a browser"}'},
}


@pytest.mark.parametrize("place", ["folder", "s3"])
@pytest.mark.parametrize("what", FOREIGN)
def test_files_of_somebody_else_are_never_touched(source: Path, tmp_path, s3, capsys, place: str, what: str) -> None:
    url = str(tmp_path / "out") if place == "folder" else f"{s3}/out"
    storage = open_storage(url)
    for name, data in FOREIGN[what].items():
        storage.write(name, data)
    for format in ("mds", "webdataset"):
        assert "/out" in refused(capsys, call(f"lsun:{source}", url, format=format))
    assert {entry.key: storage.read(entry.key) for entry in storage.list()} == FOREIGN[what]


def test_a_folder_that_a_console_has_made_on_s3_is_empty(source: Path, s3: str) -> None:
    folder = S3Storage.from_url(f"{s3}/out")
    folder.client.put_object(Bucket=folder.bucket, Key=f"{folder.prefix}/", Body=b"")
    assert list(folder.list()) == []
    assert call(f"lsun:{source}", f"{s3}/out") == 0
    assert verify.main([f"{s3}/out"]) == 0


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_a_command_that_waits_for_another_finds_what_that_has_published(
    tmp_path: Path, s3: str, capsys, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    root, url = _folder(tmp_path / "in"), str(tmp_path / "out") if place == "folder" else f"{s3}/out"
    (root / "03.png").write_bytes(b"no picture")
    exclusive, others = Preparation.exclusive, ["--max-bad 1"]

    def after_another(self):
        if others:  # of the first command, which would begin anew, refuse the picture, and remove all shards
            assert call(f"folder:{root}", url, *others.pop().split()) == 0
        return exclusive(self)

    monkeypatch.setattr(Preparation, "exclusive", after_another)
    assert call(f"folder:{root}", url) == 0
    assert "already prepared" in capsys.readouterr().out
    assert verify.main([url]) == 0
    assert not [entry for entry in open_storage(url).list() if entry.key.startswith(".progress")]


def test_a_place_inside_the_source_or_the_source_itself_is_refused(tmp_path: Path, capsys) -> None:
    root = _folder(tmp_path / "in")
    before = tree(root)
    assert "contains files of something else" in refused(capsys, call(f"folder:{root}", root))
    assert "lies inside the source" in refused(capsys, call(f"folder:{root}", root / "out"))
    assert tree(root) == before


def test_hidden_files_and_empty_folders_do_not_matter_and_a_refusal_leaves_the_place_usable(
    source: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out" / "empty").mkdir(parents=True)
    (tmp_path / "out" / ".DS_Store").write_bytes(b"x")
    write = open_storage(tmp_path).__class__.write

    def full(self, key, data):
        if key.endswith("000000.json"):
            from cmscale.errors import UserError

            raise UserError("no space left")
        return write(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr("cmscale.io.local.LocalStorage.write", full)
        assert "no space left" in refused(capsys, call(f"lsun:{source}", tmp_path / "out"))
    assert call(f"lsun:{source}", tmp_path / "out") == 0


def test_a_changed_image_under_the_same_name_is_not_already_prepared(tmp_path: Path, capsys) -> None:
    root = _folder(tmp_path / "in")
    assert call(f"folder:{root}", tmp_path / "out") == 0
    assert call(f"folder:{root}", tmp_path / "out") == 0
    assert "already prepared" in capsys.readouterr().out
    image = root / "05.png"
    old, times = image.read_bytes(), image.stat()
    image.write_bytes(encoded(smooth_image(99), "png"))
    said = refused(capsys, call(f"folder:{root}", tmp_path / "out"))
    assert "images have changed since it was made: of 1 of 3 shards, first among 04.png to 07.png" in said
    image.write_bytes(old)  # another time, the same image
    assert call(f"folder:{root}", tmp_path / "out") == 0
    changed = bytearray(old)
    changed[-20] ^= 1
    image.write_bytes(changed)  # the same size and time, another image: only --check-source sees it
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert call(f"folder:{root}", tmp_path / "out") == 0
    assert "images have changed" in refused(capsys, call(f"folder:{root}", tmp_path / "out", "--check-source"))


def test_every_kind_of_source_notices_a_changed_image_and_may_move(tmp_path: Path, capsys) -> None:
    import tarfile
    import zipfile

    def build(root: Path, numbers: list[int]) -> dict[str, str]:
        samples = {f"{n:02d}.png": encoded(smooth_image(number), "png") for n, number in enumerate(numbers)}
        root.mkdir()
        with zipfile.ZipFile(root / "x.zip", "w") as archive:
            for name, data in samples.items():
                archive.writestr(name, data)
        (root / "files").mkdir()
        for name, data in samples.items():
            (root / "files" / name).write_bytes(data)
        (root / "tars").mkdir()
        with tarfile.open(root / "tars" / "0.tar", "w") as tar:
            for name in samples:
                tar.add(root / "files" / name, arcname=name)
        write_lmdb(root / "lmdb", samples)
        kinds = {"zip": "x.zip", "folder": "files", "tars": "tars", "lsun": "lmdb"}
        return {kind: f"{kind}:{root / name}" for kind, name in kinds.items()}

    first = build(tmp_path / "first", [0, 1, 2])
    shutil.copytree(tmp_path / "first", tmp_path / "moved", copy_function=shutil.copy)  # without times
    other = build(tmp_path / "other", [0, 1, 3])
    for kind, source in first.items():
        out = tmp_path / f"out-{kind}"
        assert call(source, out) == 0
        fingerprint = read_dataset_manifest(open_storage(out)).fingerprint
        capsys.readouterr()
        for more in ((), ("--check-source",)):
            assert call(source.replace("/first/", "/moved/"), out, *more) == 0
            assert "already prepared" in capsys.readouterr().out
        assert "images have changed" in refused(capsys, call(other[kind], out))
        assert read_dataset_manifest(open_storage(out)).fingerprint == fingerprint


def test_an_interrupted_run_makes_the_shards_of_changed_images_again(tmp_path: Path, monkeypatch, capsys) -> None:
    root = _folder(tmp_path / "in", 12)
    with monkeypatch.context() as patch:
        _stop_after(patch, 2)
        assert call(f"folder:{root}", tmp_path / "out") == 130
    (root / "01.png").write_bytes(encoded(smooth_image(50), "png"))
    shutil.move(root, tmp_path / "moved")
    capsys.readouterr()
    assert call(f"folder:{tmp_path}/moved", tmp_path / "out") == 0
    assert "continuing: 1 of 3 shards are finished" in capsys.readouterr().out
    assert call(f"folder:{tmp_path}/moved", tmp_path / "fresh") == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_a_repaired_image_is_used_by_the_command_that_continues(tmp_path: Path, capsys) -> None:
    root = _folder(tmp_path / "in", 8)
    for name in ("01.png", "05.png"):
        (root / name).write_bytes(b"no image")
    refused(capsys, call(f"folder:{root}", tmp_path / "out", "--max-bad", "1"))
    for name in ("01.png", "05.png"):
        (root / name).write_bytes(encoded(smooth_image(3), "png"))
    assert call(f"folder:{root}", tmp_path / "out") == 0
    assert "8 images in 2 shards, 0 skipped" in capsys.readouterr().out


def _make_older(out: Path, *, published: bool) -> None:
    """Turns what this version wrote into what the version before EXIF rules and hashes of the images wrote."""
    for path in [*out.glob(".progress/*.json"), out / "preparation.json", out / "manifest.json"]:
        if not path.exists():
            continue
        document = json.loads(path.read_text())
        for name in ("exif", "notes", "left_out", "made_of"):
            document.pop(name, None)
        if path.name == "preparation.json":
            document.pop("shards")
        plan = document.get("plan", document)
        plan.get("settings", {}).pop("exif", None)
        path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    assert (out / "manifest.json").exists() == published


def test_older_data_sets_are_read_and_older_interrupted_ones_continue_as_they_were_begun(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    root = _folder(tmp_path / "in", 12)
    begun = ("--encoding", "jpeg", "--preprocess", "edm", "--exif", "ignore")
    assert call(f"folder:{root}", tmp_path / "whole", *begun) == 0
    _make_older(tmp_path / "whole", published=True)
    assert len(list(read_images(str(tmp_path / "whole")))) == 12
    assert call(f"folder:{root}", tmp_path / "whole", "--preprocess", "edm") == 0
    assert "already prepared" in capsys.readouterr().out
    refusal = refused(capsys, call(f"folder:{root}", tmp_path / "whole", "--preprocess", "edm", "--check-source"))
    assert "an earlier version made it" in refusal
    with monkeypatch.context() as patch:
        _stop_after(patch, 2)
        assert call(f"folder:{root}", tmp_path / "out", *begun) == 130
    _make_older(tmp_path / "out", published=False)
    assert call(f"folder:{root}", tmp_path / "out", "--preprocess", "edm") == 0  # defaults are those it was begun with
    assert "continuing: 2 of 3 shards" in capsys.readouterr().out
    manifest = read_dataset_manifest(open_storage(tmp_path / "out"))
    assert (manifest.encoding, manifest.exif) == ("jpeg", "ignore")
    assert manifest.fingerprint == read_dataset_manifest(open_storage(tmp_path / "whole")).fingerprint
    other = refused(capsys, call(f"folder:{root}", tmp_path / "out", "--preprocess", "edm", "--encoding", "png"))
    assert "made with --encoding jpeg, not png" in other


def test_what_an_earlier_release_made_without_gifs_is_still_that_data_set(tmp_path: Path, capsys) -> None:
    root, out = _folder(tmp_path / "in", 12), tmp_path / "out"
    assert call(f"folder:{root}", out, "--encoding", "jpeg") == 0
    Image.fromarray(smooth_image(99)).save(root / "05b.gif")
    assert "made of 12 images, not 13" in refused(capsys, call(f"folder:{root}", out, "--encoding", "jpeg"))
    _make_older(out, published=True)
    _record_again(out, "preparation.json")
    assert call(f"folder:{root}", out, "--encoding", "jpeg") == 0
    assert "already prepared" in capsys.readouterr().out
    shard = out / "shard-00001.tar"
    before = shard.read_bytes()
    shard.write_bytes(b"bad")
    assert verify.main([str(out), "--repair"]) == 0
    assert shard.read_bytes() == before
    (root / "06.png").unlink()
    shard.write_bytes(b"bad")
    assert "not the images" in refused(capsys, verify.main([str(out), "--repair"]))


def _record_again(out: Path, name: str) -> None:
    """Writes a changed file's size and hash into the manifest."""
    manifest, content = json.loads((out / "manifest.json").read_text()), (out / name).read_bytes()
    (entry,) = (entry for entry in manifest["files"] if entry["name"] == name)
    entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (out / "manifest.json").write_text(json.dumps(manifest))


def test_exif_is_applied_or_ignored_as_the_recipe_s_tool_does_and_recorded(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    image = smooth_image(0, width=32, height=32)
    Image.fromarray(image).save(tmp_path / "in" / "a.png", exif=exif)
    for recipe, more, expected in (
        ("adm", (), "ignore"),
        ("edm", (), "apply"),
        ("adm", ("--exif", "apply"), "apply"),
        ("edm", ("--exif", "ignore"), "ignore"),
    ):
        out = tmp_path / f"{recipe}-{len(more)}"
        assert call(f"folder:{tmp_path}/in", out, "--preprocess", recipe, *more, size=32) == 0
        assert read_dataset_manifest(open_storage(out)).exif == expected
        (found, _) = next(read_images(str(out)))
        turned = image.swapaxes(0, 1)[:, ::-1]  # 6: the camera was turned to the left
        assert (found == (turned if expected == "apply" else image)).all()


@pytest.mark.parametrize("format", ["mds", "webdataset"])
def test_keep_stores_what_needs_no_resizing_byte_for_byte(tmp_path: Path, capsys, format: str) -> None:
    import numpy as np
    from PIL import Image

    from cmscale.data.decode import decode
    from cmscale.data.samples import Samples

    root = tmp_path / "in"
    root.mkdir()
    files = {
        "0-square.jpg": encoded(smooth_image(0, width=16, height=16), "jpeg"),
        "1-wide.webp": encoded(smooth_image(1, width=25, height=16), "webp"),
        "2-tall.png": encoded(smooth_image(2, width=16, height=21), "png"),
        "3-large.jpg": encoded(smooth_image(3, width=40, height=32), "jpeg"),
        "4-bitmap.bmp": encoded(smooth_image(4, width=16, height=16), "bmp"),
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    Image.fromarray(np.full((16, 16, 4), 100, np.uint8)).save(root / "5-clear.png")
    assert call(f"folder:{root}", tmp_path / "out", "--encoding", "keep", format=format) == 0
    assert "stored byte for byte: 3 images" in capsys.readouterr().out
    samples = Samples(str(tmp_path / "out"))
    stored = dict(samples.read(index) for index in range(len(samples)))
    assert [name for name, data in files.items() if stored[name] == data] == [
        "0-square.jpg",
        "1-wide.webp",
        "2-tall.png",
    ]
    assert call(f"folder:{root}", tmp_path / "png", "--encoding", "png", format=format) == 0
    exact = {key: image for image, key in read_images(str(tmp_path / "png"))}
    for image, key in read_images(str(tmp_path / "out")):
        np.testing.assert_array_equal(image, exact[key])
    assert decode(stored["1-wide.webp"]).shape == (16, 25, 3)
    from data_fixtures import collect, data

    whole, _ = collect(data(str(tmp_path / "out"), flip=False), num_ranks=1, batch=6, start=0, steps=1)
    for key, _, pixels in whole.values():
        assert pixels == exact[key].transpose(2, 0, 1).tobytes()
    assert verify.main([str(tmp_path / "out")]) == 0


def test_a_prepared_set_of_jpegs_that_is_brought_in_again_loses_nothing(source: Path, tmp_path: Path) -> None:
    import numpy as np

    assert call(f"lsun:{source}", tmp_path / "jpeg", "--encoding", "jpeg") == 0
    shutil.copytree(tmp_path / "jpeg", tmp_path / "tars", ignore=shutil.ignore_patterns("*.json", "*.npy"))
    before = [image for image, _ in read_images(str(tmp_path / "jpeg"))]
    for encoding in (("--encoding", "keep"), ()):
        out = tmp_path / f"again{len(encoding)}"
        assert call(f"tars:{tmp_path}/tars", out, *encoding) == 0
        after = [image for image, _ in read_images(str(out))]
        assert len(after) == COUNT
        np.testing.assert_array_equal(after, before)


def test_pictures_that_need_a_rule_are_counted_in_what_is_printed_and_stored(tmp_path: Path, capsys) -> None:
    import numpy as np
    from PIL import Image

    root = _folder(tmp_path / "in", 2)
    Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(root / "deep.png")
    Image.fromarray(np.zeros((20, 20, 4), np.uint8)).save(root / "clear.png")
    assert call(f"folder:{root}", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "transparency, composited on white: 1 images" in said
    assert "more than 8 bits per channel, reduced to 8: 1 images" in said
    found = {key: image for image, key in read_images(str(tmp_path / "out"))}
    assert (found["deep.png"] == 40_000 // 256).all()
    assert (found["clear.png"] == 255).all()
    assert len(json.loads((tmp_path / "out" / "preparation.json").read_text())["notes"]) == 2


def test_the_default_is_without_loss(tmp_path: Path) -> None:
    assert encoded_images(1)
    root = _folder(tmp_path / "in", 1)
    assert call(f"folder:{root}", tmp_path / "out") == 0
    assert read_dataset_manifest(open_storage(tmp_path / "out")).encoding == "png"
