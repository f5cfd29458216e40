"""JSON from anybody: one kind of error whatever is wrong, and the strict reading of formats that forbid more."""

import math

import pytest

from cascadekit.schemas.json_text import dump_json, load_json, load_object


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, b"\xff", '{"a":' * 100_000])
def test_whatever_is_wrong_is_a_value_error(text: str | bytes) -> None:
    for read in (load_json, load_object):
        with pytest.raises(ValueError, match=r"."):
            read(text)


@pytest.mark.parametrize("text", ["[]", "1", "null", '"x"'])
def test_an_object_is_asked_for(text: str) -> None:
    load_json(text)
    with pytest.raises(ValueError, match="JSON that is not an object"):
        load_object(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"a": 1, "a": 2}', "the key 'a' occurs twice"), ('{"a": NaN}', "NaN is not JSON"), ("[-Infinity]", "-Infinity")],
)
def test_strict_reading(text: str, message: str) -> None:
    load_json(text)
    with pytest.raises(ValueError, match=message):
        load_json(text, strict=True)


def test_further_parsers() -> None:
    assert load_object('{"a": 1.5}', strict=True, parse_float=lambda text: f"<{text}>") == {"a": "<1.5>"}
    assert math.isnan(load_json("NaN"))


def test_lone_surrogates_become_escapes() -> None:
    assert dump_json({"name": "a\udcff"}) == '{"name": "a\\udcff"}'
