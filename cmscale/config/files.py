"""Reads and writes configs: strict YAML, `key=value` overrides, every mistake explained in one line."""

import difflib
import json
import re
import reprlib
import sys
import types
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from cmscale.config.added import with_added_keys
from cmscale.config.layers import COMMAND_LINE, Layer, make_room, merged
from cmscale.config.methods import KINDS
from cmscale.config.models import Config
from cmscale.config.renamed import RENAMED, with_current_names
from cmscale.config.section import Section
from cmscale.errors import UserError
from cmscale.io.place import Place
from cmscale.io.reading import read_small, reason

_LARGEST = 1 << 20  # bytes of a config
_LONGEST_KEY = 200
_SHOWN = reprlib.Repr()  # of a value in a message: YAML's aliases can make it endless
_SHOWN.maxstring = _SHOWN.maxother = 200

_TAG = "tag:yaml.org,2002:"

AnySection = TypeVar("AnySection", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2, without repeated keys.

    1e-4 is a number and 0o100 is 64. `on`, 010, 24:00:00 and 2024-01-01 are text, where YAML 1.1 reads true, 8, 86400
    and a date. Besides, 600_000 is a number, as in YAML 1.1.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (the base class's table with null and << alone)
        first: [(tag, pattern) for tag, pattern in resolvers if tag in (f"{_TAG}null", f"{_TAG}merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == f"{_TAG}merge":
                continue  # refused below, or no key
            if (key.tag, key.value) in seen:
                raise UserError(f"config: {key.value!r} is given twice{node.start_mark}; remove one of them")
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node)).replace("_", "")
        base = {"0o": 8, "0x": 16}.get(text[:2].lower(), 10)
        value = int(text[2:] if base != 10 else text, base)
        if not -(2**63) <= value < 2**63:
            raise ValueError("a whole number of more than 64 bits")
        return value


class _Dumper(yaml.SafeDumper):
    """Quotes text that any YAML, 1.1 or 1.2, would read as something else."""


_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+|[-+]?(\d+\.\d*|\.\d+)|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
)
for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_integer)


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
        UserError: there is no such file, it is not YAML, or a key or value is not allowed.
    """
    text = read_yaml_text(Place(path).local("a config"), what="config")
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
    tree = _current_names(parse_sections(text, origin), origin)
    if resolved:
        tree = with_added_keys(tree)
    return validated(Config, [*beneath, Layer(origin, tree)], overrides or [], origin=origin, origins=origins)


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
        UserError: a key or value is not allowed.
    """
    tree, found = merged(layers)
    for override in _current_overrides(overrides):
        found[_apply(tree, override, among=overrides)] = COMMAND_LINE
    if origins is not None:
        origins.update(found)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(error)}") from None


def read_yaml_text(path: Path, *, what: str) -> str:
    """The text of a YAML file.

    Raises:
        UserError: there is no such file, or it can't be read.
    """
    content = read_small(path, what=f"a {what}", limit=_LARGEST)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path}: can't be read ({error}); give a YAML file in UTF-8") from None


def parse_sections(text: str, origin: str) -> dict[str, Any]:
    """The sections in the text of a YAML file.

    Raises:
        UserError: it is not YAML, or holds no sections.
    """
    tree = parse_yaml(text, origin=origin)
    if not isinstance(tree, dict):
        raise UserError(f"{origin}: holds {type(tree).__name__}; write sections (method, model, data, ...)")
    return tree


def dump_config(config: Config) -> str:
    """Every value of a config as YAML, defaults included; `parse_config` reads it as the same config."""
    values = json.loads(config.model_dump_json())
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a config file, for editors."""
    return Config.model_json_schema()


def parse_yaml(text: str, *, origin: str) -> Any:
    """The content of YAML text: see `_Loader`.

    Raises:
        UserError: it is not YAML, or a value is none of its own type (`!!int abc`).
    """
    try:
        return yaml.load(text, _Loader)
    except UserError:
        raise
    except yaml.YAMLError as error:
        raise UserError(f"{origin}: not YAML: {error}") from None
    except Exception as error:  # constructors raise what int(), float() and their like raise
        raise UserError(f"{origin}: not YAML that can be read: {reason(error)}") from None


def _current_names(tree: dict[str, Any], origin: str) -> dict[str, Any]:
    """The tree of a file with its old keys renamed."""
    try:
        current, old_keys = with_current_names(tree)
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from None
    _report_old_keys(tuple(old_keys), origin)
    return current


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


def _apply(tree: dict[str, Any], override: str, *, among: Sequence[str]) -> str:
    """Sets the value of an override, one of those in `among`. Returns the dotted key."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: write it as key=value, for example train.seed=1")
    if key not in known_keys() and key.rpartition(".")[0] not in _MAPPINGS:
        raise UserError(f"override {override!r}: unknown key{suggestion(key)}")
    *sections, leaf = key.split(".")
    for section in sections:
        tree[section] = {} if tree.get(section) is None else tree[section]
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {section} holds a value in the file; make it a section there")
    value = parse_yaml(text, origin=f"override {override!r}") if text else None
    others = {name.rpartition(".")[2] for name in (one.partition("=")[0] for one in among)}
    make_room(tree, ".".join(sections), {**dict.fromkeys(others), leaf: value})
    tree[leaf] = value
    return key


_MAPPINGS = frozenset({"slurm.extra"})  # keys whose values have names of their own: slurm.extra.switches=1


def suggestion(key: str) -> str:
    if len(key) > _LONGEST_KEY:
        return ""
    close = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def explain(error: ValidationError, *, section: str = "") -> str:
    """The first of pydantic's errors as one line: key, value given, values allowed.

    Args:
        section: The section that was validated; empty for a whole config.
    """
    first: Any = error.errors(include_url=False)[0]
    path = [str(part) for index, part in enumerate(first["loc"]) if not (index == 1 and part in KINDS)]
    path = [section, *path] if section else path
    key = ".".join(path)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    match first["type"]:
        case "extra_forbidden" if key in known_keys():
            return f"{key}: not a key of method.kind {first['loc'][1]}; remove it{more}"
        case "extra_forbidden":
            return f"{key}: unknown key{suggestion(key)}{more}"
        case "missing":
            return f"{key}: is missing and has no default; set it{more}"
        case "union_tag_not_found":
            return f"{key}.kind: is missing; set it to one of {', '.join(KINDS)}{more}"
        case "union_tag_invalid":
            tag, allowed = _SHOWN.repr(first["ctx"].get("tag")), first["ctx"].get("expected_tags")
            return f"{key}.kind: got {tag}; allowed: {allowed}{more}"
        case "value_error":
            return f"{key}: {first['ctx']['error']}{more}" if key else f"{first['ctx']['error']}{more}"
        case _:
            given = first["input"]
            simple = given is None or isinstance(given, (int, float, str, list, tuple))
            shown = _SHOWN.repr(given) if simple else type(given).__name__
            return f"{key}: got {shown}; {first['msg'].replace('Input should', 'it should')}{more}"


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key that a config may hold, those of all methods included."""
    found: list[str] = []
    for name, field in model.model_fields.items():
        sections = [part for part in alternatives(field.annotation) if is_section(part)]
        for section in sections:
            found += [key for key in known_keys(section, f"{prefix}{name}.") if key not in found]
        if not sections:
            found.append(f"{prefix}{name}")
    return found


def alternatives(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [part for arg in get_args(annotation) for part in alternatives(arg)]
    return [annotation]


def is_section(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, Section)
