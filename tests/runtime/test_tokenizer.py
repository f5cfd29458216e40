"""The tokenizer against transformers' CLIPTokenizer (the authority) and open_clip's SimpleTokenizer.

transformers has to agree on every string. open_clip mends a text before it cuts it, which transformers does not, so the
two are compared on text already mended; the classes on which they differ even then are listed, each with a test of its
own, in `OPEN_CLIP_DIFFERS`.
"""

import gzip
import importlib.metadata
import importlib.util
import json
import random
import re
import unicodedata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from cascadekit.runtime.text import tokenizer_file
from cascadekit.runtime.text.tokenizer import ClipTokenizer
from cascadekit.runtime.text.tokenizer_file import END, LENGTH, START, save_tokenizer_folder
from cascadekit.schemas.errors import CheckpointError, UsageError

COUNT, SOME = 10_000, 1_200  # different strings; `make test-slow` takes them all
FILES = ("vocab.json", "merges.txt")

WORDS = """a an the of photo painting portrait astronaut riding horse cat cats dog's it's we're they'll I'd you've can't
I'm o'clock rock'n'roll highly detailed, cinematic lighting; 8k UHD (masterpiece:1.2) [soft] {light} "quoted" 'single'
trending_on_artstation --ar 16:9 #art @home 100% 3.14 -42 1,000,000 2nd mid-century e.g. C++ user@example.com
https://example.com/a?b=c&d=e#f C:\\path\\file.png pneumonoultramicroscopicsilicovolcanoconiosis antidisestablishment
naïve Zürich façade Ångström œuvre straße Łódź İstanbul ıspanak Ünïcödé DŽ ǅ ﬁne ﬆ Ⅻ ½ ² ① Ａｂｃ １２３ ™ © € £ ¥ ° § …
— – ‘curly’ “quotes” « guillemets » ¿qué? ¡hola! привет мир ПРИВЕТ Ελληνικά σοφός ΑΒΓδ ქართული Հայերեն עברית שָׁלוֹם
العربية مُحَمَّد ١٢٣ فارسی हिन्दी क्षत्रिय ১২৩ ไทย ภาษา 한국어 조선말 日本語 ひらがな カタカナ ｶﾀｶﾅ 漢字 中文 龘 𠮷 𝒜𝓂𝑔 𝟘𝟙𝟚 𐍈
&amp; &lt;b&gt; &#39; &eacute; &nbsp; <b>bold</b> <br/> <a href="x">link</a> <!-- note --> <p class='q'>""".split()
EMOJI = "😀 🐱 🔥 ❤ ❤️ ☂ ☃️ 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 🇯🇵 1️⃣ 👩🏿‍🚀 🫠 ✨ ★ ♫ ☺ ㊗️".split()
SPACES = (*(" " * 12), *"\t\n\x85\u00a0\u2003\u2028\u200b\u3000", "  ", "\r\n", "\x0b\x0c", "")
CONTROLS = ("\x00", "\x01", "\x07", "\x1b[31m", "\x1c", "\x1f", "\x7f", "\x9f", "\ufeff", "\u202e", "\u200d", "\ufffd")
MARKS_AND_SYMBOLS = ((0x300, 0x370), (0x2600, 0x27C0), (0x1F1E6, 0x1FB00))  # combining, dingbats, emoji
SPECIALS = "<|startoftext|> <|endoftext|> <|ENDOFTEXT|> <|endoftext |> <start_of_text> <end_of_text>".split()
SPANS = (
    *((0x20, 0x7F), (0xA0, 0x250), (0x300, 0x400), (0x400, 0x530), (0x600, 0x700)),  # ASCII to Arabic
    *((0x1E00, 0x2000), (0x2010, 0x2800)),  # Latin and Greek with marks, symbols
    *((0x3040, 0x3100), (0x4E00, 0x9FA6), (0xAC00, 0xD7A4), (0x1F300, 0x1F650)),  # kana, Han, Hangul, emoji
)


