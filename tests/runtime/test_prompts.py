"""Weights and long prompts. The truths: the results the web UI documents for its syntax, nested text whose weights are
known as it is built, transformers' tokenizer and text encoder one chunk at a time, the weighting formula in torch, and
diffusers' prior pipeline given the same embeddings."""

import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler, StableCascadePriorPipeline, StableCascadeUNet
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from cascadekit import Cascade
from cascadekit.runtime.cascade import PromptEmbeds
from cascadekit.runtime.text.prompt_weights import parse_weights
from cascadekit.runtime.text.prompts import EncodedTexts, encode_texts, split
from cascadekit.runtime.text.tokenizer import ClipTokenizer, Token
from cascadekit.runtime.text.tokenizer_file import END, START
from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.stages import Stage

TOLERANCE = 1e-5  # max |difference| over max |expected|
EXACT = 1e-9  # weights are rounded to nine decimals

Pairs = list[tuple[str, float]]

# The syntax.

DOCUMENTED = {  # by the web UI's own examples and the list of rules above them
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        *(("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1)),
        *(("hill", 0.55), (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)),
    ],
    "(abc)": [("abc", 1.1)],
    "(abc:3.12)": [("abc", 3.12)],
    "[abc]": [("abc", 1 / 1.1)],
    r"a\\b": [("a\\b", 1.0)],
}
FOLLOWING = {  # from the same rules
    "((word))": [("word", 1.21)],
    "[[word]]": [("word", 1 / 1.21)],
    "(one (two:2) three:0.5)": [("one ", 0.5), ("two", 1.0), (" three", 0.5)],
    "[low": [("low", 1 / 1.1)],
    "a) b] c": [("a) b] c", 1.0)],
    "a:1.3) b": [("a:1.3) b", 1.0)],
    "[a:1.3] b": [("a:1.3", 1 / 1.1), (" b", 1.0)],
    "ratio 16:9 (a: b)": [("ratio 16:9 ", 1.0), ("a: b", 1.1)],
    "(a : 1.5 )": [("a ", 1.5)],
    "(a:.5)(b:2.)": [("a", 0.5), ("b", 2.0)],
    "(a:+1.5) (b:0)": [("a", 1.5), (" ", 1.0), ("b", 0.0)],
    "(a:1.2.3)": [("a:1.2.3", 1.1)],
    "(a:1.3": [("a:1.3", 1.1)],
    r"(\(smile\):1.3)": [("(smile)", 1.3)],
    r"\((a)\)": [("(", 1.0), ("a", 1.1), (")", 1.0)],
    "(a[b)c]": [("a", 1.1), ("b", 1.0), ("c", 1 / 1.1)],
    "": [("", 1.0)],
    "()": [("", 1.0)],
    "([(((": [("", 1.0)],
    ")]": [(")]", 1.0)],
    "日(本:1.5)語 😀": [("日", 1.0), ("本", 1.5), ("語 😀", 1.0)],
}
OURS = {  # where we differ from it, as the docstring says
    "C:\\photos\\": [("C:\\photos\\", 1.0)],
    "[[[(((a)))]]]b": [("ab", 1.0)],  # whose product in floats is not quite 1
    "a BREAK b": [("a BREAK b", 1.0)],
}


def assert_parts(text: str, expected: Pairs) -> None:
    parts = parse_weights(text)
    assert [part.text for part in parts] == [one for one, _ in expected]
    assert [part.weight for part in parts] == pytest.approx([weight for _, weight in expected], abs=EXACT)


@pytest.mark.parametrize("text", [*DOCUMENTED, *FOLLOWING, *OURS])
def test_known_parts(text: str) -> None:
    assert_parts(text, (DOCUMENTED | FOLLOWING | OURS)[text])


def nested(inner: st.SearchStrategy[tuple[str, Pairs]]) -> st.SearchStrategy[tuple[str, Pairs]]:
    """Several pieces in a row, put in brackets of one of the three kinds."""

    def bracketed(pieces: list[tuple[str, Pairs]], kind: str, number: float) -> tuple[str, Pairs]:
        text = "".join(one for one, _ in pieces)
        around, factor = {
            "round": (f"({text})", 1.1),
            "square": (f"[{text}]", 1 / 1.1),
            "number": (f"({text}:{number})", number),
        }[kind]
        return around, [(one, weight * factor) for _, leaves in pieces for one, weight in leaves]

    return st.builds(
        bracketed,
        st.lists(inner, min_size=1, max_size=3),
        st.sampled_from(["round", "square", "number"]),
        st.sampled_from([0.3, 0.75, 1.25, 1.5]),
    )


LEAVES = st.text(string.ascii_letters + " ,.'é日", min_size=1, max_size=6).map(lambda text: (text, [(text, 1.0)]))
PIECES = st.lists(LEAVES | st.recursive(nested(LEAVES), nested, max_leaves=6), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(PIECES)
def test_weights_are_those_the_text_was_built_with(pieces: list[tuple[str, Pairs]]) -> None:
    found = [(letter, part.weight) for part in parse_weights("".join(text for text, _ in pieces)) for letter in part[0]]
    expected = [(letter, weight) for _, leaves in pieces for text, weight in leaves for letter in text]
    assert [letter for letter, _ in found] == [letter for letter, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected], abs=EXACT)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_characters="()[]\\")))
