import pytest

from cmscale.io.json_text import parse_json


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "", "{", b"\xff\xfe", "9" * 5_000, b"\0\0"])
def test_whatever_is_wrong_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_good_text_is_parsed() -> None:
    assert parse_json(b'{"a": [1, null, 2.5]}') == {"a": [1, None, 2.5]}
