"""Every place that an option names: what is accepted, what is refused in one line, and that a check leaves nothing."""

import hashlib
import os
from pathlib import Path

import pytest

from cmscale.errors import UserError
from cmscale.io.fetch import local_file
from cmscale.io.place import Place, split_hash, without_folders
from cmscale.io.storage import open_storage


def test_a_place_is_a_local_path_without_tilde_or_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert Place("~/x") == "/home/ada/x"
    assert Place("~") == "/home/ada"
    assert Place("./~/x") == "./~/x"
    assert Place("~root/x") == f"{Path('~root').expanduser()}/x"
    assert Place("file:///data/x y") == Place("file://localhost/data/x y") == "/data/x y"
    assert Place("S3://bucket/Key") == "s3://bucket/Key"
    assert Place("s3://bucket/a/") == "s3://bucket/a/"
    assert Place("s3://bucket/a..b/.c") == "s3://bucket/a..b/.c"
    assert Place("12:30.npz") == "12:30.npz"
    assert (Place("s3://b/k").is_remote, Place("b/k").is_remote) == (True, False)
    assert Place("x").absolute() == str(Path.cwd() / "x")
    assert Place("s3://b/k").absolute() == "s3://b/k"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "an empty path"),
        (" ", "an empty path"),
        ("gs://bucket/x", "gs:// is not supported"),
        ("https://host/x.npz", "https:// is not supported"),
        ("s3:/bucket/x", "a URL begins with s3://"),
        ("lsun:folder", "write ./lsun:folder"),
        ("file://host/x", "file:///ABSOLUTE/PATH"),
        ("~nobody-of-this-name/x", "there is no user 'nobody-of-this-name'"),
        ("s3://b/a\nb", r"got 's3://b/a\\nb'; line breaks"),
        ("s3://b/a\tb", "line breaks and control characters"),
        ("s3://", "needs a bucket"),
        ("s3://b/a//b.npz", "single slashes; write s3://b/a/b.npz"),
        ("s3://b/a/../c", r"has no part \.\.;"),
        ("s3://b/./c", r"has no part \.;"),
    ],
)
def test_what_is_no_place_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Place(text)


def test_slashes_around_a_prefix_do_not_count() -> None:
    urls = ("s3://b/a/c", "s3://b//a/c", "s3://b/a/c/", "s3://b/a/c//")
    assert {open_storage(Place(url)).url for url in urls} == {"s3://b/a/c"}
    assert open_storage(Place("s3://b//")).url == "s3://b"


def test_a_url_is_refused_where_a_local_path_is_needed() -> None:
    with pytest.raises(UserError, match="s3://b/runs: the folder of runs must be on this machine's file systems"):
        Place("s3://b/runs").local("the folder of runs")


def test_an_output_is_checked_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe.npz")
    before = sorted(os.walk(tmp_path))
    Place(tmp_path / "new" / "deep" / "x.npz").check_output(".npz")
    Place(tmp_path / "file").check_output()
    Place(tmp_path / "X.NPZ").check_output(".npz")
    for path, words in (
        ("x.png", "must end in .npz"),
        ("folder", "is a folder"),
        ("new/", "is a folder"),
        ("file/x.npz", "a file is where a folder is needed"),
        ("link/x.npz", "is a link to nothing"),
        ("pipe.npz", "is no regular file"),
        (f"{'n' * 254}.npz", "can't be written"),
    ):
        with pytest.raises(UserError, match=words):
            Place(f"{tmp_path}/{path}").check_output(*(() if path in ("folder", "new/") else (".npz",)))
    with pytest.raises(UserError):
        Place("/proc/x.npz").check_output(".npz")  # a file system that nobody may write, not even root
    assert sorted(os.walk(tmp_path)) == before
    with pytest.raises(UserError, match="is a folder"):
        Place(tmp_path / "folder").check_output()


def test_an_output_on_s3_is_checked_and_written(s3: str) -> None:
    from cmscale.io.storage import open_storage

    place = Place(f"{s3}/deep/x.npz")
    place.check_output(".npz")
    assert list(open_storage(s3).list()) == []
    assert open_storage(s3).abort_uploads(lambda key: True) == 0
    with pytest.raises(UserError, match="no bucket"):
        Place("s3://no-such-bucket/x.npz").check_output(".npz")
    with pytest.raises(UserError, match="names no file"):
        Place(s3).check_output()
    place.write(b"samples")
    assert open_storage(s3).read("deep/x.npz") == b"samples"


def test_a_file_is_the_same_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "b").symlink_to("a")
    assert Place(tmp_path / "a").is_same(Place(f"{tmp_path}/./b"))
    assert not Place(tmp_path / "a").is_same(Place("s3://b/a"))


def test_only_a_hash_at_the_end_is_no_part_of_a_name(tmp_path: Path) -> None:
    assert split_hash("s3://b/x.pt#sha256=ab") == ("s3://b/x.pt", "ab")
    assert split_hash("photo #1.png") == ("photo #1.png", None)
    file = tmp_path / "photo #1.png"
    file.write_bytes(b"x")
    digest = hashlib.sha256(b"x").hexdigest()
    for url in (file, f"{file}#sha256={digest}", f"{file}#sha256={digest.upper()}"):
        assert local_file(str(url)) == file
    for wrong, words in ((digest[::-1], "it is another file"), ("12", "64 hexadecimal digits")):
        with pytest.raises(UserError, match=words):
            local_file(f"{file}#sha256={wrong}")


def test_a_file_on_s3_may_have_a_number_sign_in_its_name(s3: str) -> None:
    Place(f"{s3}/photo #1.png").write(b"x")
    assert local_file(f"{s3}/photo #1.png").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ada/x.npz", "x.npz"),
        ("/home/ada/set 0123", "set 0123"),
        ("lsun:/data/bedroom_train_lmdb 0123", "lsun:bedroom_train_lmdb 0123"),
        ("path: /data/x", "path: x"),
        ("s3://bucket/a/x.npz", "s3://bucket/a/x.npz"),
        ("runs/a", "runs/a"),
        ("1/2 of 3 / 4", "1/2 of 3 / 4"),
    ],
)
def test_folders_of_local_paths_are_left_out_of_what_is_published(text: str, shown: str) -> None:
    assert without_folders(text) == shown
