"""CLIP's byte-pair tokenizer for the text encoder, on the `tokenizers` library alone.

The authority is transformers' CLIPTokenizer (version 5), which diffusers feeds the text encoder with: ids, padding,
truncation and masks are its own for every string. The vocabulary is OpenAI's, as shipped in open_clip_torch (MIT; see
data/clip_tokenizer/LICENSE.txt). open_clip's SimpleTokenizer, the one of CLIP's training, cuts text into the same ids
(but pads with 0) except where the two disagree by construction:

* open_clip first mends the text with ftfy and html.unescape ("&amp;", curly quotes, "Ã©", full-width letters, control
  characters); transformers takes it as it is;
* "<|startoftext|>" and "<|endoftext|>" in a prompt are special tokens to transformers alone (open_clip knows them as
  "<start_of_text>" and "<end_of_text>"); in upper case they are plain text to both, but split differently;
* a capital sigma that ends a word becomes a final sigma in open_clip, an ordinary one in transformers;
* open_clip matches its pattern without regard to case, so U+0345 passes for a letter and an apostrophe with a long s
  (U+017F) for the contraction 's;
* characters newer than the Unicode tables of Python or of either library may be letters to one of them only.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE

from ..schemas.errors import CheckpointError, UsageError
from ..schemas.limits import MAX_PROMPT_CHARACTERS

LENGTH = 77  # positions of the text encoder
VOCAB_SIZE = 49408  # rows of its embedding table
START, END = 49406, 49407
START_TEXT, END_TEXT = "<|startoftext|>", "<|endoftext|>"
_NEXT = "Use the tokenizer folder of a Stable Cascade repository, or give no path to use the shipped tokenizer."


@dataclass(frozen=True)
class Tokens:
    """A batch of B prompts as the text encoder takes it; L is the length asked for, 77 unless told."""

    input_ids: NDArray[np.int64]  # (B, L)
    attention_mask: NDArray[np.int64]  # (B, L): 1 up to and with the closing token, then 0
    truncated: tuple[str, ...]  # of each prompt the words that did not fit, "" where all did


class Token(NamedTuple):
    """One token of a text, with what is needed to cut the text in a good place."""

    id: int
    start: int  # the character of the text it starts at
    opens_word: bool
    is_comma: bool  # or punctuation that ends with one, such as ")," which is a token of its own


class ClipTokenizer:
    """Prompts to token ids. Made by `open`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def open(cls, path: Path | None = None) -> "ClipTokenizer":
        """The shipped tokenizer, or the one at `path`: a tokenizer.json, or a folder with one or with vocab.json and
        merges.txt. The settings in a tokenizer.json are kept, except for truncation and padding.

        Raises CheckpointError when a file is missing or is not a CLIP tokenizer of 49,408 tokens.
        """
        if path is None:
            return cls(Tokenizer.from_str(_shipped()))
        file = path / "tokenizer.json" if path.is_dir() else path
        lists = path / "vocab.json", path / "merges.txt"
        only_lists = lists[0].exists() and not file.exists()
        try:
            tokenizer = _from_lists(*lists) if only_lists else Tokenizer.from_file(str(file))
            tokenizer.no_truncation()  # a saved file may ask for either; both are done here
            tokenizer.no_padding()
            found = f"{tokenizer.get_vocab_size()} tokens, empty prompt {tokenizer.encode('').ids}"
        except Exception as error:  # the library raises nothing narrower
            found = str(error)
        expected = f"{VOCAB_SIZE} tokens, empty prompt {[START, END]}"
        if found != expected:
            name = f"{lists[0]} with {lists[1].name}" if only_lists else file
            raise CheckpointError(f"{name}: expected CLIP's tokenizer ({expected}), found: {found}. {_NEXT}")
        return cls(tokenizer)

    def __call__(self, prompts: Sequence[str], length: int = LENGTH) -> Tokens:
        """`prompts` as int64 ids of shape (len(prompts), length), padded with the closing token 49407.

        What does not fit is cut and the last place given to the closing token, as transformers does with
        padding="max_length", truncation=True, max_length=length. Raises UsageError when `prompts` is a bare string,
        when one of them is not text (half a surrogate pair included), and for a length below 2.
        """
        if isinstance(prompts, str) or length < 2:
            raise UsageError(f"expected a list of prompts and a length of at least 2, got {prompts!r:.60}, {length}")
        input_ids = np.full((len(prompts), length), END, np.int64)
        attention_mask = np.zeros_like(input_ids)
        truncated = []
        for row, prompt in enumerate(prompts):
            encoding = self._encode(prompt, f"prompt {row}")
            # The closing token is the fill value, so only what comes before it is copied.
            kept = min(len(encoding.ids), length) - 1
            input_ids[row, :kept] = encoding.ids[:kept]
            attention_mask[row, : kept + 1] = 1
            fits = len(encoding.ids) <= length
            # Offsets count characters of the prompt as typed, before lowering and normalization.
            truncated.append("" if fits else prompt[encoding.offsets[kept][0] :].strip())
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
        if isinstance(text, str) and len(text) > MAX_PROMPT_CHARACTERS:
            raise UsageError(f"{name}: {len(text)} characters; expected at most {MAX_PROMPT_CHARACTERS}")
        try:
            return self._tokenizer.encode(text)
        except TypeError as error:
            raise UsageError(f"{name}: expected text, got {ascii(text)[:60]}") from error


def save_tokenizer_folder(folder: Path) -> None:
    """Write the shipped tokenizer as the `tokenizer` folder of a diffusers repository, making `folder` if need be.

    transformers 4 and 5 open it as CLIPTokenizer. Raises OSError when the files cannot be written.
    """
    text = _shipped()
    model = json.loads(text)["model"]
    special = dict.fromkeys(("eos_token", "pad_token", "unk_token"), END_TEXT) | {"bos_token": START_TEXT}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(i): {"content": t, **flags} for i, t in ((START, START_TEXT), (END, END_TEXT))}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "added_tokens_decoder": added, **special}
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "tokenizer.json": text,
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False, separators=(",", ":")),
        "merges.txt": "\n".join(["#version: 0.2", *model["merges"], ""]),
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8", newline="\n")


def _shipped() -> str:
    return files(__package__).joinpath("data", "clip_tokenizer", "tokenizer.json").read_text(encoding="utf-8")


def _from_lists(vocab: Path, merges: Path) -> Tokenizer:
    """Only the two lists differ from one CLIP tokenizer to another, so the shipped one lends the rest."""
    tokenizer = Tokenizer.from_str(_shipped())
    tokenizer.model = BPE.from_file(str(vocab), str(merges), end_of_word_suffix="</w>", unk_token=END_TEXT)
    return tokenizer
