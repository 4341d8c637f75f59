"""Requests to save and stop: one per run, whichever signals ask for it."""

import os
import signal
from collections.abc import Iterator

import pytest

from cmscale.engine.preemption import Preemption


@pytest.fixture(autouse=True)
def signals_of_the_tests() -> Iterator[None]:
    """What a test does to this process's signals ends with it."""
    numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Preemption:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return Preemption.install()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_is_a_request_to_stop(installed: Preemption, number: signal.Signals) -> None:
    assert not installed.requested()
    os.kill(os.getpid(), number)
    assert installed.requested()
    assert installed.why == number.name


def test_signals_that_come_twice_are_one_request(installed: Preemption) -> None:
    for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM):
        os.kill(os.getpid(), number)
    assert installed.requested()
    assert installed.why == "SIGTERM"


def test_a_continued_process_is_not_asked_to_stop(installed: Preemption) -> None:
    os.kill(os.getpid(), signal.SIGCONT)
    assert not installed.requested()


def test_the_second_ctrl_c_interrupts(installed: Preemption) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_under_slurm_ctrl_c_is_left_to_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    before = signal.getsignal(signal.SIGINT)
    Preemption.install()
    assert signal.getsignal(signal.SIGINT) is before
