"""CLIP's byte-pair tokenizer for the text encoder, on the `tokenizers` library alone.

Ids, padding, truncation and masks equal those of transformers' CLIPTokenizer (version 5), which diffusers uses, for
every string. The vocabulary is OpenAI's, as shipped in open_clip_torch (MIT; see data/clip_tokenizer/LICENSE.txt).

CLIP was trained with open_clip's SimpleTokenizer. It cuts text into the same ids, but pads with 0 and differs here:

| text                                              | open_clip              | transformers, and here |
|---------------------------------------------------|------------------------|------------------------|
| "&amp;", curly quotes, "Ã©", full-width letters   | mended by ftfy and html.unescape | unchanged    |
| "<|startoftext|>", "<|endoftext|>"                | plain text ("<start_of_text>" is special) | special tokens |
| the same in upper case                            | plain text, split otherwise | plain text        |
| a capital sigma that ends a word                  | final sigma            | ordinary sigma         |
| U+0345                                            | a letter               | no letter              |
| an apostrophe with a long s (U+017F)              | the contraction 's     | no contraction         |

Characters newer than the Unicode tables of Python or of either library may be letters to one of them only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from ...schemas.errors import CheckpointError, UsageError
from .prompt_weights import check_length
from .tokenizer_file import (
    END,
    LENGTH,
    START,
    VOCAB_SIZE,
    TokenizerFile,
    name_of,
    read_tokenizer,
    require_rows,
    shipped,
)

PANIC = "PanicException"  # the library raises it on failure; it is no subclass of Exception, and no module exports it
_NEXT = "Use the tokenizer folder of a Stable Cascade repository, or give no path to use the shipped tokenizer."

T = TypeVar("T")


@dataclass(frozen=True)
class Tokens:
    """B prompts as the text encoder takes them; L is the length asked for, 77 by default."""

    input_ids: NDArray[np.int64]  # (B, L)
    attention_mask: NDArray[np.int64]  # (B, L): 1 up to and with the closing token, then 0
    truncated: tuple[str, ...]  # of each prompt the text that did not fit, or ""


class Token(NamedTuple):
    """One token of a text. `opens_word` and `is_comma` show where the text may be cut."""

    id: int
    start: int  # its first character in the text as typed
    opens_word: bool
    is_comma: bool  # or punctuation that ends with one, such as ")," which is a token of its own


class ClipTokenizer:
    """Turns prompts into token ids; see `ClipTokenizer.open`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def open(cls, path: Path | None = None, rows: int | None = None) -> "ClipTokenizer":
        """The shipped tokenizer, or the one at `path`, see `tokenizer_file.read_tokenizer`.

        The settings in a tokenizer.json are kept, except for truncation and padding. Tokens added to CLIP's are used;
        `rows` is the number of rows of the text encoder, which needs one for each token.

        Raises CheckpointError when a file is missing, is not a CLIP tokenizer of 49,408 tokens, or has more tokens than
        `rows`."""
        return cls(_parsed(shipped() if path is None else read_checked(path, rows).text))

    def __call__(self, prompts: Sequence[str], length: int = LENGTH) -> Tokens:
        """`prompts` as int64 ids of shape (len(prompts), length), padded with the closing token 49407.

        Longer prompts are cut and end with the closing token, as in transformers with padding="max_length",
        truncation=True, max_length=length. Raises UsageError when `prompts` is a bare string, when one of them is not
        text (half a surrogate pair included), and for a length below 2."""
        if isinstance(prompts, str) or length < 2:
            raise UsageError(f"expected a list of prompts and a length of at least 2, found {prompts!r:.60}, {length}")
        room = length - 2  # for the opening and the closing token
        split = [self.split(prompt, f"prompt {row}") for row, prompt in enumerate(prompts)]
        input_ids, attention_mask = token_rows([[token.id for token in tokens[:room]] for tokens in split], length)
        truncated = [
            prompt[tokens[room].start :].strip() if len(tokens) > room else ""
            for prompt, tokens in zip(prompts, split, strict=True)
        ]
        return Tokens(input_ids, attention_mask, tuple(truncated))

    def split(self, text: str, name: str = "prompt") -> list[Token]:
        """All tokens of `text`, however many, without the opening and the closing one.

        Raises UsageError, calling the text `name`, when it is not text."""
        encoding = self._encode(text, name)
        fields = zip(encoding.ids, encoding.offsets, encoding.word_ids, encoding.tokens, strict=True)
        own = list(fields)[1:-1]
        words = [None, *(word for _, _, word, _ in own)]
        return [
            Token(id_, offsets[0], word != before, token.endswith(",</w>"))
            for (id_, offsets, word, token), before in zip(own, words, strict=False)
        ]

    def _encode(self, text: str, name: str) -> Encoding:
        if isinstance(text, str):
            check_length(text)
        try:
            return _guarded(lambda: self._tokenizer.encode(text))
        except TypeError as error:
            raise UsageError(f"{name}: expected text, found {ascii(text)[:60]}") from error


def read_checked(path: Path, rows: int | None = None) -> TokenizerFile:
    """The files of the tokenizer at `path`, read and tried out. Raises CheckpointError as `ClipTokenizer.open` does."""
    try:
        read = read_tokenizer(path)
        found = _described(_guarded(lambda: _parsed(read.text)), read.added)
    except Exception as error:  # the library raises plain Exception
        found = str(error)
    expected = f"{VOCAB_SIZE} tokens, empty prompt {[START, END]}"
    if found != expected:
        raise CheckpointError(f"{name_of(path)}: expected CLIP's tokenizer ({expected}), found: {found[:300]}. {_NEXT}")
    require_rows(read, rows)
    return read


def token_rows(rows: Sequence[Sequence[int]], length: int = LENGTH) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ids of each row between an opening and a closing token, padded with closing tokens, and the attention mask.

    Both are (len(rows), length) int64. The mask is 1 up to and with the first closing token."""
    input_ids = np.full((len(rows), length), END, np.int64)
    attention_mask = np.zeros_like(input_ids)
    input_ids[:, 0] = START
    for row, ids in enumerate(rows):
        input_ids[row, 1 : 1 + len(ids)] = ids
        attention_mask[row, : len(ids) + 2] = 1
    return input_ids, attention_mask


@lru_cache(maxsize=1)  # parsing takes 0.1 s; export and verify need the same tokenizer several times
def _parsed(text: str) -> Tokenizer:
    """The tokenizer in the JSON `text`; shared, so it must not be changed."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()  # a saved file may ask for either; both are done here
    tokenizer.no_padding()
    return tokenizer


def _described(tokenizer: Tokenizer, added: Mapping[str, int]) -> str:
    """A short description of what the library read from a file, for the error message."""
    wrong = [text for text, number in added.items() if tokenizer.token_to_id(text) != number]
    if wrong:
        return f"the added token {wrong[0][:40]!r} under another id, {tokenizer.token_to_id(wrong[0])}"
    own = tokenizer.get_vocab_size() - len(added)
    return f"{own} tokens, empty prompt {_guarded(lambda: tokenizer.encode('')).ids}"


def _guarded(call: Callable[[], T]) -> T:
    """The result of `call`. Raises CheckpointError for a panic of the library."""
    try:
        return call()
    except BaseException as error:
        if type(error).__name__ == PANIC:
            raise CheckpointError(f"the tokenizers library failed: {error}; use another tokenizer") from error
        raise
