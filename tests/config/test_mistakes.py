"""Mistakes in configs: each is one line with its place, a typo is named, and what only looks right is refused."""

from pathlib import Path

import pytest

from cmscale.commands.ending import guarded
from cmscale.config import parse_config, read_config
from cmscale.config.keys import known_keys
from cmscale.config.layers import Layer
from cmscale.config.mistakes import suggestion
from cmscale.config.usual_words import USUAL_WORDS
from cmscale.errors import UserError

TEXT = """method: {kind: ct}
model: {image_size: 32, channels: 32, channel_multipliers: [1, 2], num_res_blocks: 1}
data: {path: s3://bucket/data}
optimizer: {learning_rate: 1e-4}
train: {total_steps: 10, global_batch_size: 8, micro_batch_size: 2}
"""


def lines_of(text: str, overrides: list[str] | None = None, **more: object) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_config(text, overrides, origin="a.yaml", **more)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            "total_steps",
            "total_step",
            "a.yaml, line 5: train.total_step: unknown key; did you mean train.total_steps, ",
        ),
        (
            "learning_rate",
            "learnin_rate",
            "a.yaml, line 4: optimizer.learnin_rate: unknown key; did you mean optimizer.l",
        ),
        (
            "optimizer:",
            "optimiser:",
            "a.yaml, line 4: optimiser: unknown key; did you mean optimizer, which is missing?",
        ),
        ("{kind:", "{knd:", "a.yaml, line 1: method.knd: unknown key; did you mean method.kind (edm, "),
        (
            "{kind: ct}",
            "{kind: cd, techer: x}",
            "a.yaml, line 1: method.techer: unknown key; did you mean method.teacher, w",
        ),
    ],
)
def test_a_misspelt_required_key_is_one_line_that_names_the_typo(old: str, new: str, line: str) -> None:
    found = lines_of(TEXT.replace(old, new))
    assert len(found) == 1
    assert found[0].startswith(line)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("lr", "optimizer.learning_rate"),
        ("train.lr", "optimizer.learning_rate"),
        ("train.learning_rate", "optimizer.learning_rate"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("batch_size", "train.global_batch_size or train.micro_batch_size"),
        ("data.batch_size", "train.global_batch_size or train.micro_batch_size"),
        ("epochs", "train.total_steps"),
        ("train.max_steps", "train.total_steps"),
        ("data.num_workers", "data.workers"),
        ("train.precision", "engine.precision"),
        ("engine.FP16", "engine.precision=fp16"),
        ("save-interval", "checkpoint.every_steps"),
        ("max_grad_norm", "engine.gradient_clip"),
        ("evaluate.every_steps", "--evaluate-every of launchers/submit.py"),
        ("evaluate.steps", "--steps of launchers/evaluate.py"),
        ("output_dir", "--runs-dir of launchers/submit.py"),
    ],
)
def test_a_name_that_is_usual_elsewhere_is_understood(word: str, meant: str) -> None:
    assert suggestion(word) == f"; did you mean {meant}?"


def test_names_that_are_usual_elsewhere_are_not_ours_and_mean_keys_or_options() -> None:
    names = " ".join(USUAL_WORDS.values()).split()
    assert len(names) == len(set(names))
    leaves = {key.partition(".")[2] for key in known_keys()}
    assert not {name for name in names if name in leaves or name in known_keys()}
    keys = {each.partition("=")[0] for meant in USUAL_WORDS for each in meant if not each.startswith("--")}
    assert keys <= set(known_keys())


def test_a_required_key_under_its_usual_name_is_one_mistake() -> None:
    (line,) = lines_of(TEXT.replace("learning_rate", "lr"))
    assert line == "a.yaml, line 4: optimizer.lr: unknown key; did you mean optimizer.learning_rate, which is missing?"


def test_all_mistakes_are_listed_with_their_places() -> None:
    text = TEXT.replace("channels: 32", "channels: many") + "wandb:\n  mode: on\n  projekt: x\nmore: 1\n"
    found = lines_of(text, ["train.sed=1", "train.seed=-1", "nonsense", "engine.precision=fp8"])
    assert [line.split("; ")[0] for line in found] == [
        "command line: train.sed: unknown key",
        "command line: override 'nonsense': write it as key=value, for example train.seed=1",
        "a.yaml, line 2: model.channels: got 'many'",
        "command line: train.seed: got -1",
        "command line: engine.precision: got 'fp8'",
        "a.yaml, line 7: wandb.mode: got 'on'",
        "a.yaml, line 8: wandb.projekt: unknown key",
        "a.yaml, line 9: more: unknown section",
    ]


def test_very_many_mistakes_are_counted() -> None:
    wrong = "".join(f"  k{index}: 1\n" for index in range(50))
    found = lines_of(f"{TEXT}wandb:\n{wrong}")
    assert len(found) == 20
    assert found[-1] == "a.yaml: and 31 more mistakes"


