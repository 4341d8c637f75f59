"""Knows every key of the config: its section, type, bounds, default and description."""

import types
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cmscale.config.methods import METHODS_BY_KIND
from cmscale.config.models import Config
from cmscale.config.section import Section

MAPPINGS = frozenset({"slurm.extra"})
"""Keys whose values have names of their own: slurm.extra.switches=1."""

_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
_TYPES = {int: "whole number", float: "number", bool: "true or false", str: "text", types.NoneType: "null"}


@dataclass(frozen=True)
class Key:
    """A key of the config, as it is declared in one section.

    Attributes:
        name: Dotted: `train.seed`.
        kinds: The values of `method.kind` that have it in this form; empty if every config has it.
        allowed: Types and bounds in words.
        default: `...` if it must be given.
        changes_losses: Whether a resumed run must keep its value.
        source: Where the default comes from.
    """

    name: str
    kinds: tuple[str, ...]
    allowed: str
    default: Any = field(hash=False)
    description: str
    unit: str
    source: str
    changes_losses: bool

    @property
    def is_required(self) -> bool:
        """Whether a config must have the key."""
        return self.default is ...


@cache
def known_keys(model: type[BaseModel] = Config) -> tuple[str, ...]:
    """Every dotted key that a config may hold, those of all methods included."""
    return tuple(dict.fromkeys(name for name, _, _ in _leaves(model)))


@cache
def all_keys() -> tuple[Key, ...]:
    """Every key, section by section. A key that methods declare differently comes once for each form."""
    forms: dict[Key, list[str]] = {}
    of_method: dict[type[BaseModel], str] = {section: kind for kind, section in METHODS_BY_KIND.items()}
    for name, info, section in _leaves(Config):
        kinds = forms.setdefault(_key(name, info), [])
        if section in of_method:
            kinds.append(of_method[section])
    found = [
        replace(key, kinds=() if len(kinds) == len(METHODS_BY_KIND) else tuple(kinds)) for key, kinds in forms.items()
    ]
    order = {name: index for index, name in enumerate(known_keys())}
    return tuple(sorted(found, key=lambda each: order[each.name]))


def sections() -> dict[str, str]:
    """What each section holds, by its name."""
    found = {}
    for name, info in Config.model_fields.items():
        parts = [part for part in alternatives(info.annotation) if is_section(part)]
        found[name] = (
            "The training method: `kind`, and the keys of that method."
            if len(parts) > 1
            else (parts[0].__doc__ or "").partition("\n\n")[0]
        )
    return found


def alternatives(annotation: Any) -> list[Any]:
    """The parts of a union; a type that is none is its only part."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [part for arg in get_args(annotation) for part in alternatives(arg)]
    return [annotation]


def is_section(part: Any) -> bool:
    """Whether a type is a section of the config."""
    return isinstance(part, type) and issubclass(part, Section)


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo, type[BaseModel]]]:
    for name, info in model.model_fields.items():
        inner = [part for part in alternatives(info.annotation) if is_section(part)]
        for section in inner:
            yield from _leaves(section, f"{prefix}{name}.")
        if not inner:
            yield f"{prefix}{name}", info, model


def _key(name: str, info: FieldInfo) -> Key:
    """A key as one section declares it."""
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    if name == "method.kind":
        kinds = "; ".join(f"{kind}: {section.facts.title}" for kind, section in METHODS_BY_KIND.items())
        return Key(name, (), ", ".join(METHODS_BY_KIND), ..., f"The training method. {kinds}.", "", "", True)
    return Key(
        name,
        (),
        _in_words(info),
        ... if info.default is PydanticUndefined else info.default,
        info.description or "",
        str(extra.get("unit") or ""),
        str(extra.get("source") or ""),
        changes_losses=not extra.get("operational"),
    )


def _in_words(info: FieldInfo) -> str:
    parts = [_type_in_words(part, list(info.metadata)) for part in _annotated(info.annotation)]
    return " or ".join(dict.fromkeys(parts))


def _annotated(annotation: Any) -> list[Any]:
    """The parts of a union with their bounds."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for arg in get_args(annotation) for part in _annotated(arg)]
    return [annotation]


def _type_in_words(annotation: Any, metadata: list[Any]) -> str:
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata = [*metadata, *more]
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is tuple:
        inner, *others = get_args(annotation)
        count = "" if others == [...] else f"{1 + len(others)} "
        return f"list of {count}{_plural(_type_in_words(inner, []))}"
    if get_origin(annotation) is dict:
        return "names and values"
    shown = _TYPES.get(annotation, str(annotation))
    bounds = [*_bounds(metadata)] if annotation in (int, float) else []
    return f"{shown} {' and '.join(bounds)}" if bounds else shown


def _plural(words: str) -> str:
    return words.replace("number", "numbers", 1).replace("text", "texts", 1)


def _bounds(metadata: list[Any]) -> Iterator[str]:
    for each in metadata:
        for inner in getattr(each, "metadata", None) or [each]:  # a Field in Annotated holds its bounds in metadata
            for name, words in _BOUNDS.items():
                if (value := getattr(inner, name, None)) is not None:
                    yield f"{words} {value:g}" if isinstance(value, float) else f"{words} {value}"


def written(value: Any) -> str:
    """A value as `key=value` takes it: `[1,2]`, `null`, `true`."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(written, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {written(each)}' for name, each in value.items())}}}"
    return f"{value:.12g}" if isinstance(value, float) else str(value)
