"""Tests that sCT, sCD (ZeRO 0 to 2) and progressive distillation (0 to 3) have equal losses on one and two ranks."""

import json
import sys
from pathlib import Path

import pytest
from continuous_work import TEXT
from ranks import run_ranks

from cmscale.config import parse_config
from cmscale.errors import UserError
from cmscale.interop import write_safetensors

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from networks import random_weights


@pytest.mark.parametrize(
    "method", ["{kind: sct}", "{kind: scd, teacher: TEACHER}", "{kind: pd, teacher: TEACHER, start_scales: 4}"]
)
def test_every_stage_trains_alike_on_one_rank_and_on_two(method: str, tmp_path: Path) -> None:
    config = parse_config(TEXT.replace("METHOD", "{kind: edm}"))
    teacher = tmp_path / "teacher.safetensors"
    write_safetensors(teacher, random_weights(config.model), config=config, step=1, weights_name="ema_0.9")
    method = method.replace("TEACHER", str(teacher))
    one, two = (json.loads(run_ranks(n, "continuous_work:losses", method)[0].splitlines()[-1]) for n in (1, 2))
    golden = [number for pair in one["0"] for number in pair]
    for found in (*one.values(), *two.values()):
        assert [number for pair in found for number in pair] == pytest.approx(golden, rel=2e-4)


def test_zero_3_is_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match=r"engine.zero_stage: 3 .* use 2") as refused:
        parse_config(TEXT.replace("METHOD", "{kind: sct}"), ["engine.zero_stage=3"])
    assert "\n" not in str(refused.value)
