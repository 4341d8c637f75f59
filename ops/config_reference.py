"""Writes what is made from the keys of the config: the reference page and the schema for editors.

`python ops/config_reference.py` writes ops/config_reference.md and configs/config.schema.json.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from cmscale.config import json_schema  # noqa: E402
from cmscale.config.keys import Key, all_keys, sections, written  # noqa: E402

PAGE = CHECKOUT / "ops" / "config_reference.md"
SCHEMA = CHECKOUT / "configs" / "config.schema.json"

_INTRODUCTION = """# Keys of the config

`python ops/config_reference.py` writes this page from the declarations in `cmscale/config`; `cmscale config explain
KEY` prints the same. A key in **bold** must be given. A key with * changes the losses: a resumed run keeps its value.
"""


def page() -> str:
    """The reference page, Markdown."""
    lines = [_INTRODUCTION]
    for section, what in sections().items():
        lines += [f"## {section}", "", what, "", "| key | value | default | what it does |", "|---|---|---|---|"]
        lines += [_row(key) for key in all_keys() if key.name.startswith(f"{section}.")]
        lines.append("")
    return "\n".join(lines)


def schema() -> str:
    """The JSON Schema of a config file."""
    return json.dumps(json_schema(), indent=1) + "\n"


def _row(key: Key) -> str:
    name = f"`{key.name}`"
    name = f"**{name}**" if key.is_required else name
    mark = " *" if key.changes_losses else ""
    default = "" if key.is_required else f"`{written(key.default)}`"
    cells = [f"{name}{mark}", f"{key.allowed}{f', {key.unit}' if key.unit else ''}", default, " ".join(_text(key))]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _text(key: Key) -> Iterator[str]:
    if key.kinds:
        yield f"({', '.join(key.kinds)})"
    yield key.description
    if key.source:
        yield f"Source of the default: {key.source}."


def main() -> None:
    PAGE.write_text(page())
    SCHEMA.write_text(schema())
    print(PAGE)
    print(SCHEMA)


if __name__ == "__main__":
    main()