def test_a_command_prints_a_line_for_each_and_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main(arguments: list[str]) -> None:
        parse_config(TEXT, arguments)

    assert guarded(main, ["train.sed=1", "train.seed=x"]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 2
    assert all(line.startswith("error: command line: train.se") for line in printed)


def test_a_value_of_a_layer_beneath_is_placed_there() -> None:
    beneath = [Layer("site file s", {"data": {"cache_gb": -1}})]
    assert lines_of(TEXT, beneath=beneath)[0].startswith("site file s: data.cache_gb: got -1")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("010", "got '010'; it should be a whole number: a number has no leading zero, write 10 (octal: 0o...)"),
        ("1:30", "got '1:30'; it should be a whole number: with colons it is text, write one number"),
        ("yes", "got 'yes'; it should be a whole number"),
        ("1,000", "got '1,000'"),
    ],
)
def test_what_looks_like_a_number_is_refused_with_its_line(value: str, said: str) -> None:
    (line,) = lines_of(f"{TEXT}evaluate:\n  num_samples: {value}\n")
    assert line.startswith(f"a.yaml, line 7: evaluate.num_samples: {said}")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("evaluate: {num_samples: 5e3}", "evaluate.num_samples: got 5000.0; it should be a whole number; write 5000"),
        ("evaluate: {num_samples: '5'}", "got '5'; it should be a whole number: in quotes it is text, remove them"),
        ("evaluate: {reference: true}", "evaluate.reference: got true; it should be text; quote it: 'true' (in key="),
        ("engine: {device: {a: 1}}", "engine.device: got a mapping; "),
        ("ema: {rates: 0.9}", "ema.rates: got 0.9; it should be a list, such as [a, b]"),
        ("evaluate:", "evaluate: is an empty section; write its keys below it, indented, or remove it"),
        ("evaluate: {3: 4}", "evaluate.3: got 3, which is no key; keys are text"),
        ("evaluate.num_samples: 5", "a key with a dot is for the command line; write num_samples in the section evalu"),
    ],
)
def test_what_is_meant_is_said(more: str, said: str) -> None:
    (line,) = lines_of(f"{TEXT}{more}\n")
    assert line.startswith("a.yaml, line 6: evaluate" if "evaluate" in more else "a.yaml, line 6: e")
    assert said in line


