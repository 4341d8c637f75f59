"""Reads and writes configs: strict YAML and `key=value` overrides, every mistake explained in one line."""

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cmscale.config.added import with_added_keys
from cmscale.config.keys import MAPPINGS, known_keys
from cmscale.config.layers import COMMAND_LINE, Layer, make_room, merged
from cmscale.config.mistakes import Mistake, explain, joined, refusal, unknown
from cmscale.config.models import Config
from cmscale.config.renamed import RENAMED, with_current_names
from cmscale.config.yaml_text import Sections, dump_yaml, parse_sections, parse_value, place, read_yaml_text
from cmscale.errors import UserError
from cmscale.io.place import Place

AnySection = TypeVar("AnySection", bound=BaseModel)


def read_config(
    path: str | Path,
    overrides: list[str] | None = None,
    *,
    resolved: bool = False,
    beneath: Sequence[Layer] = (),
    origins: dict[str, str] | None = None,
) -> Config:
    """Reads a YAML file and applies `section.key=value` overrides (values in YAML: `[1,2]`, `null`, `1e-4`).

    Args:
        resolved: The file is the config.yaml of a run, which holds every key of the release that wrote it: added keys
            get the values that older releases worked with, not their defaults.
        beneath: Layers of defaults, the lowest first, which the file's values replace.
        origins: Gets the origin of each value that is no default, by dotted key.

    Raises:
        UserError: there is no such file, it is not YAML, or keys or values are not allowed; one line for each.
    """
    file = Place(path).local("a config")
    if file.is_dir():
        wanted = f"{path}/config.yaml" if (file / "config.yaml").is_file() else "a config file"
        raise UserError(f"{path}: is a folder; give {wanted}")
    text = read_yaml_text(file, what="config")
    return parse_config(text, overrides, origin=str(path), resolved=resolved, beneath=beneath, origins=origins)


def parse_config(
    text: str,
    overrides: list[str] | None = None,
    *,
    origin: str = "config",
    resolved: bool = False,
    beneath: Sequence[Layer] = (),
    origins: dict[str, str] | None = None,
) -> Config:
    """Parses the text of a config file like `read_config`; `origin` is its name in messages."""
    found = _current_names(parse_sections(text, origin), origin)
    tree = with_added_keys(found.tree) if resolved else found.tree
    layers = [*beneath, Layer(origin, tree, found.lines)]
    return validated(Config, layers, overrides or [], origin=origin, origins=origins)


def parse_tree(tree: dict[str, Any], *, origin: str) -> Config:
    """The resolved config in the document of a run, a checkpoint's manifest for example."""
    return validated(Config, [Layer(origin, with_added_keys(tree))], [], origin=origin)


def validated(
    model: type[AnySection],
    layers: Sequence[Layer],
    overrides: list[str],
    *,
    origin: str,
    origins: dict[str, str] | None = None,
) -> AnySection:
    """The sections of `model` with the values of layers, the lowest first, and of overrides over them.

    Args:
        origin: The name of all of this in messages.
        origins: Gets the origin of each value that is no default, by dotted key.

    Raises:
        UserError: keys or values are not allowed; one line for each.
    """
    tree, found = merged(layers)
    wrong: list[Mistake] = []
    for override in _current_overrides(overrides):
        applied = _apply(tree, override, among=overrides)
        if isinstance(applied, Mistake):
            wrong.append(applied)
            applied = applied.key
        found[applied] = COMMAND_LINE
    if origins is not None:
        origins.update(found)

    def where(key: str) -> str:
        return _place_of(key, layers, found, origin)

    try:
        checked = model.model_validate(tree)
    except ValidationError as error:
        raise refusal(explain(error, more=wrong), where) from None
    if wrong:
        raise refusal(joined(wrong), where)
    return checked


def _place_of(key: str, layers: Sequence[Layer], origins: Mapping[str, str], whole: str) -> str:
    """The place of a key's value, or of the section that lacks it: `FILE, line N`."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for layer in reversed(layers):
            if name in layer.lines and origins.get(name, layer.origin) == layer.origin:
                return place(layer.origin, layer.lines[name])
        if name in origins:
            return origins[name]
    return whole


def dump_config(config: Config) -> str:
    """Every value of a config as YAML, defaults included; `parse_config` reads it as the same config."""
    return dump_yaml(config.model_dump(mode="json"))


def _current_names(found: Sections, origin: str) -> Sections:
    """The sections of a file with their old keys renamed."""
    try:
        current, old_keys = with_current_names(found.tree)
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from None
    _report_old_keys(tuple(old_keys), origin)
    lines = {RENAMED[key]: found.lines[key] for key in old_keys if key in found.lines}
    return Sections(current, {**found.lines, **lines})


def _current_overrides(overrides: list[str]) -> list[str]:
    """The overrides with old keys renamed. They replace a file's values under either name."""
    keys = [override.partition("=")[0] for override in overrides]
    old_keys = tuple(key for key in keys if key in RENAMED)
    for key in old_keys:
        if RENAMED[key] in keys:
            raise UserError(f"overrides: {key} is the old name of {RENAMED[key]}, and both are given; remove {key}")
    _report_old_keys(old_keys, "overrides")
    return [
        f"{RENAMED[key]}{override.removeprefix(key)}" if key in RENAMED else override
        for key, override in zip(keys, overrides, strict=True)
    ]


@cache
def _report_old_keys(old_keys: tuple[str, ...], origin: str) -> None:
    """One line on stderr per file and process."""
    if old_keys:
        renamed = ", ".join(f"{key} as {RENAMED[key]}" for key in old_keys)
        print(f"{origin}: old keys are read under their current names ({renamed}); write those", file=sys.stderr)


def _apply(tree: dict[str, Any], override: str, *, among: Sequence[str]) -> str | Mistake:
    """Sets the value of an override, one of those in `among`. Returns the dotted key, or what is wrong with it."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return Mistake("", f"override {override!r}: write it as key=value, for example train.seed=1")
    if key != key.strip() and key.strip() in known_keys():
        return Mistake("", f"override {override!r}: has spaces around =; write {key.strip()}={text.strip()}")
    if text.lstrip().startswith("#"):
        return Mistake(key, f"{text.strip()} is a comment in YAML, not a value; quote it: {key}='\"{text.strip()}\"'")
    if key not in known_keys() and key.rpartition(".")[0] not in MAPPINGS:
        return unknown(key)
    *sections, leaf = key.split(".")
    for section in sections:
        tree[section] = {} if tree.get(section) is None else tree[section]
        tree = tree[section]
        if not isinstance(tree, dict):
            return Mistake(key, f"{section} holds a value in the file; make it a section there")
    try:
        value = parse_value(text, origin=f"override {override!r}") if text else None
    except UserError as error:
        return Mistake("", str(error))
    others = {name.rpartition(".")[2] for name in (one.partition("=")[0] for one in among)}
    make_room(tree, ".".join(sections), {**dict.fromkeys(others), leaf: value})
    tree[leaf] = value
    return key
