"""The two loaders of YAML read the same: a fast one for usual text, and one that says what is wrong."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from cmscale.config import dump_config, read_config, yaml_text
from cmscale.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
LINES = sorted({line for path in CONFIGS for line in dump_config(read_config(path)).splitlines()})
PIECES = [
    *"\n :,-#[]{}'\"=/~.019aeo_+^$<;()",
    "\n  ",
    ": ",
    " #",
    "0o",
    "0x",
    "1e",
    ".nan",
    "null",
    "true",
    "None",
    "---\n",
]


def read(text: str) -> tuple[str, dict[str, int]] | str:
    try:
        found = yaml_text.parse_sections(text, "text")
    except UserError as error:
        return str(error)
    return repr(found.tree), dict(found.lines)


class Everything:
    """In the place of `_UNUSUAL`: finds something in every text."""

    def search(self, text: str) -> Any:
        return self


def read_slowly(text: str) -> tuple[str, dict[str, int]] | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml_text, "_UNUSUAL", Everything())
        return read(text)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_read_the_same(path: Path) -> None:
    for text in (path.read_text(), dump_config(read_config(path))):
        assert read(text) == read_slowly(text)


@settings(max_examples=400)
@given(some.data())
def test_a_changed_config_is_read_the_same_or_refused_with_the_same_words(data: some.DataObject) -> None:
    text = "\n".join(data.draw(some.lists(some.sampled_from(LINES), min_size=1, max_size=4)))
    for _ in range(data.draw(some.integers(1, 4))):
        at = data.draw(some.integers(0, len(text)))
        text = text[:at] + data.draw(some.sampled_from(PIECES)) + text[at + data.draw(some.integers(0, 1)) :]
    assert read(text) == read_slowly(text)


def test_a_resolved_config_is_read_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a run, which `cmscale runs` reads for each."""
    monkeypatch.setattr(yaml_text, "_Loader", None)
    assert yaml_text.parse_yaml(dump_config(read_config(CONFIGS[0])), origin="text")["model"]["image_size"] == 16


@pytest.mark.parametrize(
    "text", ["[" * 400_000, "{a: " * 200_000, "- " * 400_000, "-  " * 300_000], ids=["lists", "maps", "items", "spaced"]
)
def test_values_in_values_without_end_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="nested too deeply"):
        yaml_text.parse_yaml(text, origin="text")
