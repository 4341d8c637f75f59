"""Tests that a config's own sampling times are used where a command gives none."""

import pytest
import torch

from cmscale.config import MCD, Config
from cmscale.config.files import dump_config, parse_config
from cmscale.config.requests import EvaluateRequest
from cmscale.consistency.sampler import default_sigmas
from cmscale.errors import UserError
from cmscale.evaluation.search_times import _start
from cmscale.generation.draw import SampleRequest, read_times, used_sigmas
from cmscale.source import Source

TEXT = """
method: {kind: ct}
model: {image_size: 32, channels: 32, channel_multipliers: [1, 2], num_res_blocks: 1}
data: {path: s3://bucket/data}
optimizer: {learning_rate: 1e-4}
train: {total_steps: 10, global_batch_size: 8, micro_batch_size: 2}
"""


def config_of(*overrides: str) -> Config:
    return parse_config(TEXT, list(overrides))


def sigmas(config: Config, **asked) -> list[float]:
    return used_sigmas(Source("origin", config, {}, "master", 0), SampleRequest(num=1, **asked)).tolist()


def test_as_many_steps_as_the_config_has_times_take_them():
    config = config_of("sampling.times=[80, 5.2485032]")
    assert sigmas(config, steps=2) == [80.0, 5.2485032]
    assert sigmas(config) == [80.0]
    assert sigmas(config, steps=4) == sigmas(config_of(), steps=4)
    assert sigmas(config, sigmas=torch.tensor([70.0, 3.0])) == [70.0, 3.0]
    assert sigmas(config_of(), steps=2) == pytest.approx([80.0, 3.991], abs=1e-3)


def test_a_search_begins_at_the_times_of_the_config():
    assert _start(config_of()) == (0, 67)
    assert _start(config_of("sampling.times=[80, 5.249]")) == (0, 62)
    assert _start(config_of("sampling.times=[80, 20, 5]")) == (0, 67)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampling.times=[4, 80]"], r"times: \[4.0, 80.0\] must descend"),
        (["sampling.times=[80, 80]"], "must descend"),
        (["sampling.times=[80, 0]"], "sampling.times.1: got 0"),
        (["sampling.times=[]"], "sampling.times"),
        (["sampling.times=[100, 4]"], "sampling.times: 100 is outside of method.sigma_min 0.002 to sigma_max 80"),
        (["sampling.times=[40, 4]", "method.sigma_max=20"], "sampling.times: 40 is outside"),
        (["method.kind=edm", "sampling.times=[80, 4]"], "sampling.times: method.kind edm is not sampled in chosen"),
    ],
)
def test_times_that_cannot_be_used_are_refused(overrides: list[str], message: str):
    with pytest.raises(UserError, match=message):
        config_of(*overrides)


def test_an_evaluation_is_refused_before_it_is_submitted_if_its_two_steps_have_no_second_time():
    text = TEXT.replace("{kind: ct}", "{kind: ect, teacher: t, sigma_max: 0.5}")
    request = EvaluateRequest.model_validate({"source": "x.pt", "steps": "1,2"})
    with pytest.raises(UserError, match="two steps: the second time"):
        request.check_fits(parse_config(text))
    request.check_fits(parse_config(text, ["sampling.times=[0.5, 0.2]"]))
    EvaluateRequest.model_validate({"source": "x.pt", "steps": "1,4"}).check_fits(parse_config(text))


def test_a_model_of_segments_is_sampled_in_as_many_steps_and_at_no_other_times():
    method = MCD(kind="mcd", teacher="t", segments=4)
    config = parse_config(TEXT.replace("{kind: ct}", "{kind: mcd, teacher: t, segments: 4}"))
    with pytest.raises(UserError, match=r"--sampling-times 80,1: the model has sampling times of its own"):
        read_times("80,1", method)
    for asked, words in ({"steps": "4,2"}, "--steps: got 2, but .* sampled in 4"), ({"times": "80,1"}, "times of its"):
        with pytest.raises(UserError, match=words):
            EvaluateRequest.model_validate({"source": "x.pt", **asked}).check_fits(config)
    EvaluateRequest.model_validate({"source": "x.pt", "steps": "4"}).check_fits(config)
    assert sigmas(config) == sigmas(config, steps=4) == default_sigmas(method).tolist()
    with pytest.raises(UserError, match="--steps: got 8"):
        sigmas(config, steps=8)
    with pytest.raises(UserError, match=r"sampling.times: method.kind mcd is not sampled in chosen steps"):
        parse_config(dump_config(config), ["sampling.times=[80, 1]"])
