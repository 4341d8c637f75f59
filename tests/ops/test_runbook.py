"""The runbook names events that the code writes and messages that it prints; documents name files that exist."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", *(f"ops/{path.name}" for path in sorted((CHECKOUT / "ops").glob("*.md")))]
CODE = [path for root in ("cmscale", "launchers", "data_prep") for path in sorted((CHECKOUT / root).rglob("*.py"))]
WRITERS = {"write_event", "_event", "_report", "report", "ended"}  # functions that take an event's name
VALUE = re.compile(r"\S*\.\.\.\S*|[A-Z]+|\d+|step N")  # stands for a value in a quoted message
LEAST_LETTERS = 6  # of a message in the code: shorter strings are in any text


PRINTED_BY_SLURM = {"scontrol requeue J: ..."}


@cache
def messages() -> list[re.Pattern[str]]:
    """The strings of the code as patterns with one group per formatted value."""
    found = set()
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [node.value]
            else:
                continue
            if sum(map(str.isalpha, "".join(str(part or "") for part in parts))) >= LEAST_LETTERS:
                found.add("".join("(.*)" if part is None else re.escape(str(part)) for part in parts))
    return [re.compile(pattern, re.DOTALL) for pattern in found]


def is_printed(quote: str) -> bool:
    """Whether a quote is a message of the code. Its values, and what `: ` and `; ` join, may be messages as well."""
    if not quote or VALUE.fullmatch(quote):
        return True
    for pattern in messages():
        matched = pattern.fullmatch(quote)
        if matched and all(is_printed(value) for value in matched.groups()):
            return True
    joints = [joint.span() for joint in re.finditer(r"[:;] |(?<=.)(?= \()", quote)]
    return any(is_printed(quote[:begin]) and is_printed(quote[end:]) for begin, end in joints)


def sources_of_events(node: ast.AST) -> list[ast.expr]:
    """The expressions of a node that give an event its name: arguments of a writer, or values of a name `event`."""
    match node:
        case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called)) if called in WRITERS:
            return node.args
        case ast.Assign(targets=[target], value=value) | ast.For(target=target, iter=value):
            is_event = "event" in {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}
            return [value] if is_event else []
        case _:
            return []


@cache
def events() -> set[str]:
    """The names with which the code calls the functions that write events."""
    names: set[str] = set()
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            found = ast.walk(ast.Tuple(sources_of_events(node)))
            constants = {str(part.value) for part in found if isinstance(part, ast.Constant)}
            names |= {name for name in constants if re.fullmatch("[a-z]+(_[a-z]+)*", name)}
    prefixes = ("", "evaluation_", "sampling_")  # launchers.submission adds them
    of_mirrors = {f"{mirror}_failed" for mirror in ("wandb", "tensorboard")}  # cmscale.training.mirror adds the name
    return {f"{prefix}{name}" for prefix in prefixes for name in names} | of_mirrors


def quotes() -> Iterator[str]:
    """What is in backticks in the first column of the runbook's tables."""
    for line in (CHECKOUT / "ops" / "runbook.md").read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| what you see"):
            yield from re.findall(r"`([^`]+)`", line.split(" | ")[0])


def test_the_runbooks_events_are_written() -> None:
    quoted = {quote for quote in quotes() if re.fullmatch("[a-z]+(_[a-z]+)*", quote)} - {"why"}
    assert len(quoted) >= 20
    assert not quoted - events()


@pytest.mark.parametrize("quote", sorted({quote for quote in quotes() if " " in quote} - PRINTED_BY_SLURM))
def test_the_runbooks_messages_are_printed(quote: str) -> None:
    """The launchers print `error: `, `fault: ` and `stopped: ` before a reason, events the type of an error."""
    assert is_printed(re.sub(r"^((error|fault|stopped|[A-Za-z]+Error|DamagedUpload|StorageAway): )*", "", quote))


@pytest.mark.parametrize("quote", ["no step within 1800 s; look in ...", "failed 11 times: WHY", "fauld_event"])
def test_other_messages_are_noticed(quote: str) -> None:
    assert not is_printed(quote)
    assert quote not in events()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_files_that_a_document_names_exist(document: str) -> None:
    text = re.sub(r"```.*?```|<!--.*?-->", "", (CHECKOUT / document).read_text(), flags=re.DOTALL)
    named = set(re.findall(r"(?<![\w/.])(?:cmscale|launchers|data_prep|configs|ops|tests)/[\w./*-]+", text))
    absent = {name for name in named if not any(CHECKOUT.glob(name.rstrip("./"))) and "NAME" not in name}
    assert not {name for name in absent if "GROUP" not in name}
