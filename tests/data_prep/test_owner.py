"""Two commands on one place in S3: the second is refused before it touches anything; a dead one is taken over."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from data_fixtures import encoded, make, smooth_image
from prepare_command import call, refused

from cmscale.errors import UserError
from cmscale.io import interrupts
from cmscale.io.process import CHECKOUT
from cmscale.io.protocol import StorageAway
from cmscale.io.s3 import S3Storage
from cmscale.io.storage import open_storage
from cmscale.runs import ownership as owner
from cmscale.runs.ownership import Owner, TakenOver, owning
from data_prep.making.documents import PLAN
from data_prep.making.preparation import Preparation

FOLDER = ".progress"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners seem to be on another machine; silence is short, and yet far longer than a busy machine delays a sign."""
    monkeypatch.setattr(owner, "process_space", iter(map(str, range(1000))).__next__)
    monkeypatch.setattr(owner, "SILENT_SECONDS", 5.0)
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.1)


def contents(url: str) -> dict[str, bytes]:
    storage = open_storage(url)
    return {entry.key: storage.read(entry.key) for entry in storage.list()}


def during(monkeypatch: pytest.MonkeyPatch, shard: int, action: Callable[[], object]) -> None:
    """Calls `action` before a shard is made."""
    made = Preparation.make

    def make_after(self, number, **how):
        if number == shard:
            action()
        return made(self, number, **how)

    monkeypatch.setattr(Preparation, "make", make_after)


def test_a_second_start_is_refused_and_changes_nothing(tmp_path: Path, s3: str, capsys, monkeypatch) -> None:
    for number in range(12):
        (tmp_path / f"{number:02d}.png").write_bytes(encoded(smooth_image(number), "png"))
    url, storage = f"{s3}/set", open_storage(f"{s3}/set")
    assert isinstance(storage, S3Storage)
    seen: list[object] = []

    def second() -> None:
        for name in ("set/shard-00001.tar", "another/upload"):
            storage.client.create_multipart_upload(Bucket=storage.bucket, Key=name)
        before = {key: data for key, data in contents(url).items() if "owner" not in key}
        with monkeypatch.context() as inner:
            inner.setattr(owner, "process_space", lambda: "another machine")
            inner.setattr(owner, "BEAT_SECONDS", 0.1)
            said = refused(capsys, call(f"folder:{tmp_path}", url))
        after = {key: data for key, data in contents(url).items() if "owner" not in key}
        uploads = storage.client.list_multipart_uploads(Bucket=storage.bucket)["Uploads"]
        seen.append((said, before == after, sorted(upload["Key"] for upload in uploads)))

    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr("data_prep.making.preparation.hold", _NoLock)  # as on another host
    during(monkeypatch, 2, second)
    assert call(f"folder:{tmp_path}", url) == 0
    ((said, same, uploads),) = seen
    assert "works on it; wait for it to end, or end it (a dead one is taken over after 90 s)" in said
    assert same
    assert uploads == ["another/upload", "set/shard-00001.tar"]
    assert not [key for key in contents(url) if key.startswith(FOLDER)]


class _NoLock:
    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def test_of_two_plans_that_begin_at_the_same_moment_one_is_refused(source: Path, s3: str, capsys, monkeypatch) -> None:
    refuse = Preparation._refuse_foreign
    other = PLAN_OF_ANOTHER.replace(b"SOURCE", str(source).encode())

    def refuse_and_lose(self: Preparation) -> None:
        refuse(self)
        self.storage.write(PLAN, other)  # of another host, after both found nothing

    monkeypatch.setattr(Preparation, "_refuse_foreign", refuse_and_lose)
    said = refused(capsys, call(f"lsun:{source}", f"{s3}/set"))
    assert "unfinished data set of another source or other settings (made with --format mds, not webdataset)" in said
    assert contents(f"{s3}/set") == {PLAN: other}


PLAN_OF_ANOTHER = (
    b'{"settings": {"format": "mds", "image_size": 16, "preprocess": "adm", "encoding": "png", '
    b'"exif": "ignore", "samples_per_shard": 4}, "source": "lsun:SOURCE", "keys": 23, "keys_sha256": "x"}'
)


def test_one_owner_at_a_time_and_the_end_of_one_is_seen_at_once(s3: str, elsewhere: None) -> None:
    storage = open_storage(s3)
    with owning(storage, FOLDER, what="x") as first:
        first.check()
        with pytest.raises(UserError, match=r"^x: process \d+ on \S+ works on it"), owning(storage, FOLDER, what="x"):
            pass
    with owning(storage, FOLDER, what="x"):
        pass
    assert contents(s3) == {}


