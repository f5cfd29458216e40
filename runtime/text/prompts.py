"""Prompts with weights and of any length, as what the text encoder makes of them.

Both are opt in; without them a text is read as it stands and what does not fit 77 tokens is cut, as in diffusers.

Weights use the syntax of AUTOMATIC1111's web UI (`parse_prompt_attention` in its modules/prompt_parser.py), see
`parse_weights`. They are applied as ComfyUI does (`encode_token_weights` in its comfy/sd1_clip.py): at a token of
weight w the hidden state z becomes

    z_empty + w * (z - z_empty)

with z_empty the hidden state of the empty prompt at the same position. Opening, closing and padding tokens weigh 1,
and so does the pooled vector.

A long text is cut into chunks of at most 75 tokens, each encoded by itself between an opening and a closing token.
Their hidden states are joined on the token axis, (77 * k, channels), and the pooled vector is the first chunk's, as in
ComfyUI and the web UI: it is the only one that belongs to how the text begins, and a mean of several vectors is none
the decoder was trained on. Texts of fewer chunks are filled up with the empty prompt, so that all have the same length.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...schemas.errors import UsageError
from ...schemas.limits import MAX_PROMPT_CHARACTERS, MAX_PROMPT_CHUNKS
from .tokenizer import END, LENGTH, START, ClipTokenizer, Token

F32 = NDArray[np.float32]
Encode = Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]

ROOM = LENGTH - 2  # tokens of a chunk besides the opening and the closing one
BACK = 20  # how far from its end a full chunk may be cut; the web UI's default
STRONGER, WEAKER = 1.1, 1 / 1.1
MOST = 10.0  # far beyond what gives a picture

_SYNTAX = re.compile(
    r"""
    \\(?P<escaped>[()\[\]\\])
    | : \s* (?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)) \s* \)
    | [()\[\]:\\]
    | [^()\[\]:\\]+
    """,
    re.VERBOSE,
)
_CLOSING = {")": ("(", STRONGER), "]": ("[", WEAKER)}


class Part(NamedTuple):
    """A piece of a prompt, free of syntax, and how much it counts."""

    text: str
    weight: float


@dataclass(frozen=True)
class EncodedTexts:
    """What the text encoder makes of B texts; k is the number of chunks of the longest, 1 unless asked for more."""

    clip_text: F32  # (B, 77 * k, channels)
    pooled: F32  # (B, 1, channels)
    truncated: tuple[str, ...]  # of each text what did not fit, free of syntax; "" where all did


@dataclass(frozen=True)
class _Chunk:
    """What lies between one opening and closing token; one weight for each id."""

    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


def parse_weights(text: str) -> tuple[Part, ...]:
    r"""The parts of `text` with their weights, neighbours of the same weight joined.

    (a) multiplies by 1.1, [a] divides by 1.1, (a:1.3) multiplies by 1.3, and what is nested multiplies. A bracket that
    is never closed reaches to the end; one that was never opened is text, and so is a number outside (). \( \) \[ \]
    and \\ are the characters themselves. That is the web UI's syntax, with these differences: a backslash before
    anything else stays (there it vanishes), brackets that cancel leave exactly 1, and BREAK is a word like any other.

    Raises UsageError for a weight below 0 or above 10, and for what `check_length` refuses.
    """
    check_length(text)
    texts: list[str] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where in `texts` what is still open begins
    factors: list[tuple[int, int, float]] = []  # from, to, factor

    for match in _SYNTAX.finditer(text):
        found, number = match[0], match["number"]
        opening, factor = ("(", float(number)) if number else _CLOSING.get(found, ("", 1.0))
        if found in opened:
            opened[found].append(len(texts))
        elif opening and opened[opening]:
            factors.append((opened[opening].pop(), len(texts), factor))
        else:
            texts.append(match["escaped"] or found)

    factors += [(start, len(texts), factor) for opening, factor in _CLOSING.values() for start in opened[opening]]
    weights = np.ones(len(texts))
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
        for start, stop, factor in factors:
            weights[start:stop] *= factor
        rounded = weights.round(9).tolist()
    pieces = zip(texts, rounded, strict=True)
    joined = groupby(pieces, key=lambda piece: piece[1])
    parts = tuple(Part("".join(one for one, _ in group), _checked(weight, text)) for weight, group in joined)
    return parts or (Part("", 1.0),)


def check_length(text: str) -> None:
    """Raise UsageError for a prompt of more characters than are read."""
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise UsageError(
            f"{text[:30]!r}...: a prompt of {len(text)} characters; expected at most {MAX_PROMPT_CHARACTERS}"
        )


def encode_texts(
    texts: Sequence[str],
    tokenizer: ClipTokenizer,
    encode: Encode,
    *,
    weighted: bool = False,
    long: bool = False,
    batch: int = 16,
) -> EncodedTexts:
    """Embed `texts` (B of them): read with `parse_weights` if `weighted`, cut into chunks instead of cut off if `long`.

    `encode` is the text encoder, from input_ids and attention_mask (n, 77) int64 to prompt_embeds (n, 77, channels) and
    pooled (n, 1, channels) float32. It is called with at most `batch` rows at a time, each of them once.

    Raises UsageError when there are no texts, when one of them is not text, and as `parse_weights` does.
    """
    if isinstance(texts, str) or not texts or batch < 1:
        raise UsageError(f"expected a list of prompts and a batch of at least 1, got {texts!r:.60}, {batch}")
    chunked, truncated = [], []
    for index, text in enumerate(texts):
        chunks, rest = _chunks(text, f"prompt {index}", tokenizer, weighted, long)
        chunked.append(chunks)
        truncated.append(rest)
    most = max(map(len, chunked))
    filled = [[*chunks, *[_Chunk()] * (most - len(chunks))] for chunks in chunked]

    needs_empty = any(weight != 1 for chunk in chain(*filled) for weight in chunk.weights)
    unique = dict.fromkeys([chunk.ids for chunk in chain(*filled)] + [()] * needs_empty)
    hidden, pooled = _encode_rows(list(unique), encode, batch)
    place = {ids: row for row, ids in enumerate(unique)}

    def state(chunk: _Chunk) -> F32:  # (77, channels)
        plain = hidden[place[chunk.ids]]
        return plain if set(chunk.weights) <= {1} else _weighted(plain, hidden[place[()]], chunk.weights)

    clip_text = np.stack([np.concatenate([state(chunk) for chunk in chunks]) for chunks in filled])
    return EncodedTexts(clip_text, pooled[[place[chunks[0].ids] for chunks in filled]], tuple(truncated))


def split(tokens: Sequence[Token]) -> Iterator[slice]:
    """Where to cut a text of many tokens into chunks of at most 75.

    A full chunk is cut after the last comma among its last 20 tokens, as in the web UI. Where that has no comma it
    cuts anywhere; here, as in ComfyUI, the cut is moved before the word it would go through, if that began no more
    than 20 tokens ago.
    """
    start = 0
    while len(tokens) - start > ROOM:
        stop = _cut(tokens, start + ROOM)
        yield slice(start, stop)
        start = stop
    yield slice(start, len(tokens))


def _cut(tokens: Sequence[Token], full: int) -> int:
    if tokens[full].is_comma:  # a phrase ends right here
        return full
    places = range(full, full - BACK, -1)
    after_comma = (place for place in places if tokens[place - 1].is_comma)
    between_words = (place for place in places if tokens[place].opens_word)
    return next(chain(after_comma, between_words), full)


def _chunks(text: str, name: str, tokenizer: ClipTokenizer, weighted: bool, long: bool) -> tuple[list[_Chunk], str]:
    """The chunks of `text`, at least one, and what did not fit. Parts are tokenized apart, as every user interface
    does: a weight that starts within a word makes two words of it."""
    if isinstance(text, str):
        check_length(text)
    parts = parse_weights(text) if weighted and isinstance(text, str) else (Part(text, 1.0),)
    pairs = [(token, index) for index, part in enumerate(parts) for token in tokenizer.split(part.text, name)]
    tokens = [token for token, _ in pairs]
    weights = [parts[index].weight for _, index in pairs]
    cuts = list(split(tokens)) if long else [slice(ROOM)]
    if len(cuts) > MAX_PROMPT_CHUNKS:
        raise UsageError(f"{name}: {len(cuts)} chunks of 75 tokens; expected at most {MAX_PROMPT_CHUNKS}; shorten it")
    chunks = [_Chunk(tuple(token.id for token in tokens[cut]), tuple(weights[cut])) for cut in cuts]
    if long or len(tokens) <= ROOM:
        return chunks, ""
    token, index = pairs[ROOM]
    return chunks, "".join([parts[index].text[token.start :], *(part.text for part in parts[index + 1 :])]).strip()


def _encode_rows(rows: Sequence[tuple[int, ...]], encode: Encode, batch: int) -> tuple[F32, F32]:
    """Hidden states (n, 77, channels) and pooled vectors (n, 1, channels) of n chunks' ids."""
    input_ids = np.full((len(rows), LENGTH), END, np.int64)
    attention_mask = np.zeros_like(input_ids)
    input_ids[:, 0] = START
    for row, ids in enumerate(rows):
        input_ids[row, 1 : 1 + len(ids)] = ids
        attention_mask[row, : len(ids) + 2] = 1
    outputs = [
        encode({"input_ids": input_ids[at : at + batch], "attention_mask": attention_mask[at : at + batch]})
        for at in range(0, len(rows), batch)
    ]
    return _joined(outputs, "prompt_embeds"), _joined(outputs, "pooled")


def _joined(outputs: Iterable[Mapping[str, NDArray[Any]]], name: str) -> F32:
    return np.concatenate([output[name] for output in outputs])


def _weighted(hidden: F32, empty: F32, weights: Sequence[float]) -> F32:
    """`hidden` (77, channels) with the tokens after the opening one moved away from `empty`, or towards it."""
    result = hidden.copy()
    at = slice(1, 1 + len(weights))
    factors = np.asarray(weights, np.float32)[:, None]
    result[at] = np.where(factors == 1, hidden[at], empty[at] + factors * (hidden[at] - empty[at]))
    return result


def _checked(weight: float, text: str) -> float:
    if not 0 <= weight <= MOST:  # NaN too
        raise UsageError(
            f"{text[:60]!r}: expected weights from 0 to {MOST:g}, found {weight:g}; lower it, use the negative prompt "
            r"for what is to be absent, or write \( \) \[ \] for brackets that are text"
        )
    return weight
