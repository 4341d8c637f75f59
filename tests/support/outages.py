"""Makes waits for storage quick and visible in tests: what would be slept is recorded, and time passes all the same."""

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from cmscale.io import patience
from cmscale.io.settings import StorageSettings, use_settings


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
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda _: None))
    return clock


def use_patience(minutes: float) -> None:
    use_settings(StorageSettings(patience_minutes=minutes))
