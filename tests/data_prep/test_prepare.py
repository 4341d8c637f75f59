"""data_prep/prepare.py: the same bytes in all circumstances, and the images that the source has."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import COUNT, FORMATS, encoded, encoded_images, smooth_image, tree, write_lmdb
from PIL import Image
from prepare_command import call

from cmscale.data import read_images
from cmscale.data.decode import decode
from cmscale.data.formats.mds import MDSFormat
from cmscale.io.storage import open_storage
from cmscale.runs.manifests import read_dataset_manifest
from data_prep import demo, verify
from data_prep.making.convert import crop
from data_prep.making.preparation import Preparation
from data_prep.making.progress import ProgressCounter

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("format", FORMATS)
def test_same_bytes_whatever_the_number_of_workers(source: Path, tmp_path: Path, format: str) -> None:
    assert call(f"lsun:{source}", tmp_path / "one", format=format) == 0
    assert call(f"lsun:{source.parent}", tmp_path / "three", "--workers", "3", format=format) == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "three")
    names = tree(tmp_path / "one").keys()
    assert {"manifest.json", "preparation.json"} < names
    assert len(names) == 3 + -(-COUNT // 4)


@pytest.mark.parametrize("format", FORMATS)
def test_every_image_comes_back_in_the_order_of_its_keys(source: Path, tmp_path: Path, format: str) -> None:
    assert call(f"lsun:{source}", tmp_path / "out", "--encoding", "png", format=format) == 0
    got = {key: image for image, key in read_images(str(tmp_path / "out"))}
    expected = encoded_images(COUNT)
    assert list(got) == sorted(expected)
    for key, image in got.items():
        np.testing.assert_array_equal(image, crop(decode(expected[key]), size=16, preprocess="adm"))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.long
def test_a_run_killed_at_any_shard_continues_to_the_same_bytes(source: Path, tmp_path: Path, format: str) -> None:
    assert call(f"lsun:{source}", tmp_path / "whole", format=format) == 0
    command = [sys.executable, "-c", _KILLED_AFTER, "3", "--source", f"lsun:{source}", "--format", format]
    command += [
        "--out",
        str(tmp_path / "killed"),
        "--image-size",
        "16",
        "--samples-per-shard",
        "4",
        "--workers",
        "1",
    ]
    died = subprocess.run(command, cwd=CHECKOUT, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, check=False)
    assert died.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "manifest.json").exists()
    finished = [p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("shard*")]
    assert len(finished) == 3
    assert call(f"lsun:{source}", tmp_path / "killed", format=format) == 0
    assert tree(tmp_path / "whole") == tree(tmp_path / "killed")
    kept = [p.stat().st_mtime_ns for p in sorted((tmp_path / "killed").glob("shard*"))[:3]]
    assert sorted(finished) == sorted(kept)


_KILLED_AFTER = """
import os, signal, sys
from data_prep import prepare
from data_prep.making.preparation import Preparation
from data_prep.making.progress import ProgressCounter
make = Preparation.make
def make_or_die(self, number, **kwargs):
    if number == int(sys.argv[1]):
        kwargs["tick"] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    return make(self, number, **kwargs)