def test_a_silent_owner_is_taken_over_and_ends_when_it_wakes(s3: str, elsewhere: None, monkeypatch) -> None:
    storage = open_storage(s3)
    with monkeypatch.context() as silent:
        silent.setattr(owner, "BEAT_SECONDS", 1000.0)
        frozen = owner.Ownership(storage, FOLDER, what="x")
        frozen.claim()
    monkeypatch.setattr(owner, "SILENT_SECONDS", 1.0)
    with owning(storage, FOLDER, what="x") as second:
        second.check()
        with pytest.raises(TakenOver, match="has taken over; this command ends and publishes nothing"):
            frozen.check()
    with pytest.raises(TakenOver):  # nor when the other one is through
        frozen.check()
    frozen.stop()


def test_after_ctrl_c_the_signs_of_life_end_without_a_traceback(s3: str, elsewhere: None, monkeypatch) -> None:
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    ownership = owner.Ownership(open_storage(s3), FOLDER, what="x")
    ownership.claim()
    assert ownership._thread is not None
    assert ownership._thread.is_alive()
    monkeypatch.setattr(interrupts, "received", [signal.SIGINT])
    ownership._thread.join(60)
    assert not ownership._thread.is_alive()
    assert raised == []


@pytest.mark.long
def test_of_many_that_find_a_dead_owner_one_takes_over(s3: str, elsewhere: None) -> None:
    storage = open_storage(s3)
    dead = Owner(token="x", host="gone", process=1, started="1", space="elsewhere")
    storage.write(f"{FOLDER}/owner-000001.json", dead.to_bytes())
    owners, refusals, through = [], [], threading.Event()

    def take() -> None:
        try:
            with owning(open_storage(s3), FOLDER, what="x"):
                owners.append(1)
                through.wait(60)
        except UserError:
            refusals.append(1)
            if len(refusals) == 3:
                through.set()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(owners), len(refusals)) == (1, 3)


def test_a_dead_process_of_this_machine_is_taken_over_at_once(s3: str) -> None:
    code = """
        import os, sys
        from cmscale.io.storage import open_storage
        from cmscale.runs.ownership import owning
        with owning(open_storage(sys.argv[1]), ".progress", what="x"):
            os._exit(1)
    """
    text = "\n".join(line[8:] for line in code.splitlines())
    subprocess.run([sys.executable, "-c", text, s3], cwd=CHECKOUT, check=False)
    assert list(contents(s3)) == [f"{FOLDER}/owner-000001.json"]
    with owning(open_storage(s3), FOLDER, what="x"):
        assert f"{FOLDER}/owner-000002.json" in contents(s3)


def test_a_command_that_was_taken_over_publishes_nothing_and_removes_nothing(
    source: Path, s3: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(f"{s3}/set")

    def take_over() -> None:
        thief = Owner(token="t", host="thief", process=1, started="1", space="elsewhere")
        storage.write(f"{FOLDER}/owner-000002.json", thief.to_bytes())

    during(monkeypatch, 5, take_over)
    assert "process 1 on thief has taken over" in refused(capsys, call(f"lsun:{source}", f"{s3}/set"))
    left = set(contents(f"{s3}/set"))
    assert "manifest.json" not in left
    assert {f"shard-0000{number}.tar" for number in range(6)} <= left
    assert f"{FOLDER}/owner-000002.json" in left


def test_storage_that_stays_away_is_not_waited_for_a_second_time_at_the_end(s3: str, monkeypatch) -> None:
    storage = open_storage(s3)
    asked = []

    def work() -> None:
        with owning(storage, FOLDER, what="x"):
            monkeypatch.setattr(S3Storage, "_ask", lambda *_, **__: asked.append(1))
            raise StorageAway("away")

    with pytest.raises(StorageAway):
        work()
    assert asked == []


def test_where_deleting_is_not_allowed_a_data_set_is_published_all_the_same(
    source: Path, s3: str, proxy, capfd
) -> None:
    proxy.add("answer 403 AccessDenied", match="DELETE|POST .*delete")
    url = make(source, f"{s3}/set", "mds")
    assert "note: what is no longer needed stays" in capfd.readouterr().err
    assert "manifest.json" in contents(url)
    assert call(f"lsun:{source}", url, "--encoding", "jpeg", format="mds") == 0
    assert Owner.model_validate_json(contents(url)[f"{FOLDER}/owner-000001.json"]).ended
