"""JSON as text that every file takes, and from text that anybody may have written."""

import json
from typing import Any


def dump_json(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON in readable characters. Lone surrogates, as in file names that are no UTF-8, become escapes."""
    return well_formed(json.dumps(value, ensure_ascii=False, indent=indent))


def load_json(text: str | bytes) -> Any:
    """The value in `text`. Raises ValueError alone, for text that is nested too deep as well."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def well_formed(text: str) -> str:
    """`text` with lone surrogates as escapes (\\udcff), which is what can be written as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
