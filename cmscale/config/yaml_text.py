"""Reads and writes YAML: strict, with the scalars of YAML 1.2 and the line of every key."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cmscale.config.no_yaml import other_format, undecodable, unprintable, worded
from cmscale.config.written import with_text
from cmscale.errors import UserError
from cmscale.io.reading import read_small, reason

_LARGEST = 1 << 20  # bytes of a file
_DEEPEST = 3  # levels of keys whose lines are kept: slurm.extra.switches
_TAG = "tag:yaml.org,2002:"
_TEXT = f"{_TAG}str"

_UNUSUAL = re.compile(r"[^\n -~]|[?!&*%@`|>\\]|- +- |\b[Nn]one\b|\s#[^\s#]")
"""What `_FastLoader` leaves to `_Loader`: values that are refused, and what the two may read differently."""
_MOST_BRACKETS = 500  # libyaml has no bound for values in values, but for the stack


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2, without repeated keys and without values that only look right.

    1e-4 is a number and 0o100 is 64. `on`, 010, 24:00:00 and 2024-01-01 are text, where YAML 1.1 reads true, 8, 86400
    and a date. Besides, 600_000 is a number, as in YAML 1.1, but not 2024_01, which may be an account. `None` is
    refused, as it would be text, and so is text that `#1` behind it cuts, which would be a comment.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (the base class's table with null and << alone)
        first: [(tag, pattern) for tag, pattern in resolvers if tag in (f"{_TAG}null", f"{_TAG}merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str, *, origin: str) -> None:
        super().__init__(text)
        self._text = text
        self._origin = origin
        self.mistakes: list[tuple[int, str]] = []
        """The lines of values that only look right, and what is wrong with each."""

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if node.style is None and node.tag == _TEXT and node.value:
            self._check_plain(node)
        return node

    def _check_plain(self, node: yaml.ScalarNode) -> None:
        if node.value in ("None", "none"):
            self._note(node, f"{node.value} is text in YAML; write null, or quote it: '{node.value}'")
        behind = re.compile(r"[ \t]+(#[^\s#!][^\n]*)").match(self._text, node.end_mark.index)
        if behind is not None:
            comment = behind[1].split()[0]
            self._note(
                node,
                f"{comment} behind {node.value!r} is a comment in YAML, not a part of the value; quote the value "
                f"('{node.value} {comment}'), or leave a space behind the #",
            )

    def _note(self, node: yaml.Node, mistake: str) -> None:
        self.mistakes.append((_line(node), f"{place(self._origin, _line(node))}: {mistake}"))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, first in _repeated(node):
            self._note(key, f"{key.value!r} is given twice, first in line {first}; remove one of them")
        return super().construct_mapping(node, deep)


_libyaml: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # some builds of PyYAML have none


class _FastLoader(_libyaml):
    """Reads what `_Loader` reads, several times as fast: for text without anything unusual, and without mistakes."""

    yaml_implicit_resolvers = {first: list(those) for first, those in _Loader.yaml_implicit_resolvers.items()}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if any(_repeated(node)):
            raise ValueError("a key is given twice")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that any YAML, 1.1 or 1.2, would read as something else, and text that `_Loader` refuses."""


_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*|[1-9][0-9]{0,2}(_[0-9]{3})+)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+|[-+]?(\d+\.\d*|\.\d+)|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
)
for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _FastLoader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Dumper.add_implicit_resolver(f"{_TAG}null", re.compile(r"^(?:None|none)$"), ["N", "n"])


def _construct_integer(loader: Any, node: yaml.ScalarNode) -> int | float:
    written = str(loader.construct_scalar(node))
    text = written.replace("_", "")
    base = {"0o": 8, "0x": 16}.get(text[:2].lower(), 10)
    value = int(text[2:] if base != 10 else text, base)
    if not -(2**63) <= value < 2**63:
        raise ValueError("a whole number of more than 64 bits; quote it if it is text")
    return with_text(value, written)


def _construct_float(loader: Any, node: yaml.ScalarNode) -> int | float:
    return with_text(loader.construct_yaml_float(node), str(node.value))


for _class in (_Loader, _FastLoader):
    _class.add_constructor(f"{_TAG}int", _construct_integer)
    _class.add_constructor(f"{_TAG}float", _construct_float)
_Dumper.add_multi_representer(int, _Dumper.represent_int)
_Dumper.add_multi_representer(float, _Dumper.represent_float)


