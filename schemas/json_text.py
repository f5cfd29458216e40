"""Writes JSON as text that fits any file, and reads JSON of any origin."""

import json
from typing import Any


def dump_json(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON in readable characters. Lone surrogates, as in file names that are no UTF-8, become escapes."""
    return well_formed(json.dumps(value, ensure_ascii=False, indent=indent))


def load_json(text: str | bytes, *, strict: bool = False, **parsers: Any) -> Any:
    """The value in `text`; `parsers` are further arguments of `json.loads`.

    `strict` refuses a key that occurs twice, and NaN and infinities, which Python takes though JSON has neither.
    Raises ValueError for everything that is wrong, and nothing else."""
    if strict:
        parsers = {"object_pairs_hook": _without_doubles, "parse_constant": _refuse_constant} | parsers
    try:
        return json.loads(text, **parsers)
    except RecursionError as error:
        raise ValueError("JSON nested too deep") from error


def load_object(text: str | bytes, *, strict: bool = False, **parsers: Any) -> dict[str, Any]:
    """The object in `text`, read as by `load_json`. Raises ValueError for any other value too."""
    value = load_json(text, strict=strict, **parsers)
    if not isinstance(value, dict):
        raise ValueError("JSON that is not an object")
    return value


def load_strings(text: str) -> list[str]:
    """The list of strings in `text`, read as by `load_json`. Raises ValueError for any other value."""
    value = load_json(text)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("JSON that is not a list of strings")
    return value


def well_formed(text: str) -> str:
    """`text` with lone surrogates as escapes (\\udcff), which UTF-8 can encode."""
    return text.encode("utf-8", "backslashreplace").decode()


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that occurs twice: two readers might take different values."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} occurs twice")
        values[key] = value
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
