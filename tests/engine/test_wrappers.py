"""What is private to DeepSpeed: a class or an attribute that a version renames is an error, never another layout."""

from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cmscale.engine import wrappers
from cmscale.engine.flat_space import number_parameters
from cmscale.io.packages import OLDEST, TESTED, UnsupportedVersion, check_tested, private


def fake(name: str, **attributes: Any) -> Any:
    """An object whose class has the qualified name `name`, with some attributes."""
    module, _, kind = name.rpartition(".")
    made = type(kind, (), {})()
    type(made).__module__ = module
    for attribute, value in attributes.items():
        setattr(made, attribute, value)
    return made


def network() -> torch.nn.Module:
    return torch.nn.Linear(3, 2)


STAGE_0 = "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer"
STAGE_2 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
STAGE_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
FLAT = [torch.zeros(8)]
SHAPED = [torch.zeros(2, 3), torch.zeros(2)]
NEEDED = {
    STAGE_0: {"fp32_groups": [SHAPED], "fp16_groups": [SHAPED], "loss_scale_config": None},
    STAGE_2: {
        "single_partition_of_fp32_groups": FLAT,
        "update_lp_params": lambda: None,
        "loss_scaler": SimpleNamespace(raise_error_at_min_scale=True),
    },
    STAGE_3: {
        "fp32_partitioned_groups_flat": FLAT,
        "fp16_partitioned_groups_flat": FLAT,
        "fp16_groups": [[]],
        "loss_scaler": SimpleNamespace(raise_error_at_min_scale=True),
    },
}


def use(optimizer: Any) -> None:
    """All that the engine asks of a wrapper."""
    module = network()
    wrapper = wrappers.wrapper_of(optimizer, module)
    wrapper.masters()
    list(wrapper.runs(number_parameters(module), rank=0, num_ranks=1))
    wrapper.renew()
    wrapper.loss_scaler()


CASES = [(name, attribute) for name, attributes in NEEDED.items() for attribute in attributes]


@pytest.mark.parametrize("name", NEEDED)
def test_a_wrapper_with_all_its_attributes_is_used(name: str) -> None:
    use(fake(name, **NEEDED[name]))


@pytest.mark.parametrize(("name", "renamed"), CASES)
def test_a_renamed_attribute_of_a_wrapper_is_named_with_its_class_and_the_versions(name: str, renamed: str) -> None:
    # The attributes of the other layouts are there: a guess by what exists would take one of those.
    others = {key: value for other in NEEDED.values() for key, value in other.items()} | NEEDED[name]
    attributes = {f"{key}_renamed" if key == renamed else key: value for key, value in others.items()}
    with pytest.raises(UnsupportedVersion) as raised:
        use(fake(name, **attributes))
    message = str(raised.value)
    assert f"{name} has no attribute '{renamed}'" in message
    assert message.startswith(f"deepspeed {metadata.version('deepspeed')}: ")
    assert f"install deepspeed=={TESTED['deepspeed']}, which is tested" in message


def test_a_wrapper_of_another_class_is_refused_whatever_it_has() -> None:
    attributes = {key: value for needed in NEEDED.values() for key, value in needed.items()}
    name = "deepspeed.runtime.bf16_optimizer.BF16_Optimizer"
    with pytest.raises(UnsupportedVersion, match=rf"optimizer is a {name}; known are .*{STAGE_3}"):
        wrappers.wrapper_of(fake(name, **attributes), network())


def test_every_optimizer_of_the_config_is_known_unwrapped() -> None:
    module = network()
    for kind in (torch.optim.RAdam, torch.optim.Adam):
        wrapper = wrappers.wrapper_of(kind(module.parameters()), module)
        assert [id(tensor) for tensor in wrapper.masters()] == [id(parameter) for parameter in module.parameters()]


@pytest.mark.parametrize("renamed", ["cur_scale", "cur_iter", "last_overflow_iter"])
def test_a_loss_scaler_with_a_renamed_number_is_neither_saved_nor_restored(renamed: str) -> None:
    numbers = {"cur_scale": 8.0, "cur_iter": 3, "last_overflow_iter": 1}
    whole = SimpleNamespace(**numbers)
    state = wrappers.scaler_state(whole)
    del numbers[renamed]
    with pytest.raises(UnsupportedVersion, match=renamed):
        wrappers.scaler_state(SimpleNamespace(**numbers))
    with pytest.raises(UnsupportedVersion, match=renamed):
        wrappers.restore_scaler(SimpleNamespace(**numbers), state)


@pytest.mark.parametrize("name", [STAGE_2, STAGE_3])
def test_a_loss_scaler_that_would_raise_at_its_smallest_scale_is_not_left_so(name: str) -> None:
    scaler = SimpleNamespace(raise_error_at_min_scale=True)
    wrapper = wrappers.wrapper_of(fake(name, loss_scaler=scaler), network())
    assert wrapper.loss_scaler() is scaler
    assert scaler.raise_error_at_min_scale is False
    with pytest.raises(UnsupportedVersion, match="raise_error_at_min_scale"):
        wrappers.wrapper_of(fake(name, loss_scaler=SimpleNamespace()), network()).loss_scaler()


def test_a_parameter_without_its_partition_is_an_error() -> None:
    with pytest.raises(UnsupportedVersion, match="'ds_tensor'"):
        wrappers.partition(torch.nn.Parameter(torch.zeros(2)))


def test_an_untested_series_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda package: "0.99.1")
    check_tested.cache_clear()
    with pytest.warns(UserWarning, match=rf"deepspeed 0\.99\.1 is installed, tested is {TESTED['deepspeed']}"):
        check_tested("deepspeed")
    monkeypatch.undo()
    check_tested.cache_clear()


@pytest.mark.parametrize("version", ["2.8.1+cu128", "2.16.0a0+git1"])
def test_a_torch_outside_the_tested_range_is_named(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda package: version)
    with pytest.warns(UserWarning, match=rf"is installed, tested are {OLDEST['torch']} to {TESTED['torch']}"):
        check_tested.__wrapped__("torch")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("version", ["2.9.0+cu128", "2.11.0+cu130", "2.15.3"])
def test_every_torch_of_the_tested_range_serves_without_a_word(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda package: version)
    check_tested.__wrapped__("torch")


@pytest.mark.filterwarnings("error")
def test_the_installed_versions_are_of_the_tested_series() -> None:
    for package in TESTED:
        check_tested.__wrapped__(package)


def test_private_names_a_module_or_a_class_by_its_own_name() -> None:
    with pytest.raises(UnsupportedVersion, match=r"torch\.distributed has no attribute 'nothing'"):
        private(torch.distributed, "nothing", package="torch")
    with pytest.raises(UnsupportedVersion, match="Linear has no attribute 'nothing'"):
        private(torch.nn.Linear, "nothing", package="torch")