def test_text_without_syntax_is_one_part(text: str) -> None:
    assert parse_weights(text) == ((text, 1.0),)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("()[]\\:1.5 a,")) | st.text())
def test_escaped_text_is_itself(text: str) -> None:
    escaped = "".join(f"\\{letter}" if letter in "()[]\\" else letter for letter in text)
    assert parse_weights(escaped) == ((text, 1.0),)


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from("()[]\\:0123456789.+- a,"), max_size=60) | st.text())
def test_any_text_has_parts_or_is_refused(text: str) -> None:
    try:
        parts = parse_weights(text)
    except UsageError:
        return
    assert all(0 <= weight <= 10 for _, weight in parts)
    letters = iter(text)
    assert all(letter in letters for part in parts for letter in part.text)  # nothing added, nothing moved


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("(a:11)", "11"),
        ("(a:-1)", "-1"),
        ("((a:4):4)", "16"),
        ("(" * 30 + "a" + ")" * 30, "17.4"),
        (f"(a:{'9' * 400})", "inf"),
        (f"((a:0):{'9' * 400})", "nan"),
    ],
)
def test_absurd_weights_are_refused(text: str, found: str) -> None:
    with pytest.raises(UsageError, match=f"expected weights from 0 to 10, found {found}"):
        parse_weights(text)


def test_many_brackets_take_no_time() -> None:
    assert len(parse_weights("(a:1.01)[b]" * 5000)) == 10_000
    assert parse_weights("(a:" + "1" * 100_000)[0].weight == 1.1


# Chunks.


def cut_by_hand(tokens: Sequence[Token]) -> list[list[Token]]:
    """Token by token, as the web UI fills its chunks, with whole words where it has no comma."""
    chunks: list[list[Token]] = [[]]
    for token in tokens:
        chunk = chunks[-1]
        if len(chunk) == 75:
            kept = 75
            if not token.is_comma:
                commas = [i for i in range(55, 75) if chunk[i].is_comma]
                words = [i for i in range(56, 75) if chunk[i].opens_word] + [75] * token.opens_word
                kept = commas[-1] + 1 if commas else words[-1] if words else 75
            chunks[-1:] = [chunk[:kept], chunk[kept:]]
        chunks[-1].append(token)
    return chunks


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(0, 400),
    commas=st.sampled_from([0, 0.02, 0.3]),
    words=st.sampled_from([0.03, 0.7]),
)
def test_cuts(seed: int, count: int, commas: float, words: float) -> None:
    rng = random.Random(seed)
    tokens = [Token(i, i, rng.random() < words, rng.random() < commas) for i in range(count)]
    assert [tokens[cut] for cut in split(tokens)] == cut_by_hand(tokens)


LONG_WORD = "pneumonoultramicroscopicsilicovolcanoconiosis"  # 14 tokens
CUTS = {
    "all fits": ("cat " * 75, ["cat " * 75]),
    "one too many": ("cat " * 76, ["cat " * 75, "cat"]),
    "a comma near": ("cat " * 60 + "," + "dog " * 20, ["cat " * 60 + ",", "dog " * 20]),
    "the furthest comma": ("cat " * 55 + "," + "dog " * 20, ["cat " * 55 + ",", "dog " * 20]),
    "a comma too far": ("cat " * 54 + "," + "dog " * 30, ["cat " * 54 + "," + "dog " * 20, "dog " * 10]),
    "a comma just after": ("cat " * 60 + "," + "dog " * 14 + ", a", ["cat " * 60 + "," + "dog " * 14, ", a"]),
    "a comma after a bracket": ("cat " * 60 + "), " + "dog " * 20, ["cat " * 60 + "),", "dog " * 20]),
    "within a word": ("cat " * 70 + LONG_WORD, ["cat " * 70, LONG_WORD]),
    "after commas, twice": ("red cat, " * 60, ["red cat, " * 25, "red cat, " * 25, "red cat, " * 10]),
    "unicode": ("日本 " * 24 + "é 😀 日本 dog", ["日本 " * 24 + "é 😀", "日本 dog"]),
}


