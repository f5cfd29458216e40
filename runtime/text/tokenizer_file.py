"""The files of a CLIP tokenizer, read and checked before the `tokenizers` library sees them.

The library runs any pipeline that a tokenizer.json describes; some abort the process, never end, or take all memory.
CLIP's pipeline is always the same but for its vocabulary and the tokens added to it, so every other one is refused.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...schemas.errors import CheckpointError
from ...schemas.json_text import load_object
from ...schemas.limits import MAX_ADDED_TOKENS, MAX_TOKENIZER_BYTES
from ...storage.open_file import require_regular

LENGTH = 77  # positions of the text encoder
VOCAB_SIZE = 49408  # tokens of CLIP's own
START, END = 49406, 49407
START_TEXT, END_TEXT = "<|startoftext|>", "<|endoftext|>"
_SPECIAL = {START_TEXT: START, END_TEXT: END}  # the added tokens that the shipped tokenizer.json lists

WHOLE_NAME = "tokenizer.json"  # holds everything
LIST_NAMES = ("vocab.json", "merges.txt")  # in its place, in older folders
SETTINGS_NAME, ADDED_NAME = "tokenizer_config.json", "added_tokens.json"  # tokens added, in folders of either kind
SPECIAL_NAME = "special_tokens_map.json"
NAMES = (WHOLE_NAME, *LIST_NAMES, SETTINGS_NAME, ADDED_NAME, SPECIAL_NAME)

_LETTERS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Json = dict[str, Any]


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer: the file that errors name, the text of one complete tokenizer.json, and the ids of added tokens."""

    name: str
    text: str
    added: Mapping[str, int]


def shipped() -> str:
    """The tokenizer.json of the package."""
    return files(__package__).joinpath("data", "clip_tokenizer", WHOLE_NAME).read_text(encoding="utf-8")


def read_tokenizer(path: Path) -> TokenizerFile:
    """The tokenizer at `path`: a tokenizer.json, or a folder with tokenizer.json or with vocab.json and merges.txt.

    tokenizer_config.json or added_tokens.json in the folder add their tokens. Raises ValueError or CheckpointError,
    which describe what was found in place of CLIP's tokenizer."""
    folder = path if path.is_dir() else None
    own = "" if folder and has_only_lists(folder) else _read(path / WHOLE_NAME if folder else path)
    further = _added_in(folder) if folder else []
    if own == shipped() and all(_SPECIAL.get(str(token["content"])) == token["id"] for token in further):
        return TokenizerFile(name_of(path), own, {})  # parsing and checking it takes a tenth of a second
    content = load_object(own, strict=True) if own else _from_lists(path)
    merged = _merged(content, further)
    for what, problem in _CHECKS.items():
        if not problem(merged.get(what)):
            raise ValueError(f"another {what.replace('_', ' ')}")
    added = _check_added(merged)
    text = own if own and merged is content else json.dumps(merged, ensure_ascii=False, separators=(",", ":"))
    return TokenizerFile(name_of(path), text, added)


def name_of(path: Path) -> str:
    """The name of the tokenizer at `path` in error messages."""
    if not path.is_dir():
        return str(path)
    return " with ".join((str(path / LIST_NAMES[0]), LIST_NAMES[1])) if has_only_lists(path) else str(path / WHOLE_NAME)


def has_only_lists(folder: Path) -> bool:
    """True if the folder has vocab.json and merges.txt but no tokenizer.json."""
    return (folder / LIST_NAMES[0]).exists() and not (folder / WHOLE_NAME).exists()


def _read(file: Path) -> str:
    size = require_regular(file).st_size
    if size > MAX_TOKENIZER_BYTES:
        raise ValueError(f"{file.name} of {size} bytes, which is more than {MAX_TOKENIZER_BYTES}")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name}: {error}") from error


def _from_lists(folder: Path) -> Json:
    """A tokenizer.json with these two lists. The rest is that of the shipped one, which never differs."""
    vocab, merges = (_read(folder / name) for name in LIST_NAMES)
    lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
    content: Json = json.loads(shipped())
    content["model"] |= {"vocab": load_object(vocab, strict=True), "merges": lines[: len(content["model"]["merges"])]}
    return content


def _added_in(folder: Path) -> list[Json]:
    """The tokens that the files beside a vocabulary add, as a tokenizer.json would list them."""
    settings = load_object(_read(folder / SETTINGS_NAME), strict=True) if (folder / SETTINGS_NAME).exists() else {}
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        if not all(number.isascii() and number.isdecimal() and isinstance(t, dict) for number, t in decoder.items()):
            raise ValueError(f"{SETTINGS_NAME} whose added_tokens_decoder does not map ids to tokens")
        return [_token(int(number[:12]), token.get("content"), token) for number, token in decoder.items()]
    if not (folder / ADDED_NAME).exists():
        return []
    return [_token(number, text, {}) for text, number in load_object(_read(folder / ADDED_NAME), strict=True).items()]


