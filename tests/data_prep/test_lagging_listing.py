"""Listings of some stores lag behind: nothing that was made is lost by it, nobody is taken for another."""

from pathlib import Path

import pytest
from data_fixtures import make
from prepare_command import call, refused

from cmscale.errors import UserError
from cmscale.io.s3 import S3Storage
from cmscale.io.storage import open_storage
from cmscale.runs import ownership
from cmscale.runs.ownership import owning
from data_prep import verify
from data_prep.making.preparation import Preparation


class Lag:
    """While it is `on`, all listings are empty."""

    on = False


@pytest.fixture
def lag(monkeypatch: pytest.MonkeyPatch) -> Lag:
    lag, plain = Lag(), S3Storage._pages
    monkeypatch.setattr(S3Storage, "_pages", lambda *at, **more: iter([{}]) if lag.on else plain(*at, **more))
    return lag


def test_a_preparation_whose_listings_are_empty_makes_the_same_data_set(source: Path, s3: str, lag: Lag, monkeypatch):
    expected = open_storage(make(source, f"{s3}/one", "mds")).read("manifest.json")
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.05)
    lag.on = True
    url = make(source, f"{s3}/two", "mds")
    lag.on = False
    assert open_storage(url).read("manifest.json") == expected
    assert verify.main([url]) == 0


def test_a_refusal_with_finished_shards_that_no_listing_shows_yet_loses_none(
    source: Path, s3: str, lag: Lag, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, made = f"{s3}/set", Preparation.make

    def refuse(self: Preparation, number: int, **how):
        if number < 2:
            return made(self, number, **how)
        lag.on = True
        raise UserError("no more")

    with monkeypatch.context() as inner:
        inner.setattr(Preparation, "make", refuse)
        assert "no more" in refused(capsys, call(f"lsun:{source}", url))
    lag.on = False
    assert len([entry for entry in open_storage(url).list() if "shard" in entry.key]) == 2
    assert call(f"lsun:{source}", url) == 0
    assert "continuing: 2 of " in capsys.readouterr().out


def test_what_is_deleted_and_still_listed_is_not_there(source: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url, unpublished = f"{s3}/set", []

    def stop(self: Preparation, records: object) -> None:
        unpublished.append((self, records))
        raise UserError("stop")

    monkeypatch.setattr(Preparation, "publish", stop)
    assert call(f"lsun:{source}", url) == 2
    ((preparation, records),) = unpublished
    storage = preparation.storage
    listed = list(storage.list())
    storage.delete(preparation.record_key(1))
    monkeypatch.setattr(type(storage), "list", lambda self, prefix="": iter(listed))
    assert preparation.records() == {number: record for number, record in records.items() if number != 1}


def test_an_owner_that_no_listing_shows_is_seen(s3: str, lag: Lag, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 1000.0)
    lag.on = True
    with owning(open_storage(s3), ".progress", what="x") as first:
        first.check()
        with pytest.raises(UserError, match=r"^x: process \d+ on \S+ works on it"):
            ownership.Ownership(open_storage(s3), ".progress", what="x").claim()