Preparation.make = make_or_die
prepare.main(sys.argv[2:])
"""


def test_s3_holds_the_same_bytes_as_a_folder_and_no_notes(source: Path, tmp_path: Path, s3: str) -> None:
    assert call(f"lsun:{source}", tmp_path / "out") == 0
    assert call(f"lsun:{source}", f"{s3}/set") == 0
    storage = open_storage(f"{s3}/set")
    assert {entry.key: storage.read(entry.key) for entry in storage.list()} == tree(tmp_path / "out")


def test_an_interrupted_run_continues_on_s3(source: Path, tmp_path: Path, s3: str, monkeypatch) -> None:
    calls = []
    make = Preparation.make

    def make_three(self, number, **kwargs):
        calls.append(number)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return make(self, number, **kwargs)

    monkeypatch.setattr(Preparation, "make", make_three)
    assert call(f"lsun:{source}", f"{s3}/set") == 130
    assert call(f"lsun:{source}", f"{s3}/set") == 0
    assert calls == [0, 1, 2, 3, 3, 4, 5]
    assert call(f"lsun:{source}", tmp_path / "out") == 0
    storage = open_storage(f"{s3}/set")
    assert {entry.key: storage.read(entry.key) for entry in storage.list()} == tree(tmp_path / "out")


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_a_finished_shard_of_another_size_is_made_again(source, tmp_path, s3, monkeypatch, place: str) -> None:
    url = str(tmp_path / "out") if place == "folder" else f"{s3}/set"
    made = []
    make = Preparation.make

    def make_three(self, number, **kwargs):
        made.append(number)
        if len(made) == 4:
            raise KeyboardInterrupt
        return make(self, number, **kwargs)

    monkeypatch.setattr(Preparation, "make", make_three)
    assert call(f"lsun:{source}", url) == 130
    storage = open_storage(url)
    storage.write("shard-00000.tar", storage.read("shard-00000.tar")[:-512])
    storage.write("shard-00001.tar", storage.read("shard-00001.tar") + bytes(512))
    assert call(f"lsun:{source}", url) == 0
    assert made == [0, 1, 2, 3, 0, 1, 3, 4, 5]
    assert call(f"lsun:{source}", tmp_path / "whole") == 0
    assert {entry.key: storage.read(entry.key) for entry in storage.list()} == tree(tmp_path / "whole")


# What the version before formats were files of their own wrote for the same encoded images: the bytes of every shard
# and of the index, and so the fingerprint that runs have recorded.
EARLIER = {
    "mds": {
        "fingerprint": "56a4077bc086cda4ee41a6583fcc56f1d9567e37c6a74932a30ff3d59731a373",
        "index.json": "279e9f680721fc17f8dc09546fa322c04a0db4a26a31e54790f2af06b10c4a91",
    },
    "webdataset": {
        "fingerprint": "49d2b15ff44ee69dec231782fb980d31c316b7c1c9e5536a1e9b1e47b787ba7c",
        "index.npy": "46feb3e839fd282079f5da368abb2c862c3ae200aa36bb0cc416adeaca3b8ae9",
    },
}


@pytest.mark.parametrize("format", FORMATS)
def test_equal_samples_give_the_bytes_of_earlier_versions(tmp_path: Path, monkeypatch, format: str) -> None:
    monkeypatch.setattr("data_prep.making.shards.convert", lambda data, **_: data)  # encoders may change, formats not
    (tmp_path / "in" / "sub.folder").mkdir(parents=True)
    for n in range(7):
        folder = tmp_path / "in" / ("sub.folder" if n % 2 else ".")
        (folder / f"ä {n}.png").write_bytes(bytes(i % 256 for i in range(n, n + 40 + 99 * n)))
    more = ("--samples-per-shard", "3", "--encoding", "jpeg")
    assert call(f"folder:{tmp_path}/in", tmp_path / "out", *more, format=format) == 0
    manifest = read_dataset_manifest(open_storage(tmp_path / "out"))
    index = next(entry for entry in manifest.files if entry.name.startswith("index"))
    assert {"fingerprint": manifest.fingerprint, index.name: index.sha256} == EARLIER[format]
    assert verify.main([str(tmp_path / "out")]) == 0


def test_folder_zip_and_tars_give_the_images_of_the_lmdb(source: Path, tmp_path: Path) -> None:
    # The suffix does not determine the format: the bytes do.
    samples = {f"{key}.png": data for key, data in encoded_images(5).items()}
    folder = tmp_path / "folder"
    folder.mkdir()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name, data in samples.items():
            (folder / name).write_bytes(data)
            archive.writestr(name, data)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for name in samples:
            tar.add(folder / name, arcname=name)
    small = write_lmdb(tmp_path / "lmdb", encoded_images(5))
    for source in (
        f"lsun:{small}",
        f"folder:{folder}",
        f"zip:{tmp_path}/images.zip",
        f"tars:{tmp_path}/tars",
    ):
        assert call(source, tmp_path / source[:3]) == 0
    images = {kind: [image for image, _ in read_images(str(tmp_path / kind))] for kind in ("lsu", "fol", "zip", "tar")}
    for kind in images:
        np.testing.assert_array_equal(images[kind], images["lsu"])


def test_adm_boxes_then_crops_and_edm_crops_then_lanczos() -> None:
    image = smooth_image(3, width=96, height=64)
    boxed = Image.fromarray(image).resize((48, 32), Image.Resampling.BOX).crop((8, 0, 40, 32))
    np.testing.assert_array_equal(crop(image, size=32, preprocess="adm"), boxed)
    square = Image.fromarray(image).crop((16, 0, 80, 64)).resize((32, 32), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(crop(image, size=32, preprocess="edm"), square)


@pytest.mark.parametrize("encoding", ["png", "webp"])
def test_lossless_encodings_keep_every_pixel(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "in").mkdir()
    image = smooth_image(1, width=16, height=16)
    (tmp_path / "in" / "a.b.png").write_bytes(encoded(image, "png"))
    assert call(f"folder:{tmp_path}/in", tmp_path / "out", "--encoding", encoding) == 0
    (found, key) = next(read_images(str(tmp_path / "out")))
    assert key == "a.b.png"
    np.testing.assert_array_equal(found, image)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_time_left_counts_images_and_no_imports(source: Path, tmp_path: Path, monkeypatch, workers: str) -> None:
    happened: list[str] = []
    count = ProgressCounter.__init__
    monkeypatch.setattr(MDSFormat, "preload", lambda _: happened.append("import"))
    monkeypatch.setattr(ProgressCounter, "__init__", lambda *a, **k: happened.append("count") or count(*a, **k))
    assert call(f"lsun:{source}", tmp_path / "out", "--workers", workers, format="mds") == 0
    assert happened == ["count", "import", "count"]  # comparing, which finds nothing to compare, and preparing


_SLOW = r"""
import time
from cmscale.commands.ending import end_early_interrupts, leave
end_early_interrupts()
from data_prep import prepare
from data_prep.making import shards
convert = shards.convert
shards.convert = lambda *a, **k: print("converts\n", end="", flush=True) or time.sleep(100) or convert(*a, **k)
leave(prepare.main())
"""


@pytest.mark.long
def test_ctrl_c_does_not_wait_for_the_shards_that_are_being_made(source: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        _SLOW,
        "--source",
        f"lsun:{source}",
        "--format",
        "webdataset",
        "--image-size",
        "16",
    ]
    command += ["--samples-per-shard", "4", "--workers", "2", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        start_new_session=True,
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == [b"converts\n"] * 2
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(timeout=60) == 130
    assert sorted(path.name for path in (tmp_path / "out" / ".progress").rglob("*.tar")) == []
    assert list((tmp_path / "out" / ".progress" / "scratch").iterdir()) == []


def test_a_worker_that_is_killed_while_it_counts_holds_up_nobody() -> None:
    counter = ProgressCounter("preparing", total=2)
    worker = multiprocessing.get_context("fork").Process(
        target=lambda: counter._count.get_lock().acquire() and os.kill(os.getpid(), signal.SIGKILL)
    )
    worker.start()
    worker.join()
    shown = threading.Thread(target=counter.show, daemon=True)
    shown.start()
    shown.join(timeout=20)
    assert not shown.is_alive()


def test_a_demo_that_cannot_be_written_leaves_the_folder_empty(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo, "_LARGEST_BYTES", 1 << 16)
    assert demo.main([str(tmp_path / "new"), "--view", "cat", "--samples", "99"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/new: can't be written (")
    assert list((tmp_path / "new").iterdir()) == []
