"""Explains mistakes in configs: one line for each, with its place, the value given and the values allowed."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from cmscale.config.keys import MAPPINGS, known_keys, sections
from cmscale.config.methods import KINDS
from cmscale.config.usual_words import meant_by
from cmscale.config.wording import shown, what_is_wrong
from cmscale.errors import UserError

_MOST_SHOWN = 20
_LONGEST_KEY = 200


@dataclass(frozen=True)
class Mistake:
    """A key, and what is wrong with it, in words.

    Attributes:
        problem: `missing` and `unknown` belong together where one is a misspelling of the other.
    """

    key: str
    why: str
    problem: str = ""


def refusal(mistakes: Iterable[Mistake], where: Callable[[str], str]) -> UserError:
    """The error that names mistakes, one line each.

    Args:
        where: The place of a key, which its line begins with.
    """
    lines = [
        f"{where(each.key)}: {each.key}: {each.why}" if each.key else f"{where('')}: {each.why}" for each in mistakes
    ]
    lines = list(dict.fromkeys(lines))
    if len(lines) > _MOST_SHOWN:
        lines = [*lines[: _MOST_SHOWN - 1], f"{where('')}: and {len(lines) - _MOST_SHOWN + 1} more mistakes"]
    return UserError(*lines)


def explain(error: ValidationError, *, section: str = "", more: Sequence[Mistake] = ()) -> list[Mistake]:
    """Pydantic's errors as mistakes.

    Args:
        section: The section that was validated; empty for a whole config.
        more: Mistakes that were found before.
    """
    found: dict[str, Mistake] = {}
    for each in error.errors(include_url=False):
        mistake = _explained(dict(each), section)
        earlier = found.get(mistake.key)
        found[mistake.key] = mistake if earlier is None else _either(earlier, mistake)
    return joined([*more, *found.values()])


def joined(mistakes: Sequence[Mistake]) -> list[Mistake]:
    """The mistakes, with a misspelt key and the key that is missing for it as one."""
    missing = [each.key for each in mistakes if each.problem == "missing"]
    meant: dict[str, str] = {}
    for each in mistakes:
        left = [key for key in missing if key not in meant.values()]
        if each.problem == "unknown" and (close := _missing_for(each.key[:_LONGEST_KEY], left)):
            meant[each.key] = close[0]
    return [
        Mistake(each.key, f"unknown key; did you mean {meant[each.key]}, which is missing?")
        if each.problem == "unknown" and each.key in meant
        else each
        for each in mistakes
        if not (each.problem == "missing" and each.key in meant.values())
    ]


def _missing_for(key: str, missing: list[str]) -> list[str]:
    """Those of the missing keys that an unknown key may be meant for."""
    return [each for each in meant_by(key) if each in missing] or difflib.get_close_matches(key, missing, 1, 0.6)


def unknown(key: str) -> Mistake:
    """An unknown key, with what may be meant."""
    if key in sections():  # on the command line
        return Mistake(key, f"is a section; give its keys one by one, as {key}.KEY=VALUE")
    what = "unknown section" if "." not in key else "unknown key"
    return Mistake(key, f"{what}{suggestion(key)}", "unknown")


def suggestion(key: str) -> str:
    """`; did you mean train.seed?`, or nothing if no known key is usually called so or resembles it."""
    if len(key) > _LONGEST_KEY:
        return ""
    leaf = key.lower().rpartition(".")[2]
    if meant := meant_by(key) or [known for known in known_keys() if known.partition(".")[2] == leaf]:
        return f"; did you mean {' or '.join(meant)}?"
    candidates = known_keys() if "." in key else (*sections(), *(known.partition(".")[2] for known in known_keys()))
    close = difflib.get_close_matches(key.lower(), candidates, n=1, cutoff=0.5)
    return f"; did you mean {_whole(close[0])}?" if close else ""


def _whole(name: str) -> str:
    """The dotted key of a leaf's name; the name itself if it is dotted, or a section's."""
    if "." in name or name in sections():
        return name
    return " or ".join(key for key in known_keys() if key.partition(".")[2] == name)


def _explained(error: dict[str, Any], section: str) -> Mistake:
    path = [str(part) for index, part in enumerate(error["loc"]) if not (index == 1 and part in KINDS)]
    path = [section, *path] if section else path
    while len(path) > 2 and ".".join(path[:-1]) in known_keys() and not path[-1].isdecimal():
        path.pop()  # the branch of a union: slurm.time.int
    key = ".".join(path)
    match error["type"]:
        case "extra_forbidden" if key in known_keys() and len(error["loc"]) == 1:
            head, _, leaf = key.rpartition(".")
            return Mistake(key, f"a key with a dot is for the command line; write {leaf} in the section {head}")
        case "extra_forbidden" if key in known_keys():
            return Mistake(key, f"not a key of method.kind {error['loc'][1]}; remove it")
        case "extra_forbidden":
            return unknown(key)
        case "missing" if isinstance(error["loc"][-1], int):  # of a list with a fixed number of values
            return Mistake(".".join(path[:-1]), f"got {shown(error['input'])}; it should have more values")
        case "missing":
            return Mistake(key, "is missing and has no default; set it", "missing")
        case "union_tag_not_found":
            return _without_kind(key, error["input"])
        case "union_tag_invalid":
            tag, allowed = shown(error["ctx"].get("tag")), error["ctx"].get("expected_tags")
            return Mistake(f"{key}.kind", f"got {tag}; allowed: {allowed}")
        case "value_error":
            return _of_section(key, str(error["ctx"]["error"]))
        case _:
            return Mistake(key, what_is_wrong(error))


def _without_kind(key: str, given: Any) -> Mistake:
    """A section of the method without `kind`, which may be misspelt."""
    allowed = ", ".join(KINDS)
    others = [name for name in given if isinstance(name, str)] if isinstance(given, dict) else []
    others = [name for name in others if f"{key}.{name}" not in known_keys()]
    if close := difflib.get_close_matches("kind", [name[:_LONGEST_KEY] for name in others], n=1, cutoff=0.5):
        return Mistake(f"{key}.{close[0]}", f"unknown key; did you mean {key}.kind ({allowed}), which is missing?")
    return Mistake(f"{key}.kind", f"is missing; set it to one of {allowed}", "missing")


def _of_section(key: str, why: str) -> Mistake:
    """What a check over a whole section found: its message begins with the key that is wrong, if there is one."""
    leaf, colon, rest = why.partition(": ")
    for name in (f"{key}.{leaf}" if key else leaf, leaf):
        if colon and (name in known_keys() or key in MAPPINGS):
            return Mistake(name, rest)
    return Mistake(key, why)


def _either(one: Mistake, other: Mistake) -> Mistake:
    """What two branches of a union say of the same value."""
    same, _, rest = other.why.partition("; it should be ")
    if rest and one.why.startswith(same):
        return Mistake(one.key, f"{one.why} or {rest}", one.problem)
    return one