@pytest.mark.parametrize(("given", "said"), [("[0.9]", "more values"), ("[0.9, 0.99, 0.999]", "at most 2 values")])
def test_a_list_of_the_wrong_length_is_shown(given: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_config(TEXT, [f"optimizer.betas={given}"])
    assert str(refused.value) == f"command line: optimizer.betas: got {given}; it should have {said}"


def test_a_section_is_not_set_as_a_whole_on_the_command_line() -> None:
    with pytest.raises(UserError, match=r"train: is a section; give its keys one by one, as train\.KEY=VALUE"):
        parse_config(TEXT, ["train=5"])


@pytest.mark.parametrize("given", ["s3://bucket/data #1", "/data #1", "s3://bucket/data\t#1 of 2"])
def test_a_comment_that_cuts_text_is_refused(given: str) -> None:
    (line,) = lines_of(TEXT.replace("{path: s3://bucket/data}", f"\n  path: {given}"))
    assert line.startswith("a.yaml, line 4: #1 behind ")
    assert "quote the value" in line
    given = given.replace("\t", " ")
    quoted = parse_config(TEXT.replace("{path: s3://bucket/data}", f"\n  path: '{given}'"))
    assert quoted.data.path == given
    with pytest.raises(UserError, match=r"override 'data.path=x #1': #1 behind 'x' is a comment"):
        parse_config(TEXT, ["data.path=x #1"])


@pytest.mark.parametrize("key", ["data.path", "wandb.project", "checkpoint.export_to", "slurm.account"])
@pytest.mark.parametrize(("given", "words"), [('"a\\nb"', "line breaks and control"), ("'  '", "is empty")])
def test_text_that_no_line_of_a_message_could_show_is_refused(key: str, given: str, words: str) -> None:
    with pytest.raises(UserError, match=f"command line: {key}: .*{words}"):
        parse_config(TEXT, [f"{key}={given}"])


def test_comments_stay_comments() -> None:
    text = TEXT.replace(
        "{path: s3://bucket/data}", "  # made\n  path: s3://b/d  # made by\n  workers: 2 #two\n  #path: x"
    )
    assert parse_config(text).data.path == "s3://b/d"
    assert parse_config(TEXT, ["data.path=a#1"]).data.path == "a#1"


def test_all_that_yaml_would_misread_is_listed() -> None:
    text = "data:\n  path: data #1\n  cache_dir: None\n  path: x\nema: {rates: [none]}\n"
    assert [line.split()[:4] for line in lines_of(text)] == [
        ["a.yaml,", "line", "2:", "#1"],
        ["a.yaml,", "line", "3:", "None"],
        ["a.yaml,", "line", "4:", "'path'"],
        ["a.yaml,", "line", "5:", "none"],
    ]
    (line,) = lines_of("data: {path: data #1}\n")
    assert "#1} behind 'data' is a comment in YAML" in line


@pytest.mark.parametrize("word", ["None", "none"])
def test_pythons_none_is_refused_and_null_is_meant(word: str) -> None:
    (line,) = lines_of(f"{TEXT}evaluate: {{reference: {word}}}")
    assert line == f"a.yaml, line 6: {word} is text in YAML; write null, or quote it: '{word}'"


def test_yes_and_no_are_words_where_true_and_false_are_meant() -> None:
    (line,) = lines_of(TEXT.replace("{path:", "{flip: no, path:"))
    assert line == "a.yaml, line 3: data.flip: got 'no'; it should be true or false"


def test_a_key_given_twice_and_broken_yaml_name_their_lines() -> None:
    assert lines_of(f"{TEXT}train: {{}}\n") == [
        "a.yaml, line 6: 'train' is given twice, first in line 5; remove one of them"
    ]
    (line,) = lines_of(f"{TEXT}engine: [\n")
    assert line.startswith("a.yaml, line 7: not YAML: ")


@pytest.mark.parametrize("slip", ["log_every:5", "log_every:\u00a05", "log_every = 5"])
@pytest.mark.parametrize("lines", ["{slip}\n  seed: 1", "seed: 1\n  {slip}\n  keep: 2"])
def test_a_missing_space_behind_a_colon_is_named(slip: str, lines: str) -> None:
    said = lines_of(f"{TEXT.replace('train:', 'x:')}train:\n  {lines.format(slip=slip)}\n")
    number = 7 if lines.startswith("{") else 8
    assert said == [
        f"a.yaml, line {number + 1}: not YAML: a space is missing; line {number}: write log_every: 5",
    ]


def test_other_broken_yaml_keeps_its_own_words() -> None:
    (line,) = lines_of(f"{TEXT}wandb:\n  mode: off\n  project: a: b\n")
    assert line == "a.yaml, line 8: not YAML: mapping values are not allowed here"


def test_a_second_document_in_a_file_is_named() -> None:
    (line,) = lines_of(f"{TEXT}---\n{TEXT}")
    assert line == "a.yaml, line 6: a second document begins here (---); write one config per file"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("train.total_steps = 5", "has spaces around =; write train.total_steps=5"),
        ("data.path=#5", "data.path: #5 is a comment in YAML, not a value; quote it: data.path='\"#5\"'"),
        ("TRAIN.SEED=5", "TRAIN.SEED: unknown key; did you mean train.seed?"),
    ],
)
def test_slips_of_the_command_line_say_what_to_write(given: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_config(TEXT, [given])
    assert str(refused.value).endswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('# c\n[method]\nkind = "ct"\n', "a.yaml: TOML or INI, not YAML: write [method] as method: and its keys "),
        ('{\n  // c\n  "method": {"kind": "ct"}\n}\n', "a.yaml: JSON with comments, not YAML (line 2): begin comments"),
        ('{\n"a": 1\n"b": 2}\n', "a.yaml, line 3: not YAML: a comma or the closing } is missing before this"),
        ('{"a": 1}\n{"b": 2}\n', "a.yaml, line 2: not YAML: more text after the end of the config; a config is one"),
        ("a:\n  b: 1\n c: 2\n", "a.yaml, line 3: not YAML: not in line with what is above; indent the keys of a sect"),
        ("a: {{ b }}\n", "a.yaml, line 1: not YAML: braces or a list in place of a key; write KEY: VALUE, and text w"),
        ("PK\3\4\n", "a.yaml, line 1: not YAML: holds the character U+0003, as binary files do; remove it, or give a "),
    ],
)
def test_what_is_no_yaml_is_said_in_words_of_a_config(text: str, said: str) -> None:
    (line,) = lines_of(text)
    assert line.startswith(said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x7fELF\2\1\0\xff", "is no text but a binary file; give a YAML file"),
        ("a: 1\n".encode("utf-16"), "is text in UTF-16; save it in UTF-8"),
        (b"a: 1\nb: caf\xe9\n", "line 2 is not in UTF-8; save the file in UTF-8"),
    ],
)
def test_a_file_that_is_no_text_in_utf_8_is_one_plain_line(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_config(tmp_path / "a.yaml")
    assert str(caught.value) == f"config {tmp_path}/a.yaml: {said}"
