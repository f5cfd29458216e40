"""Captions as token ids: several for each scene, made once, and the compact vocabulary of the tokens in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cascadekit.bench.judge.captions import caption
from cascadekit.bench.judge.scenes import Scene
from cascadekit.runtime.text.tokenizer import ClipTokenizer

LENGTH = 24  # tokens of a prompt in training; all positions from the last of these on are alike
FULL_LENGTH = 77
CAPTIONS = 6  # for each scene

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Words:
    """`vocabulary` are the tokenizer's ids of the tokens that occur, rising; compact ids are places in it."""

    vocabulary: I64
    captions: NDArray[np.int16]  # (scenes, CAPTIONS, LENGTH), compact
    empty: NDArray[np.int16]  # (LENGTH,), the prompt ""

    @property
    def end(self) -> int:
        """The compact id of the token that ends and pads prompts."""
        return len(self.vocabulary) - 1


def make_words(path: Path, scenes: Sequence[Scene], seed: int = 0) -> None:
    """Captions of `scenes`. No caption tells the LoRA's style."""
    rng = np.random.default_rng([seed, 2])
    texts = [caption(scene, rng) for scene in scenes for _ in range(CAPTIONS)]
    ids = tokenized(["", *texts])
    vocabulary = np.unique(ids)
    compact = np.searchsorted(vocabulary, ids).astype(np.int16)
    captions = compact[1:].reshape(len(scenes), CAPTIONS, LENGTH)
    np.savez(path, vocabulary=vocabulary, captions=captions, empty=compact[0])


def load_words(path: Path) -> Words:
    saved = np.load(path)
    return Words(saved["vocabulary"], saved["captions"], saved["empty"])


def tokenized(texts: Sequence[str]) -> I64:
    """(B, LENGTH) ids of the product's tokenizer. Raises ValueError for a text that leaves no padding."""
    tokenizer = ClipTokenizer.open()
    rows = []
    for at in range(0, len(texts), 1024):
        found = tokenizer(list(texts[at : at + 1024]))
        if found.attention_mask[:, LENGTH - 1].any():
            raise ValueError("a caption does not fit")
        rows.append(found.input_ids[:, :LENGTH])
    return np.concatenate(rows)