@dataclass(frozen=True)
class Sections:
    """The sections of a YAML file.

    Attributes:
        tree: Values by section and key.
        lines: The line of each, by dotted key, from 1.
    """

    tree: dict[str, Any]
    lines: Mapping[str, int]


def place(origin: str, line: int | None) -> str:
    """A place in a file, for messages; values of the command line have no lines that matter."""
    return origin if line is None or origin.startswith("override ") else f"{origin}, line {line}"


def read_yaml_text(path: Path, *, what: str) -> str:
    """The text of a YAML file.

    Raises:
        UserError: there is no such file, or it can't be read.
    """
    content = read_small(path, what=f"a {what}", limit=_LARGEST)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path}: {undecodable(content, error)}") from None


def parse_yaml(text: str, *, origin: str) -> Any:
    """The content of YAML text: see `_Loader`.

    Raises:
        UserError: it is not YAML, or a value is none of its own type (`!!int abc`).
    """
    return _parse(text, origin)[0]


def parse_value(text: str, *, origin: str) -> Any:
    """The value in the text of an override.

    Raises:
        UserError: as `parse_yaml`, or a text in it has several lines, which YAML would join by spaces.
    """
    value, node = _parse(text, origin)
    if any(each.style not in ("|", ">") and each.start_mark.line < each.end_mark.line for each in _scalars(node)):
        raise UserError(f"{origin}: a text in it has several lines, which YAML would join by spaces; write it in one")
    return value


def parse_sections(text: str, origin: str) -> Sections:
    """The sections in the text of a YAML file.

    Raises:
        UserError: it is not YAML, or holds no sections.
    """
    tree, node = _parse(text, origin)
    if not isinstance(tree, dict):
        held = {type(None): "is empty", list: "holds a list"}.get(type(tree), "holds a single value")
        raise UserError(f"{origin}: {held}; write sections (method, model, data, ...)")
    return Sections(tree, {name: _line(key) for name, key in _keys(node)})


def dump_yaml(values: Any) -> str:
    """Values as YAML text that `parse_yaml` reads as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110)


def _parse(text: str, origin: str) -> tuple[Any, yaml.Node | None]:
    if _UNUSUAL.search(text) is None and text.count("[") + text.count("{") <= _MOST_BRACKETS:
        try:
            return _read(_FastLoader(text))
        except Exception:
            pass  # `_Loader` says what is wrong
    try:
        loader = _Loader(text, origin=origin)
        try:
            return _read(loader)
        finally:
            if loader.mistakes:  # also where it is no YAML: `{path: a #1}` has no end
                raise UserError(*(text for _, text in sorted(loader.mistakes)))
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        if other := other_format(text):
            raise UserError(f"{origin}: {other}") from None
        line = None if error.problem_mark is None else error.problem_mark.line + 1
        raise UserError(f"{place(origin, line)}: {worded(error, text)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{place(origin, line)}: {unprintable(error)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{origin}: not YAML: {error}") from None
    except Exception as error:  # constructors raise what int(), float() and their like raise
        raise UserError(f"{origin}: not YAML that can be read: {reason(error)}") from None


def _read(loader: Any) -> tuple[Any, yaml.Node | None]:
    try:
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(node), node
    finally:
        loader.dispose()


def _repeated(node: yaml.MappingNode) -> Iterator[tuple[yaml.ScalarNode, int]]:
    """Keys of a mapping that were there before, and the line of the key before."""
    seen: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == f"{_TAG}merge":
            continue  # refused by yaml, or no key
        if (first := seen.get((key.tag, key.value))) is not None:
            yield key, first
        seen[(key.tag, key.value)] = _line(key)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _scalars(whole: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    """The single values in a value, each once, as aliases may hold one a thousand times, or itself."""
    left: list[Any] = [whole]
    seen: set[int] = set()
    while left:
        node = left.pop()
        if isinstance(node, yaml.ScalarNode):
            yield node
        elif isinstance(node, tuple):  # a key and its value
            left += node
        elif node is not None and id(node) not in seen:
            seen.add(id(node))
            left += node.value


def _keys(node: yaml.Node | None, prefix: str = "", depth: int = 1) -> Iterator[tuple[str, yaml.Node]]:
    """Each key, by dotted name."""
    if not isinstance(node, yaml.MappingNode) or depth > _DEEPEST:
        return
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            name = f"{prefix}{key.value}"
            yield name, key
            yield from _keys(value, f"{name}.", depth + 1)