@dataclass
class Recorder:
    """A text encoder whose hidden states are the ids and the mask it was given, and which remembers its calls."""

    calls: list[NDArray[np.int64]] = field(default_factory=list)

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.calls.append(inputs["input_ids"])
        hidden = np.stack([inputs["input_ids"], inputs["attention_mask"]], axis=2).astype(np.float32)
        return {"prompt_embeds": hidden, "pooled": hidden.sum(axis=1, keepdims=True)}


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer.open()


@pytest.fixture(scope="module")
def authority(tiny: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(tiny / "model" / "tokenizer")


def padded(authority: CLIPTokenizer, texts: Sequence[str]) -> Any:
    return authority(list(texts), padding="max_length", truncation=True, max_length=77, return_tensors="np")


@pytest.mark.parametrize("case", CUTS)
def test_chunks_are_those_pieces_of_text(tokenizer: ClipTokenizer, authority: CLIPTokenizer, case: str) -> None:
    text, pieces = CUTS[case]
    expected = padded(authority, pieces)
    found = encode_texts([text], tokenizer, Recorder(), long=True).clip_text[0].reshape(len(pieces), 77, 2)
    np.testing.assert_array_equal(found[..., 0], expected["input_ids"])
    np.testing.assert_array_equal(found[..., 1], expected["attention_mask"])


WORDS = st.sampled_from(
    ["cat", "Zürich", LONG_WORD, "日本語", "😀", "it's", ",", "3.14", "(a)", "e\u0301", "<|endoftext|>"]
)


@settings(max_examples=60, deadline=None)
@given(text=st.lists(WORDS, max_size=300).map(" ".join) | st.text(max_size=400))
def test_no_token_is_lost(tokenizer: ClipTokenizer, authority: CLIPTokenizer, text: str) -> None:
    encoded = encode_texts([text], tokenizer, Recorder(), long=True)
    assert encoded.truncated == ("",)
    found: list[int] = []
    for ids, mask in encoded.clip_text[0].reshape(-1, 77, 2).transpose(0, 2, 1):
        length = int(mask.sum())
        assert mask.tolist() == [1.0] * length + [0.0] * (77 - length)
        assert (ids[0], *ids[length - 1 :]) == (START, *[END] * (78 - length))
        found += ids[1 : length - 1].astype(int).tolist()
    assert found == authority(text, truncation=False, add_special_tokens=False)["input_ids"]


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(max_size=120) | st.lists(WORDS, max_size=90).map(" ".join), min_size=1, max_size=5))
def test_plain_texts_are_tokenized_as_by_transformers(
    tokenizer: ClipTokenizer, authority: CLIPTokenizer, texts: list[str]
) -> None:
    expected = padded(authority, texts)
    encoded = encode_texts(texts, tokenizer, Recorder())
    np.testing.assert_array_equal(encoded.clip_text[..., 0], expected["input_ids"])
    np.testing.assert_array_equal(encoded.clip_text[..., 1], expected["attention_mask"])
    assert encoded.truncated == tokenizer(texts).truncated


def test_rows_are_encoded_once_in_bounded_batches(tokenizer: ClipTokenizer) -> None:
    texts = [f"number {i % 13}" for i in range(40)] + ["", "<|endoftext|>"]  # the last two: equal ids, not equal masks
    encoder = Recorder()
    encoded = encode_texts(texts, tokenizer, encoder, batch=4)
    assert [len(call) for call in encoder.calls] == [4, 4, 4, 3]
    expected = tokenizer(texts)
    np.testing.assert_array_equal(encoded.clip_text[..., 0], expected.input_ids)
    np.testing.assert_array_equal(encoded.clip_text[..., 1], expected.attention_mask)
    np.testing.assert_array_equal(encoded.pooled[:, 0, 1], expected.attention_mask.sum(axis=1))


@pytest.mark.parametrize(
    ("text", "rows"),
    [("a (cat)", 2), ("a (cat:1)", 1), ("dog " * 75 + "cat", 2), ("dog " * 75 + "(cat)", 3), ("dog " * 150, 1)],
)
def test_the_empty_prompt_is_encoded_only_when_needed(tokenizer: ClipTokenizer, text: str, rows: int) -> None:
    encoder = Recorder()
    encode_texts([text], tokenizer, encoder, weighted=True, long=True)
    assert [len(call) for call in encoder.calls] == [rows]


