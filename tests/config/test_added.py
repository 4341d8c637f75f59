"""Tests that runs of older releases, which lack keys that came later, keep what they were trained with."""

import json

import pytest
import yaml

from cmscale.config import Config, differences, dump_config, parse_config, trajectory
from cmscale.config.added import ADDED, EVERY_METHOD, added_at_older_value

TEXT = """
method: METHOD
model: {image_size: 32, channels: 32, channel_multipliers: [1, 2], num_res_blocks: 1}
data: {path: s3://bucket/data}
optimizer: {learning_rate: 1e-4}
train: {total_steps: 10, global_batch_size: 8, micro_batch_size: 2}
"""
METHODS = {
    "edm": "{kind: edm}",
    "cd": "{kind: cd, teacher: t}",
    "ct": "{kind: ct}",
    "ict": "{kind: ict}",
    "ect": "{kind: ect, teacher: t}",
    "sct": "{kind: sct}",
    "scd": "{kind: scd, teacher: t}",
    "pd": "{kind: pd, teacher: t}",
    "tcm": "{kind: tcm, teacher: t}",
    "mcd": "{kind: mcd, teacher: t}",
}


def older(config: Config) -> dict:
    """The config as a release wrote it that had none of the added keys, nor sections that came later."""
    tree = json.loads(config.model_dump_json())
    for key in ADDED:
        section, leaf = key.split(".")
        if config.method.kind in ADDED[key] or EVERY_METHOD in ADDED[key]:
            del tree[section][leaf]
    del tree["sampling"]
    return tree


def without_added(values: dict, kind: str) -> dict:
    """A trajectory as a manifest of such a release has it."""
    later = {key for key, of_kind in ADDED.items() if kind in of_kind or EVERY_METHOD in of_kind}
    length = values.get("method.schedule_steps")
    total = {} if length is None else {"train.total_steps": length}
    return {key: value for key, value in values.items() if key not in later} | total


@pytest.mark.parametrize("kind", METHODS)
def test_a_run_of_an_older_release_goes_on_as_it_was(kind: str):
    new = parse_config(TEXT.replace("METHOD", METHODS[kind]))
    tree = older(new)
    run = parse_config(yaml.safe_dump(tree), resolved=True)
    for key, values in ADDED.items():
        section, leaf = key.split(".")
        if kind in values or EVERY_METHOD in values:
            found = json.loads(getattr(run, section).model_dump_json())[leaf]
            assert found == values.get(kind, values.get(EVERY_METHOD)), key
    assert differences(without_added(trajectory(run), kind), trajectory(run)) == []
    assert parse_config(dump_config(run), resolved=True) == run


def test_what_counts_is_the_length_of_a_schedule_wherever_it_is_written():
    text = TEXT.replace("METHOD", METHODS["ct"])
    run = trajectory(parse_config(text))
    assert differences(run, trajectory(parse_config(text, ["train.total_steps=20", "method.schedule_steps=10"]))) == []
    longer = trajectory(parse_config(text, ["train.total_steps=20"]))
    assert differences(run, longer) == ["method.schedule_steps: 10 -> 20"]
    cosine = trajectory(parse_config(TEXT.replace("METHOD", METHODS["edm"]), ["optimizer.schedule=cosine"]))
    older = {key: value for key, value in cosine.items() if key != "optimizer.decay_reference"}
    assert differences(older | {"train.total_steps": 10}, cosine) == []
    assert differences(older | {"train.total_steps": 20}, cosine) == ["optimizer.decay_reference: 20 -> 10"]


def test_new_runs_get_the_defaults_and_differ_from_older_ones_by_name():
    new = parse_config(TEXT.replace("METHOD", METHODS["scd"]))
    assert (new.method.tangent, new.model.precision_layout) == ("auto", "released")
    assert differences(without_added(trajectory(new), "scd"), trajectory(new)) == [
        "method.tangent: jvp -> auto",
        "model.precision_layout: uniform -> released",
        "train.random_numbers: torch -> philox",
    ]


def test_keys_at_their_older_value_are_left_out_of_hashes():
    run = parse_config(yaml.safe_dump(older(parse_config(TEXT.replace("METHOD", METHODS["ect"])))), resolved=True)
    assert added_at_older_value("method", run.method.model_dump(mode="json")) == {"schedule_steps", "weighting"}
    values = run.model.model_dump(mode="json")
    later = {"dropout_resolutions", "precision_layout", "noise_embedding_scale"}
    assert added_at_older_value("model", values) == later
    assert added_at_older_value("model", values | {"precision_layout": "released"}) == later - {"precision_layout"}
