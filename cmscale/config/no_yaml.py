"""Says what is wrong with a file that is no YAML, in words of a config rather than of a parser."""

import re

import yaml

_NO_SPACE = re.compile(r"([a-z_0-9]+)(?::[^\S ]*(?![ /])|\s*=\s*)(\S.*)")
"""A line such as `log_every:50`, `log_every = 50`, or with a space that is none of YAML's; not s3://bucket."""
_TABLE = re.compile(r"\[+([^\][,]+)\]+\s*(?:[#;].*)?")
_BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_AT_HAND = (
    ("expected '<document start>'", "more text after the end of the config; a config is one YAML mapping of sections"),
    ("expected ',' or '}'", "a comma or the closing } is missing before this"),
    ("expected ',' or ']'", "a comma or the closing ] is missing before this"),
    ("expected <block end>", "not in line with what is above; indent the keys of a section alike"),
    ("found unhashable key", "braces or a list in place of a key; write KEY: VALUE, and text with braces in quotes"),
)
"""How problems of the parser begin, and what they mean."""


def worded(error: yaml.MarkedYAMLError, text: str) -> str:
    """What is wrong with text that is no YAML; the commonest slips by what was meant."""
    if error.problem == "but found another document":
        return "a second document begins here (---); write one config per file"
    lines, number = text.splitlines(), 0 if error.problem_mark is None else error.problem_mark.line  # from 0
    for at in (each for each in (number, number - 1) if 0 <= each < len(lines)):
        indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
        if odd := indent.strip(" "):
            named = "a tab" if odd[0] == "\t" else f"U+{ord(odd[0]):04X}, which looks like a space"
            return f"not YAML: line {at + 1} is indented by {named}; indent by spaces"
    is_unspaced = error.problem in ("could not find expected ':'", "mapping values are not allowed here")
    if number and is_unspaced and (slip := _NO_SPACE.match(lines[number - 1].strip())) is not None:
        return f"not YAML: a space is missing; line {number}: write {slip[1]}: {slip[2]}"
    problem = error.problem or error.context or ""
    return f"not YAML: {next((meant for start, meant in _AT_HAND if problem.startswith(start)), problem)}"


def unprintable(error: yaml.reader.ReaderError) -> str:
    """What is wrong with text that holds a character that YAML does not allow."""
    return f"not YAML: holds the character U+{error.character:04X}, as binary files do; remove it, or give a YAML file"


def undecodable(content: bytes, error: UnicodeDecodeError) -> str:
    """What is wrong with a file that is no text in UTF-8."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "is text in UTF-16; save it in UTF-8"
    if _BINARY.search(content):
        return "is no text but a binary file; give a YAML file"
    line = content.count(b"\n", 0, error.start) + 1
    return f"line {line} is not in UTF-8; save the file in UTF-8"


def other_format(text: str) -> str | None:
    """That a text is TOML, INI, or JSON with comments, if it is."""
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line and line[0] not in "#;"]
    if len(lines) > 1 and (table := _TABLE.fullmatch(lines[0][1])):
        return f"TOML or INI, not YAML: write [{table[1]}] as {table[1]}: and its keys indented below it, as KEY: VALUE"
    comment = next((number for number, line in lines if line.startswith(("//", "/*"))), None)
    if comment is not None and lines[0][1].startswith(("{", "//", "/*")):
        return f"JSON with comments, not YAML (line {comment}): begin comments with #, or remove them"
    return None