def test_cut_text_is_reported_without_syntax(tokenizer: ClipTokenizer) -> None:
    text = "cat " * 70 + "(a \\(big\\) Red:1.3) [House] at night"
    (rest,) = encode_texts([text], tokenizer, Recorder(), weighted=True).truncated
    assert rest == "House at night"  # "a", "(", "big", ")" and "Red" fit
    (rest,) = encode_texts(["cat " * 74 + "(Xylophonist) plays"], tokenizer, Recorder(), weighted=True).truncated
    assert rest == "lophonist plays"


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("text", ["half a pair \ud83d", None, 3])
def test_what_is_not_text_is_refused(tokenizer: ClipTokenizer, text: Any, weighted: bool) -> None:
    with pytest.raises(UsageError, match="prompt 1: expected text"):
        encode_texts(["a", text], tokenizer, Recorder(), weighted=weighted)


# The text encoder.


@pytest.fixture(scope="module")
def cascade(tiny: Path) -> Any:
    with Cascade.open(tiny / "bundle") as cascade:
        yield cascade


@pytest.fixture(scope="module")
def encode(cascade: Cascade, tokenizer: ClipTokenizer) -> Callable[..., EncodedTexts]:
    runner = cascade.engine.load(Stage.TEXT_ENCODER)
    return lambda texts, **options: encode_texts(texts, tokenizer, runner, **options)


@pytest.fixture(scope="module")
def theirs(tiny: Path, authority: CLIPTokenizer) -> Callable[[str], tuple[torch.Tensor, torch.Tensor]]:
    """Last hidden state (77, c), before the final norm, and projected vector (1, c) of one text by itself."""
    model = CLIPTextModelWithProjection.from_pretrained(tiny / "model" / "text_encoder").eval()

    def encoded(text: str) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = {name: torch.from_numpy(value) for name, value in padded(authority, [text]).items()}
        with torch.no_grad():
            outputs = model(**inputs, output_hidden_states=True)
        return outputs.hidden_states[-1][0], outputs.text_embeds

    return encoded


def assert_close(found: NDArray[np.float32], expected: torch.Tensor) -> None:
    assert found.dtype == np.float32
    assert found.shape == tuple(expected.shape)
    assert np.abs(found - expected.numpy()).max() <= TOLERANCE * float(expected.abs().max())


def test_plain_texts_are_what_one_call_gives(cascade: Cascade, encode: Any) -> None:
    prompts, negatives = ["a shiba inu", "Zürich (at night:1.3), " * 20], ["", "blurry"]
    expected = cascade.encode_prompt(prompts, negatives)
    encoded = encode([*prompts, *negatives])
    np.testing.assert_array_equal(encoded.clip_text, [*expected.clip_text, *expected.negative_clip_text])
    np.testing.assert_array_equal(encoded.pooled, [*expected.pooled, *expected.negative_pooled])
    assert encoded.truncated == expected.truncated
    assert encoded.truncated[1]


