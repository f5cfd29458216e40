"""Prompts to embeddings: weights, chunks of 77 tokens, and the text encoder with its cache.

By default a text is read without syntax and cut off after 77 tokens, as in diffusers. Weights and long texts are
opt-in.

Weights have the syntax of `prompt_weights`. They are applied as ComfyUI does (`encode_token_weights` in its
comfy/sd1_clip.py): at a token of weight w the hidden state z becomes

    z_empty + w * (z - z_empty)

with z_empty the hidden state of the empty prompt at the same position. Opening, closing and padding tokens have the
weight 1. The pooled vector has no weights.

A long text is cut into chunks of at most 75 tokens; each chunk is encoded by itself between an opening and a closing
token. The hidden states of all chunks are joined on the token axis: (77 * k, channels). The pooled vector comes from
the first chunk, as in ComfyUI and the web UI, because the decoder was not trained on a mean of several vectors. Texts
of fewer chunks are filled up with the empty prompt, so that all have the same length.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.errors import UsageError
from ...schemas.limits import MAX_PROMPT_CHUNKS
from ...schemas.messages import shown, with_shapes
from ..engines.protocol import F32, Run, Tensors
from .prompt_weights import WeightedText, parse_weights
from .tokenizer import ClipTokenizer, Token, token_rows
from .tokenizer_file import LENGTH

Encode = Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]

ROOM = LENGTH - 2  # tokens of a chunk besides the opening and the closing one
BACK = 20  # tokens before its end within which a full chunk may be cut; the web UI's default
CACHED_ROWS = 256  # of 77 tokens each; a row takes 400 kB at the width of CLIP bigG


@dataclass(frozen=True)
class PromptEmbeds:
    """The embeddings of B prompts and their B negative prompts, all float32.

    T is 77 times the number of chunks. The arrays may also come from another text encoder. Raises UsageError for arrays
    whose shapes do not fit together.

    Examples:
        >>> cascade.generate(embeds=PromptEmbeds(clip_text, pooled, negative_clip_text, negative_pooled))
    """

    clip_text: F32  # (B, T, channels)
    pooled: F32  # (B, 1, channels)
    negative_clip_text: F32  # (B, T, channels)
    negative_pooled: F32  # (B, 1, channels)
    truncated: tuple[str, ...] = ()  # the text that did not fit, of each prompt and then of each negative prompt

    __repr__ = with_shapes

    def __post_init__(self) -> None:
        text, pooled = self.clip_text.shape, self.pooled.shape
        negative = self.negative_clip_text.shape, self.negative_pooled.shape
        if (text, pooled) != negative or text[:1] != pooled[:1]:
            raise UsageError(
                "embeddings: expected a row for each prompt, and negative ones of the same shapes; "
                f"found clip_text {text} and pooled {pooled}, negative {negative[0]} and {negative[1]}"
            )

    def __len__(self) -> int:
        return len(self.clip_text)

    def row(self, number: int) -> "PromptEmbeds":
        """The embeddings of prompt `number` and its negative prompt alone."""
        rows, text = slice(number, number + 1), self.truncated[number :: len(self)]
        pair = self.negative_clip_text[rows], self.negative_pooled[rows]
        return PromptEmbeds(self.clip_text[rows], self.pooled[rows], *pair, text)

    def repeated(self, count: int) -> "PromptEmbeds":
        """Every prompt `count` times in a row: embeddings of B * count prompts."""
        rows = np.repeat(np.arange(len(self)), count)
        text, negative_text = self.clip_text[rows], self.negative_clip_text[rows]
        return PromptEmbeds(text, self.pooled[rows], negative_text, self.negative_pooled[rows], self.truncated)


@dataclass(frozen=True)
class EncodedTexts:
    """The embeddings of B texts. k is the number of chunks of the longest text, 1 unless long texts are read."""

    clip_text: F32  # (B, 77 * k, channels)
    pooled: F32  # (B, 1, channels)
    truncated: tuple[str, ...]  # of each text the part that did not fit, without syntax, or ""


@dataclass(frozen=True)
class _Chunk:
    """The token ids between one opening and one closing token, and a weight for each id."""

    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


def encode_texts(
    texts: Sequence[str],
    tokenizer: ClipTokenizer,
    encode: Encode,
    *,
    weighted: bool = False,
    long: bool = False,
    batch: int = 16,
) -> EncodedTexts:
    """Embed B `texts`. `weighted` reads the syntax of weights; `long` encodes the text beyond 77 tokens in chunks.

    `encode` is the text encoder, from input_ids and attention_mask (n, 77) int64 to prompt_embeds (n, 77, channels) and
    pooled (n, 1, channels) float32. It is called with at most `batch` rows at a time, and once for equal rows.

    Raises UsageError when one of them is no text, and as `parse_weights` does.
    """
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


def as_texts(text: str | Sequence[str]) -> list[str]:
    """One text or several texts as a list. Raises UsageError for what is neither."""
    if not isinstance(text, str | Sequence):
        raise UsageError(f"prompt {shown(text)}: expected a text, or a list of texts")
    return [text] if isinstance(text, str) else list(text)


class CachedTextEncoder:
    """The text encoder with a cache: rows of tokens that were encoded before are not encoded again."""

    def __init__(self, use: Callable[[], AbstractContextManager[Run]]) -> None:
        """`use` brings the stage into memory; it is called only for rows that are not in the cache."""
        self._use = use
        self._rows: OrderedDict[bytes, dict[str, NDArray[Any]]] = OrderedDict()  # in the order of their last use

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """input_ids and attention_mask (B, 77) int64 to prompt_embeds (B, 77, c) and pooled (B, 1, c) float32."""
        keys = [
            ids.tobytes() + mask.tobytes()
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        new = {key: place for place, key in enumerate(keys) if key not in self._rows}
        if new:
            with self._use() as encode:
                outputs = encode({name: value[list(new.values())] for name, value in inputs.items()})
            self._rows |= {key: {name: value[row] for name, value in outputs.items()} for row, key in enumerate(new)}
        for key in keys:
            self._rows.move_to_end(key)
        found = {name: np.stack([self._rows[key][name] for key in keys]) for name in self._rows[keys[0]]}
        while len(self._rows) > CACHED_ROWS:
            self._rows.popitem(last=False)
        return found


def split(tokens: Sequence[Token]) -> Iterator[slice]:
    """Cut a text of many tokens into chunks of at most 75.

    A full chunk is cut after the last comma among its last 20 tokens, as in the web UI. Without a comma the web UI cuts
    anywhere. Here, as in ComfyUI, the cut never goes through a word that began at most 20 tokens before it."""
    start = 0
    while len(tokens) - start > ROOM:
        stop = _end_of_chunk(tokens, start + ROOM)
        yield slice(start, stop)
        start = stop
    yield slice(start, len(tokens))


def _end_of_chunk(tokens: Sequence[Token], full: int) -> int:
    if tokens[full].is_comma:  # a phrase ends right here
        return full
    places = range(full, full - BACK, -1)
    after_comma = (place for place in places if tokens[place - 1].is_comma)
    between_words = (place for place in places if tokens[place].opens_word)
    return next(chain(after_comma, between_words), full)


def _chunks(text: str, name: str, tokenizer: ClipTokenizer, weighted: bool, long: bool) -> tuple[list[_Chunk], str]:
    """The chunks of `text`, at least one, and the part of it that did not fit.

    Pieces of different weight are tokenized separately, as in every user interface: a weight that starts within a word
    makes two words of it."""
    parts = parse_weights(text) if weighted and isinstance(text, str) else (WeightedText(text, 1.0),)
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
    input_ids, attention_mask = token_rows(rows)
    outputs = [
        encode({"input_ids": input_ids[at : at + batch], "attention_mask": attention_mask[at : at + batch]})
        for at in range(0, len(rows), batch)
    ]
    hidden, pooled = (np.concatenate([each[name] for each in outputs]) for name in ("prompt_embeds", "pooled"))
    return hidden, pooled


def _weighted(hidden: F32, empty: F32, weights: Sequence[float]) -> F32:
    """Move the tokens of `hidden` (77, channels) after the opening one away from `empty`, or towards it."""
    result = hidden.copy()
    at = slice(1, 1 + len(weights))
    factors = np.asarray(weights, np.float32)[:, None]
    result[at] = np.where(factors == 1, hidden[at], empty[at] + factors * (hidden[at] - empty[at]))
    return result
