"""From a sound input and random numbers to an odd one."""

import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

from .odd_json import ODD, Place, doubled, places, renamed, with_odd, without

MOST_CHANGES = 3
FEW = (0, 1, 0x7F, 0x80, 0xFF)
NUMBERS = (0, 1, -1, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def odd_json(document: Any, rng: random.Random, anywhere: Sequence[Place] = ()) -> bytes:
    """The document as JSON with one thing changed: a value, a key, an entry gone or there twice; seldom its bytes.

    `anywhere` are the places that may change; all of them unless told."""
    place = rng.choice(anywhere or list(places(document)))
    odd = rng.choice(ODD)
    how: Callable[[], str] = rng.choice(
        (
            lambda: with_odd(document, place, odd),
            lambda: with_odd(document, place, odd),
            lambda: renamed(document, place, odd),
            lambda: without(document, place),
            lambda: doubled(document, place),
        )
    )
    text = how().encode("utf-8", "surrogatepass")
    return odd_bytes(text, rng) if rng.random() < 0.15 else text


def odd_bytes(data: bytes, rng: random.Random, within: int | None = None) -> bytes:
    """The bytes with a few changes, in the first `within` of them or anywhere."""
    for _ in range(rng.randint(1, MOST_CHANGES)):
        at = rng.randrange(max(1, min(len(data), within or len(data))))
        data = rng.choice(BYTE_CHANGES)(data, at, rng)
    return data


def _flipped(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else data


def _replaced(data: bytes, at: int, rng: random.Random) -> bytes:
    new = bytes(rng.choice(FEW) if rng.random() < 0.5 else rng.randrange(256) for _ in range(rng.randint(1, 8)))
    return data[:at] + new + data[at + len(new) :]


def _numbered(data: bytes, at: int, rng: random.Random) -> bytes:
    new = struct.pack(rng.choice("<>") + "Q", rng.choice(NUMBERS) % 2**64)[: rng.choice((2, 4, 8))]
    return data[:at] + new + data[at + len(new) :]


def _inserted(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[:at] + rng.randbytes(rng.randint(1, 8)) + data[at:]


def _dropped(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[:at] + data[at + rng.randint(1, 100) :]


def _cut(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[:at]


def _spliced(data: bytes, at: int, rng: random.Random) -> bytes:
    """A piece of the data once more, elsewhere."""
    start = rng.randrange(len(data) + 1)
    return data[:at] + data[start : start + rng.randint(1, 200)] + data[at:]


BYTE_CHANGES = (_flipped, _flipped, _replaced, _numbered, _inserted, _dropped, _cut, _spliced)


def safetensors(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]