def varied_strings(count: int, seed: int = 20240213) -> list[str]:
    """`count` different strings from a seeded generator, the empty and the blank ones first."""
    rng = random.Random(seed)
    strings = dict.fromkeys(("", " ", "\n\t ", "\u3000"))
    while len(strings) < count:
        strings[_string(rng)] = None
    return list(strings)


def _string(rng: random.Random) -> str:
    # Mostly prompts of ordinary length; one in eight is near or far beyond the 77 tokens that fit.
    pieces = rng.randint(40, 130) if rng.random() < 0.125 else rng.randint(1, 12)
    text = "".join(_piece(rng) + rng.choice(SPACES) for _ in range(pieces))
    return text.upper() if rng.random() < 0.05 else text


def _piece(rng: random.Random) -> str:
    draw = rng.random()
    word = rng.choice(WORDS)
    if draw < 0.55:
        return rng.choice((word, word, word, word.upper(), word.title(), unicodedata.normalize("NFD", word)))
    if draw < 0.65:
        return rng.choice(EMOJI)
    if draw < 0.75:
        letters = [chr(rng.randrange(*rng.choice(SPANS))) for _ in range(rng.randint(1, 6))]
        return "".join(letter for letter in letters if rng.random() < 0.02 or not may_be_unknown(letter))
    if draw < 0.82:
        return "".join(rng.choice("!?.,:;'\"()[]{}<>|/\\-_=+*&^%$#@~`") for _ in range(rng.randint(1, 5)))
    if draw < 0.88:
        return str(rng.randrange(10 ** rng.randint(1, 12)))
    if draw < 0.93:
        return rng.choice("aeiounAEÄ漢ה") + "".join(chr(rng.randrange(0x300, 0x370)) for _ in range(rng.randint(1, 4)))
    if draw < 0.96:
        return rng.choice(CONTROLS)
    if draw < 0.98:
        return rng.choice(SPECIALS)
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyzABCXYZé") for _ in range(rng.randint(30, 300)))


@pytest.fixture(scope="module")
def ours() -> ClipTokenizer:
    return ClipTokenizer.open()


@pytest.fixture(scope="module")
def strings() -> list[str]:
    return varied_strings(SOME)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "tokenizer"
    save_tokenizer_folder(path)
    return path


