"""Takes storage away in tests; makes waits quick and visible: what would be slept is recorded, and time passes."""

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import boto3.session
import pytest
from fault_proxy import FaultProxy

from cmscale.io import patience
from cmscale.io.settings import StorageSettings, use_settings

# Shards are needed one after the other, and an outage lasts for longer than a step and a collective may take.
IN_ORDER = ("data.num_canonical_nodes=1", "data.shuffle_block=8", "data.prefetch_batches=1")
SHORT = ("engine.collective_timeout_minutes=0.25", "engine.step_timeout_minutes=0.25")


class PassingTime:
    """Stands for the clock of `cmscale.io.patience`.

    Attributes:
        waits: The pauses so far, in seconds.
    """

    def __init__(self, during: Callable[[int], object] = lambda _: None) -> None:
        self.waits: list[float] = []
        self.passed = 0.0
        self.during = during

    def monotonic(self) -> float:
        return time.monotonic() + self.passed

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.passed += seconds
        self.during(len(self.waits))


def pass_time(monkeypatch: pytest.MonkeyPatch, during: Callable[[int], object] = lambda _: None) -> PassingTime:
    """Replaces the clock of waits for storage.

    Args:
        during: Called in each pause with its number, from 1 on.
    """
    clock = PassingTime(during)
    monkeypatch.setattr(patience, "time", clock)
    monkeypatch.setattr(patience, "_pause", lambda seconds, _: clock.sleep(seconds))
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda _: None))
    return clock


def use_patience(minutes: float) -> None:
    use_settings(StorageSettings(patience_minutes=minutes))


def upload_set(folder: Path, endpoint: str, *, bucket: str) -> str:
    """Uploads a prepared data set to a new bucket. Returns its URL."""
    client = boto3.session.Session("x", "x", region_name="us-east-1").client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket=bucket)
    for path in folder.iterdir():
        if path.is_file():
            client.upload_file(str(path), bucket, f"set/{path.name}")
    return f"s3://{bucket}/set"


def away_at_a_later_shard(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the server away when the last shard is asked for, which the ranks need some steps later."""
    plain, shards, gone = proxy.fault_of, set(), threading.Event()

    def fault_of(request: str) -> str:
        shards.update(re.findall(r"shard-\d+", request))
        if len(shards) < 3 or gone.is_set():
            return plain(request)
        gone.set()
        proxy.away()
        return "reset"

    monkeypatch.setattr(proxy, "fault_of", fault_of)