def test_a_row_does_not_depend_on_the_call(encode: Any) -> None:
    texts = ["a shiba inu", "", "日本 in winter", "a shiba inu", "cat"]
    together = encode(texts)
    for options in ({"batch": 1}, {"batch": 2}, {"long": True}, {"weighted": True}, {"long": True, "weighted": True}):
        again = encode(texts, **options)
        np.testing.assert_allclose(again.clip_text, together.clip_text, rtol=0, atol=1e-6)
        np.testing.assert_allclose(again.pooled, together.pooled, rtol=0, atol=1e-6)
    alone = encode(["日本 in winter"])
    np.testing.assert_allclose(alone.clip_text[0], together.clip_text[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CUTS)
def test_long_texts_are_their_chunks_in_a_row(encode: Any, theirs: Any, case: str) -> None:
    text, pieces = CUTS[case]
    chunks = [theirs(piece) for piece in pieces]
    encoded = encode([text], long=True)
    assert_close(encoded.clip_text[0], torch.cat([hidden for hidden, _ in chunks]))
    assert_close(encoded.pooled[0], chunks[0][1])


def test_shorter_texts_are_filled_up_with_the_empty_prompt(encode: Any, theirs: Any) -> None:
    encoded = encode(["dog " * 80, "", "a cat, asleep"], long=True)
    empty, pooled = theirs("")
    cat = theirs("a cat, asleep")
    dogs = torch.cat([theirs("dog " * 75)[0], theirs("dog " * 5)[0]])
    assert_close(encoded.clip_text, torch.stack([dogs, torch.cat([empty, empty]), torch.cat([cat[0], empty])]))
    assert_close(encoded.pooled, torch.stack([theirs("dog " * 75)[1], pooled, cat[1]]))
    assert encoded.truncated == ("", "", "")


def test_a_thousand_words(encode: Any, theirs: Any) -> None:
    names = ["red", "green", "blue", "old", "house", "tree", "river", "cloud", "stone", "light"]
    words = [names[(i * i + i // 7) % 10] for i in range(1000)]
    encoded = encode([" ".join(words)], long=True, batch=5)
    pieces = [" ".join(words[at : at + 75]) for at in range(0, 1000, 75)]
    assert_close(encoded.clip_text[0], torch.cat([theirs(piece)[0] for piece in pieces]))
    assert encoded.clip_text.shape[1] == 14 * 77


WEIGHTS: dict[str, tuple[str, list[tuple[str, dict[int, float]]]]] = {  # chunks as plain text, weights by position
    "words": ("a (red:1.5) cat [asleep]", [("a red cat asleep", {2: 1.5, 4: 1 / 1.1})]),
    "absent": ("a (red:0) cat", [("a red cat", {2: 0.0})]),
    "a word of four tokens": ("(xyzzyqq) (cat)", [("xyzzyqq cat", dict.fromkeys(range(1, 6), 1.1))]),
    "within a word": ("(astro)naut cats", [("astro naut cats", {1: 1.1})]),  # "astronaut" is one token
    "the same weight within a word": ("(astro:1)naut", [("astronaut", {})]),
    "nested": ("((a cat) at (night:1.5):0.8)", [("a cat at night", {1: 0.88, 2: 0.88, 3: 0.8, 4: 1.2})]),
    "unicode": ("(😀:1.2) caf\u00e9", [("😀 caf\u00e9", {1: 1.2})]),
    "escaped": (r"(\(cat\):1.5)", [("( cat )", {1: 1.5, 2: 1.5, 3: 1.5})]),
    "only brackets": ("(([]))", [("", {})]),
    "full": ("cat " * 74 + "(dog:1.4)", [("cat " * 74 + "dog", {75: 1.4})]),
    "over a cut": (
        "cat " * 73 + "(dog dog dog:1.4) bird",
        [("cat " * 73 + "dog dog", {74: 1.4, 75: 1.4}), ("dog bird", {1: 1.4})],
    ),
    "in the second chunk": ("cat " * 75 + "a (dog:0.6)", [("cat " * 75, {}), ("a dog", {2: 0.6})]),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_move_hidden_states_from_the_empty_prompts(encode: Any, theirs: Any, case: str) -> None:
    text, chunks = WEIGHTS[case]
    empty, _ = theirs("")
    expected = []
    for piece, weights in chunks:
        w = torch.ones(77, 1)
        for position, weight in weights.items():
            w[position] = weight
        expected.append(w * (theirs(piece)[0] - empty) + empty)
    encoded = encode([text, ""], weighted=True, long=True)
    assert_close(encoded.clip_text[0], torch.cat(expected))
    assert_close(encoded.pooled[0], theirs(chunks[0][0])[1])
    np.testing.assert_array_equal(encoded.clip_text[1], encode([text, ""], long=True).clip_text[1, : 77 * len(chunks)])
    first = encode([text], weighted=True)
    assert_close(first.clip_text[0], expected[0])
    assert (first.truncated != ("",)) == (len(chunks) > 1)


# The prior.


def test_the_prior_takes_long_weighted_prompts(tiny: Path, cascade: Cascade, encode: Any) -> None:
    """diffusers' prior pipeline given the same embeddings, 154 tokens long."""
    text = encode(["a (shiba:1.3) inu, " * 20, "[blurry]"], weighted=True, long=True)
    assert text.clip_text.shape[1] == 154
    embeds = PromptEmbeds(text.clip_text[:1], text.pooled[:1], text.clip_text[1:], text.pooled[1:])
    model = tiny / "model"
    pipeline = StableCascadePriorPipeline(
        tokenizer=CLIPTokenizer.from_pretrained(model / "tokenizer"),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(model / "text_encoder").eval(),
        prior=StableCascadeUNet.from_pretrained(model / "prior").eval(),
        scheduler=DDPMWuerstchenScheduler.from_pretrained(model / "scheduler"),
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=torch.from_numpy(embeds.clip_text),
        prompt_embeds_pooled=torch.from_numpy(embeds.pooled),
        negative_prompt_embeds=torch.from_numpy(embeds.negative_clip_text),
        negative_prompt_embeds_pooled=torch.from_numpy(embeds.negative_pooled),
        height=256,
        width=384,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).image_embeddings
    *_, last = cascade.prior(embeds, height=256, width=384, steps=3, guidance=4.0, seed=5)
    assert np.abs(last.latents - expected).max() <= 2e-5 * np.abs(expected).max()