@pytest.fixture(scope="module")
def open_clip() -> ModuleType:
    """open_clip's tokenizer module, from its file: importing the package would import torchvision."""
    distribution = importlib.metadata.distribution("open_clip_torch")
    spec = importlib.util.spec_from_file_location(
        "open_clip_tokenizer", str(distribution.locate_file("open_clip/tokenizer.py"))
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vocabulary(open_clip: ModuleType) -> tuple[dict[str, int], list[str]]:
    """Tokens and merges as CLIP reads them from its vocabulary file, under transformers' names of the special two."""
    with gzip.open(open_clip.default_bpe()) as file:
        merges = file.read().decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(open_clip.bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges


@pytest.fixture(scope="module")
def authority(vocabulary: tuple[dict[str, int], list[str]]) -> Any:
    """transformers' CLIPTokenizer made from the published vocabulary, so none of our files is involved."""
    vocab, merges = vocabulary
    return transformers.CLIPTokenizer(vocab=vocab, merges=[tuple(merge.split()) for merge in merges])


def assert_same(ours: ClipTokenizer, oracle: Any, prompts: list[str], length: int = LENGTH) -> None:
    tokens = ours(prompts, length)
    expected = oracle(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="np")
    np.testing.assert_array_equal(tokens.input_ids, expected["input_ids"])
    np.testing.assert_array_equal(tokens.attention_mask, expected["attention_mask"])


# transformers: equal on everything.


@pytest.mark.parametrize("count", [SOME, pytest.param(COUNT, marks=pytest.mark.slow)])
def test_strings_equal_transformers(ours: ClipTokenizer, authority: Any, count: int) -> None:
    strings = varied_strings(count)
    assert len(set(strings)) == count
    assert_same(ours, authority, strings)
    full = [len(ids) for ids in authority(strings)["input_ids"]]
    cut = [text != "" for text in ours(strings).truncated]
    assert cut == [n > LENGTH for n in full]
    assert 0.1 < sum(cut) / count < 0.4  # the strings exercise both sides


@pytest.mark.parametrize("length", [2, 3, 20, 300])
def test_other_lengths_equal_transformers(ours: ClipTokenizer, authority: Any, strings: list[str], length: int) -> None:
    assert_same(ours, authority, strings[:500], length)


def test_tokens_at_the_limit_equal_transformers(ours: ClipTokenizer, authority: Any) -> None:
    prompts = ["cat " * n for n in range(73, 79)]
    assert_same(ours, authority, prompts)
    assert ours(prompts).truncated == ("", "", "", "cat", "cat cat", "cat cat cat")


@settings(max_examples=150, deadline=None)
@given(prompts=st.lists(st.text(max_size=200), min_size=1, max_size=4))
def test_any_text_equals_transformers(ours: ClipTokenizer, authority: Any, prompts: list[str]) -> None:
    assert_same(ours, authority, prompts)


def test_saved_folder_opens_in_transformers(folder: Path, ours: ClipTokenizer, strings: list[str]) -> None:
    loaded = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    ids = [getattr(loaded, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")]
    assert (loaded.model_max_length, len(loaded), ids) == (LENGTH, 49408, [START, END, END, END])
    assert_same(ours, loaded, strings[::10])


# open_clip: equal on mended text, outside the classes below.


OPEN_CLIP_DIFFERS = re.compile(
    r"(?i:<\|(?:start|end)oftext\|>)"  # special in transformers only (upper case: split differently)
    r"|(?i:<(?:start|end)_of_text>)"  # special in open_clip only
    r"|Σ"  # str.lower knows the final sigma
    r"|\u0345|'\u017f"  # what matching without regard to case makes of iota subscript and long s
)


def may_be_unknown(character: str) -> bool:
    """Whether Python or a library may not know `character` yet, outside the blocks that can only hold non-letters."""
    if unicodedata.ucd_3_2_0.category(character) != "Cn":
        return False
    return not any(first <= ord(character) < end for first, end in MARKS_AND_SYMBOLS)


def comparable(text: str, open_clip: ModuleType) -> tuple[str, bool]:
    """`text` mended and rid of the known differences, and whether it had any.

    It takes several passes: "&amp;amp;amp;" is mended two steps at a time, and either change may call for the other.
    """
    had_any = False
    while True:
        mended = open_clip.basic_clean(text)
        known = "".join(c for c in mended if not may_be_unknown(c))
        alike = OPEN_CLIP_DIFFERS.sub(" ", known)
        had_any |= alike != mended
        if alike == text:
            return text, had_any
        text = alike


def assert_same_as_open_clip(ours: ClipTokenizer, open_clip: ModuleType, texts: list[str]) -> None:
    """All of them cut to 77, and those that had to be cut at full length too."""
    for length in (LENGTH, 4000):
        tokens = ours(texts, length)
        # open_clip pads with 0. That is a token too, but the closing one ends both rows, so it cannot pass unnoticed.
        expected = open_clip._tokenizer(texts, context_length=length).numpy()
        np.testing.assert_array_equal(np.where(tokens.attention_mask == 1, tokens.input_ids, 0), expected)
        texts = [text for text, rest in zip(texts, tokens.truncated, strict=True) if rest]
    assert not texts


@pytest.mark.parametrize("count", [SOME // 8, pytest.param(SOME, marks=pytest.mark.slow)])
def test_strings_equal_open_clip(ours: ClipTokenizer, open_clip: ModuleType, strings: list[str], count: int) -> None:
    """Not all of them: open_clip takes 5 ms for one."""
    some = strings[:: SOME // count]
    texts, had_any = zip(*(comparable(text, open_clip) for text in some), strict=True)
    for i in range(0, len(some), 500):
        assert_same_as_open_clip(ours, open_clip, list(texts[i : i + 500]))
    assert sum(had_any) < 0.3 * len(some)  # the others were compared as mended


@settings(max_examples=60, deadline=None)
@given(prompts=st.lists(st.text(max_size=200), min_size=1, max_size=4))
def test_any_known_text_equals_open_clip(ours: ClipTokenizer, open_clip: ModuleType, prompts: list[str]) -> None:
    assert_same_as_open_clip(ours, open_clip, [comparable(prompt, open_clip)[0] for prompt in prompts])


@pytest.mark.parametrize(
    "text",
    ["a <|endoftext|> b", "a <|startoftext|> b", "<|ENDOFTEXT|>!", "<start_of_text>", "ΣΟΦΟΣ", "a\u0345b", "it'\u017f"],
)
def test_known_differences_from_open_clip(
    ours: ClipTokenizer, authority: Any, open_clip: ModuleType, text: str
) -> None:
    """Each listed class is there for a reason; should one vanish, the list is to be shortened."""
    assert open_clip.basic_clean(text) == text
    assert_same(ours, authority, [text])
    tokens = ours([text])
    assert tokens.input_ids[0, tokens.attention_mask[0] == 1].tolist() != [
        START,
        *open_clip._tokenizer.encode(text),
        END,
    ]


# The shipped file.


def test_shipped_file_is_the_published_vocabulary(folder: Path, vocabulary: tuple[dict[str, int], list[str]]) -> None:
    vocab, merges = vocabulary
    assert json.loads((folder / "vocab.json").read_text(encoding="utf-8")) == vocab
    assert (folder / "merges.txt").read_text(encoding="utf-8").split("\n") == ["#version: 0.2", *merges, ""]


def test_shipped_settings_are_those_of_transformers(folder: Path, authority: Any) -> None:
    shipped = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    # The library writes merges as pairs; the older form, one string each, is read by every release of it.
    shipped["model"]["merges"] = [merge.split(" ") for merge in shipped["model"]["merges"]]
    expected = json.loads(authority.backend_tokenizer.to_str())
    assert shipped == {**expected, "truncation": None, "padding": None}  # these two are left from the last call


def test_known_ids(ours: ClipTokenizer) -> None:
    tokens = ours(["a photo of a cat", ""])
    assert tokens.input_ids.dtype == tokens.attention_mask.dtype == np.int64
    assert tokens.input_ids[0].tolist() == [START, 320, 1125, 539, 320, 2368, *[END] * 71]
    assert tokens.input_ids[1].tolist() == [START, *[END] * 76]
    assert tokens.attention_mask.sum(axis=1).tolist() == [7, 2]
    assert tokens.truncated == ("", "")


def test_no_prompts(ours: ClipTokenizer) -> None:
    tokens = ours([])
    assert (tokens.input_ids.shape, tokens.attention_mask.shape, tokens.truncated) == ((0, LENGTH), (0, LENGTH), ())


# The text that was cut.


def test_cut_text_is_in_the_users_words(ours: ClipTokenizer) -> None:
    prompt = "Cat " * 75 + "in a  Cafe\u0301 at 👨‍👩‍👧 ＮＯＯＮ, İstanbul \n"
    assert ours([prompt]).truncated == ("in a  Cafe\u0301 at 👨‍👩‍👧 ＮＯＯＮ, İstanbul",)


def test_a_word_or_character_cut_in_two_is_reported_from_the_cut(ours: ClipTokenizer) -> None:
    assert ours(["cat " * 74 + "Xylophonist"]).truncated == ("lophonist",)
    # A character is reported whole even if some of its bytes did fit.
    assert ours(["cat " * 74 + "𝒜 end"]).truncated == ("𝒜 end",)


@settings(max_examples=200, deadline=None)
@given(prompt=st.text(min_size=20, max_size=400), length=st.integers(2, 20))
def test_cut_text_is_the_end_of_the_prompt(ours: ClipTokenizer, prompt: str, length: int) -> None:
    (rest,) = ours([prompt], length).truncated
    assert prompt.strip().endswith(rest)
    assert (rest == "") == (ours([prompt], 2000).attention_mask.sum() <= length)


# Opening files.


def test_the_shipped_text_is_not_parsed_to_be_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it gives what reading the same content in another text gives, and tokens beside it are seen."""
    save_tokenizer_folder(tmp_path)
    whole, config = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_file, "_merged", lambda *arguments: pytest.fail("it was parsed"))
        found = tokenizer_file.read_tokenizer(tmp_path)
    whole.write_text(found.text + " ", encoding="utf-8")
    checked = tokenizer_file.read_tokenizer(tmp_path)
    assert (found.name, found.added, json.loads(found.text)) == (checked.name, checked.added, json.loads(checked.text))
    whole.write_text(found.text, encoding="utf-8")
    stated = json.loads(config.read_text())
    config.write_text(json.dumps({**stated, "added_tokens_decoder": {"49408": {"content": "<new>"}}}))
    assert tokenizer_file.read_tokenizer(tmp_path).added == {"<new>": 49408}
    config.write_text(json.dumps({**stated, "added_tokens_decoder": {"5": {"content": "<|endoftext|>"}}}))
    with pytest.raises(ValueError, match="two ids"):
        tokenizer_file.read_tokenizer(tmp_path)


def test_opens_file_folder_and_older_files(
    folder: Path, tmp_path: Path, ours: ClipTokenizer, strings: list[str]
) -> None:
    for name in FILES:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    expected = ours(strings[:1000])
    for path in (folder, folder / "tokenizer.json", tmp_path):
        tokens = ClipTokenizer.open(path)(strings[:1000])
        np.testing.assert_array_equal(tokens.input_ids, expected.input_ids)
        np.testing.assert_array_equal(tokens.attention_mask, expected.attention_mask)
        assert tokens.truncated == expected.truncated


def test_truncation_and_padding_saved_in_a_file_do_not_count(folder: Path, tmp_path: Path, ours: ClipTokenizer) -> None:
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    document["truncation"] = {"direction": "Right", "max_length": 10, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {"strategy": {"Fixed": 20}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0}
    document["padding"] |= {"pad_type_id": 0, "pad_token": "!"}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    tokens = ClipTokenizer.open(file)(["cat " * 100])
    assert (tokens.input_ids == ours(["cat " * 100]).input_ids).all()
    assert tokens.truncated == (" ".join(["cat"] * 25),)


def assert_refused(path: Path, *says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ClipTokenizer.open(path)
    for part in (*says, "expected CLIP's tokenizer (49408 tokens", "give no path to use the shipped"):
        assert part in str(caught.value)


def test_missing_and_damaged_files_are_refused(folder: Path, tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent", "absent", "No such file")
    assert_refused(tmp_path, "tokenizer.json", "No such file")
    (tmp_path / "vocab.json").write_bytes((folder / "vocab.json").read_bytes())
    assert_refused(tmp_path, "vocab.json with merges.txt", "No such file")
    (tmp_path / "merges.txt").write_text("#version: 0.2\nnot-in vocabulary\n", encoding="utf-8")
    assert_refused(tmp_path, "vocab.json with merges.txt", "out of vocabulary")
    (tmp_path / "vocab.json").write_text('{"a": 0}', encoding="utf-8")
    assert_refused(tmp_path, "vocab.json with merges.txt")
    file = tmp_path / "tokenizer.json"
    for content in (b"", b"[]", b"{}", b"\xff\xfe", (folder / "tokenizer.json").read_bytes()[:-1000]):
        file.write_bytes(content)
        assert_refused(tmp_path, "tokenizer.json")


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    document["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    assert_refused(tmp_path, "found: 49408 tokens, empty prompt []")
    document["model"] = {**document["model"], "vocab": {"a": 0, "b": 1}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    assert_refused(tmp_path, "found: ")


@pytest.mark.parametrize("prompts", ["a bare string", ["half a pair \ud83d"], [None]])
def test_what_is_not_text_is_refused(ours: ClipTokenizer, prompts: Any) -> None:
    with pytest.raises(UsageError, match=r"expected (a list|text)"):
        ours(prompts)


def test_lengths_without_room_for_the_special_tokens_are_refused(ours: ClipTokenizer) -> None:
    with pytest.raises(UsageError, match="at least 2"):
        ours(["a"], 1)
