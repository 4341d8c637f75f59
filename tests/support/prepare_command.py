"""Calls data_prep/prepare.py as the tests do: small images, small shards, one worker."""

import pytest

from data_prep import prepare


def call(source: object, out: object, *more: str, format: str = "webdataset", size: int = 16) -> int:
    """Prepares a data set with shards of 4 images, unless `more` says otherwise. Returns the command's exit status."""
    arguments = ["--source", str(source), "--out", str(out), "--format", format, "--image-size", str(size)]
    for option, value in (("--samples-per-shard", "4"), ("--workers", "1")):
        arguments += [] if option in more else [option, value]
    return prepare.main([*arguments, *more])


def refused(capsys: pytest.CaptureFixture[str], status: int, *, expected: int = 2) -> str:
    """The one line on stderr of a command that ended with status 2, or with another that is expected."""
    error = capsys.readouterr().err
    assert status == expected
    assert error.count("\n") == 1
    return error
