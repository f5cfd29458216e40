"""JSON documents with something odd in them: what nobody writes on purpose, and programs stumble over."""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

Place = tuple[str | int, ...]

# As JSON texts, since not all of them are values.
ODD = (
    *"null true -1 0 1 2 3 5 1.5 -0.0 1e999 NaN Infinity -Infinity 1000000 1000000000 2147483648".split(),
    *"9223372036854775807 9223372036854775808 18446744073709551616".split(),
    "9" * 400,
    "9" * 5000,
    *'"" "x" "3" "F32" "I64" "F8_E4M3" "BOOL" "." ".." "../x" "/" "/dev/zero" "a/b" "a\\u0000b"'.split(),
    *'"\\ud800" "\\u202e" "\\u001b[31m" "[red]x[/]" "[/]" "\\n"'.split(),
    '"' + "ü" * 300 + '"',
    '"' + "x" * 100_000 + '"',
    *"[] [[]] [0] [-1] [1] [1.0] [true] [null] {} [0,0] [1,1] [3,0] [0,9223372036854775807] [NaN]".split(),
    *'[65536,65536,65536,65536] ["x"] [[["x"]]] {"a":{}} [1000000000,1000000000]'.split(),
    "[" * 500 + "]" * 500,
    "[" * 200_000,
    '{"a":' * 100_000,
    "[" + "1," * 1000 + "1]",
    *"[1 } nul 'x' 0x10 01 +1 .5 \t".split(),
)


def places(document: Any, above: Place = ()) -> Iterator[Place]:
    """The path to everything in a JSON document, the document itself included."""
    yield above
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in inner:
        yield from places(value, (*above, key))


def with_odd(document: Any, place: Place, odd: str) -> str:
    """The document as JSON text, with the text `odd` at `place`."""
    mark = "\x7fhere\x7f"
    return json.dumps(_changed(document, place, lambda parent, key: parent.__setitem__(key, mark))).replace(
        json.dumps(mark), odd
    )


def without(document: Any, place: Place) -> str:
    return json.dumps(_changed(document, place, lambda parent, key: parent.__delitem__(key)))


def doubled(document: Any, place: Place) -> str:
    """The document with a key that stands twice, or an item that does."""
    value = document
    for key in place:
        value = value[key]
    text = json.dumps(value)
    key = f"{json.dumps(place[-1])}: " if place and isinstance(place[-1], str) else ""
    return with_odd(document, place, f"{text}, {key}{text}")


def renamed(document: Any, place: Place, odd: str) -> str:
    """The document with another key at `place`, where there is a key."""
    if not place or isinstance(place[-1], int):
        return with_odd(document, place, odd)
    name = odd if odd.startswith('"') else json.dumps(odd)
    mark = "\x7fhere\x7f"
    changed = _changed(document, place, lambda parent, key: parent.update({mark: parent.pop(key)}))
    return json.dumps(changed).replace(json.dumps(mark), name)


def _changed(document: Any, place: Place, change: Callable[[Any, str | int], None]) -> Any:
    root = [copy.deepcopy(document)]
    parent: Any = root
    for key in (0, *place)[:-1]:
        parent = parent[key]
    change(parent, (0, *place)[-1])
    return root[0] if root else None