def _token(number: Any, content: Any, flags: Mapping[str, Any]) -> Json:
    special = flags.get("special", False)
    usual = {"normalized": not special}
    return {"id": number, "content": content, **{flag: flags.get(flag, usual.get(flag, False)) for flag in _FLAGS}}


def _merged(content: Json, further: list[Json]) -> Json:
    """`content` with the tokens of `further` that it does not list."""
    listed = content.get("added_tokens")
    if not isinstance(listed, list) or not all(isinstance(token, dict) for token in listed):
        raise ValueError("no list of added_tokens")
    known = {str(token.get("content")): token.get("id") for token in listed}
    new = []
    for token in further:
        if known.setdefault(str(token["content"]), token["id"]) != token["id"]:
            raise ValueError(f"two ids of {str(token['content'])[:40]!r}: {known[token['content']]}, {token['id']}")
        if not any(token["content"] == one.get("content") for one in listed):
            new.append(token)
    if not new:
        return content
    return {**content, "added_tokens": sorted([*listed, *new], key=lambda token: str(token.get("id")).zfill(12))}


def _check_added(content: Json) -> dict[str, int]:
    """The ids of the tokens beyond CLIP's. Raises ValueError for tokens the library would give other ids."""
    listed = content["added_tokens"]
    if len(listed) > MAX_ADDED_TOKENS:
        raise ValueError(f"{len(listed)} added tokens, which is more than {MAX_ADDED_TOKENS}")
    vocab = content["model"]["vocab"]
    added: dict[str, int] = {}
    for token in listed:
        text, number = token.get("content"), token.get("id")
        if type(text) is not str or not text or not all(type(token.get(flag)) is bool for flag in _FLAGS):
            raise ValueError(f"an added token without text or flags: {json.dumps(token)[:80]}")
        expected = vocab.get(text, VOCAB_SIZE + len(added))
        if type(number) is not int or number != expected or text in added:
            raise ValueError(f"the added token {text[:40]!r} with id {number}, where {expected} is due")
        if text not in vocab:
            added[text] = number
    return added


def _is_normalizer(value: Any) -> bool:
    """NFC, white space as single spaces, lower case."""
    space = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    return bool(value == {"type": "Sequence", "normalizers": [{"type": "NFC"}, space, {"type": "Lowercase"}]})


def _is_pre_tokenizer(value: Any) -> bool:
    """CLIP's pattern, with the special tokens in front or without, then bytes."""
    parts = value.get("pretokenizers") if isinstance(value, dict) and value.get("type") == "Sequence" else None
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, dict) for part in parts):
        return False
    patterns = (_LETTERS, rf"<\|startoftext\|>|<\|endoftext\|>|{_LETTERS}")
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True} for regex in patterns
    ]
    return parts[0] in splits and parts[1].get("type") == "ByteLevel" and parts[1].get("add_prefix_space") is False


def _is_post_processor(value: Any) -> bool:
    """True if this may be the post-processor; a trial prompt shows later whether it adds the right two tokens."""
    kinds = (None, "RobertaProcessing", "TemplateProcessing")
    return value is None or (isinstance(value, dict) and value.get("type") in kinds)


def _is_decoder(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and value.get("type") == "ByteLevel")


def _is_model(value: Any) -> bool:
    """Byte-pair encoding with ids from 0 to 49407, and no dropout: one prompt has one encoding."""
    if not isinstance(value, dict) or value.get("type", "BPE") != "BPE" or value.get("dropout"):
        return False
    if value.get("end_of_word_suffix") != "</w>" or value.get("continuing_subword_prefix"):
        return False
    vocab, merges = value.get("vocab"), value.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list) or len(merges) > VOCAB_SIZE:
        return False
    ids = set(vocab.values()) if all(type(number) is int for number in vocab.values()) else set()
    return len(vocab) == VOCAB_SIZE and ids == set(range(VOCAB_SIZE))


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "model": _is_model,
    "normalizer": _is_normalizer,
    "pre_tokenizer": _is_pre_tokenizer,
    "post_processor": _is_post_processor,
    "decoder": _is_decoder,
}


def require_rows(tokenizer: TokenizerFile, rows: int | None) -> None:
    """Raise CheckpointError when the text encoder has no row for an added token; `rows=None` skips the check."""
    beyond = [text for text, number in tokenizer.added.items() if rows is not None and number >= rows]
    if beyond:
        raise CheckpointError(
            f"{tokenizer.name}: its token {beyond[0][:40]!r} has the id {tokenizer.added[beyond[0]]}, expected one "
            f"below {rows}, the rows of the text encoder; take the text encoder that was trained with its "
            f"{len(tokenizer.added)} added tokens, or a tokenizer without them"
        )


def save_tokenizer_folder(folder: Path) -> None:
    """Write the shipped tokenizer as the `tokenizer` folder of a diffusers repository, making `folder` if need be.

    transformers 4 and 5 open it as CLIPTokenizer. Raises OSError when the files cannot be written.
    """
    text = shipped()
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
