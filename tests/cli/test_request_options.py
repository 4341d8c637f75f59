"""The options of the evaluation commands follow from the request models alone."""

import re

import pytest
from commands import run
from pydantic import BaseModel

from cmscale.config.request_fields import options_of
from cmscale.config.requests import EvaluateRequest, SearchTimesRequest


@pytest.mark.parametrize(
    ("command", "request_model"), [("evaluate", EvaluateRequest), ("search-times", SearchTimesRequest)]
)
def test_the_help_lists_the_options_of_the_request_and_no_others(
    command: str, request_model: type[BaseModel], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, command, "--help") == 0
    shown = set(re.findall(r"^[│ ]+(--[a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE))
    assert shown - {"--help"} == {option.flag for option in options_of(request_model) if option.flag}


def test_internal_fields_are_no_options() -> None:
    assert "run_dir" in EvaluateRequest.model_fields
    assert "run_dir" not in {option.name for option in options_of(EvaluateRequest)}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--samples", "1"), "--samples"),
        (("--seeds", "0"), "--seeds"),
        (("--device", "tpu"), "--device"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_options_name(
    arguments: tuple[str, str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "evaluate", "somewhere", *arguments) == 2
    assert named in capsys.readouterr().err
