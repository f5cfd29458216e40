"""Input beyond the limits is refused before any work; much input within them takes no more memory than little."""

import json
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cascadekit import Cascade, PlacedSeed
from cascadekit.cli import main
from cascadekit.runtime.batch.prompt_files import read_prompt_file
from cascadekit.runtime.sampling.torch_generator import TorchGenerator
from cascadekit.runtime.text.prompt_weights import parse_weights
from cascadekit.runtime.text.tokenizer import ClipTokenizer
from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.limits import MAX_PROMPT_CHARACTERS, MAX_PROMPT_FILE_BYTES, MAX_PROMPT_LINE


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "8200x64"], "width=8200: expected 1 to 8192"),
        (["--size", "1" + "0" * 400 + "x64"], "width a number of hundreds of digits: expected 1 to 8192"),
        (["--prior-steps", "1001"], "--prior-steps 1001: expected 1 to 1000"),
        (["--decoder-steps", "1" + "0" * 400], "decoder_steps a number of hundreds of digits: expected 1 to 1000"),
        (["--prior-steps", "0"], "--prior-steps 0: expected 1 to 1000"),
        (["--prior-timesteps", ",".join(str(1 - n / 2000) for n in range(1500))], "expected at most 1001, found 1500"),
        (["--prior-guidance", "-1e9"], "--prior-guidance -1000000000.0: expected"),
        (["--size", "100x64"], "width 100: expected a multiple of 8, at least 64; the nearest is 96"),
        (["--init-image", "none.png", "--strength", "2"], "--strength 2.0: expected 0 to 1"),
        (["--prior-timesteps", "0.5,1"], "expected two or more that fall"),
        (["--seed", "1", "--seed", "2"], "2 seeds for 1 images"),
        (["--memory", "much"], "memory 'much': expected auto, resident, staged, or a size"),
        (["--lora", "none.safetensors:0.5"], "none.safetensors: no such LoRA file"),
        (["--from", "decoder=none"], "none: not a bundle"),
        (["--image-prompt", "none.png"], "the bundle has no image_encoder"),
        (["--control", "canny"], "controls.0: 'canny': expected NAME=PICTURE"),
        (["--preview-every", "2"], "the bundle has no previewer"),
        (["--weighted", "--negative", "(a:11)"], "expected weights from 0 to 10"),
        (["-o", "/dev/null/x.png"], "/dev/null"),
        (["--prompts", "none.txt"], "none.txt: the prompts cannot be read: No such file"),
        (["--prompts", "-", "--name", "{"], "name '{': Single"),
        (["--prompts", "-", "--prior-steps", "-1"], "--prior-steps -1: expected 1 to 1000"),
        (["--images", "100001"], "100000"),
        (["--seed", str(2**64)], "18446744073709551615"),
        (["--sampler", "gdf", "--prior-shift", "0"], "shift 0"),
        (["--negative", "x" * (MAX_PROMPT_CHARACTERS + 1)], f"expected at most {MAX_PROMPT_CHARACTERS}"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_refused_before_anything_is_opened(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    monkeypatch.setattr("cascadekit.runtime.cascade.Cascade.open", None)  # opening would fail
    prompt = [] if "--prompts" in options else ["x"]
    called = ["generate", str(tiny / "bundle"), *prompt, "-o", str(tmp_path / "x"), "--engine", "onnxruntime", *options]
    done = CliRunner().invoke(main, called)
    assert done.exit_code in (1, 2)
    assert isinstance(done.exception, SystemExit)
    assert words in " ".join(done.output.split())


def test_the_library_refuses_too(tiny: Path) -> None:
    with Cascade.open(tiny / "bundle") as cascade:
        with pytest.raises(UsageError, match="decoder_steps=1000000000: expected 1 to 1000"):
            cascade.generate("x", decoder_steps=10**9)
        with pytest.raises(UsageError, match="1000000 images of 256x256 at once: expected at most 8192"):
            cascade.generate("x", num_images=10**6)
        with pytest.raises(UsageError, match=r"a batch of 1e[+]12 images: expected at most 100000"):
            cascade.generate("x", seed=[PlacedSeed(0, 5, 10**12)])
        words = "cat " * (MAX_PROMPT_CHARACTERS // 4)
        with pytest.raises(UsageError, match="chunks of 75 tokens; expected at most 64"):
            cascade.encode_prompt(words, long_prompts=True)
        with pytest.raises(UsageError, match=f"expected at most {MAX_PROMPT_CHARACTERS}"):
            cascade.encode_prompt(words + "a cat")


def test_the_longest_prompts_take_no_time() -> None:
    """Prompts of every kind that could be slow: nested, unspaced, or all punctuation."""
    tokenizer = ClipTokenizer.open()
    kinds = ["((a", "[", "a", ":1", ": ", "(a:1.0)", "\\(", "é", "\U0001f600"]
    for kind in kinds:
        text = (kind * MAX_PROMPT_CHARACTERS)[:MAX_PROMPT_CHARACTERS]
        start = time.monotonic()
        tokenizer.split(text)
        with suppress(UsageError):
            parse_weights(text)
        assert time.monotonic() - start < 10, kind


def test_prompt_files(tmp_path: Path) -> None:
    large = tmp_path / "large.txt"
    with large.open("wb") as file:
        file.truncate(MAX_PROMPT_FILE_BYTES + 1)  # a hole
    with pytest.raises(UsageError, match="more than 64 MiB; divide it"):
        read_prompt_file(large)
    line = tmp_path / "line.jsonl"
    line.write_text(json.dumps("x" * MAX_PROMPT_LINE) + "\n" + json.dumps("a cat") + "\n")
    long, good = read_prompt_file(line).entries
    assert "expected at most 1048576" in (long.problem or "")
    assert good.given == {"prompt": "a cat"}


def test_more_images_than_a_batch_may_have(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "images": 60000}\n' * 2)
    called = ["generate", str(tiny / "bundle"), "--prompts", str(tmp_path / "p.jsonl"), "-o", str(tmp_path / "o")]
    done = CliRunner().invoke(main, [*called, "--engine", "onnxruntime"])
    assert done.exit_code == 2
    assert "120000 images: expected at most 100000" in " ".join(done.output.split())


@pytest.mark.parametrize(("shape", "rows"), [((50, 3, 5), (7, 3, 7)), ((40, 16), (0, 39)), ((30, 7, 3), (29, 0, 1))])
def test_rows_of_noise_are_those_of_torch(shape: tuple[int, ...], rows: tuple[int, ...]) -> None:
    ours, theirs = TorchGenerator(3), torch.Generator().manual_seed(3)
    for _ in range(2):  # the second draw tells whether the first has moved the generator on
        assert np.array_equal(ours.randn_rows(shape, rows), torch.randn(shape, generator=theirs).numpy()[list(rows)])


def test_noise_of_one_of_many_images_takes_the_memory_of_one() -> None:
    generator = TorchGenerator(0)
    tracemalloc.start()
    found = generator.randn_rows((1500, 4, 64, 64), (1499, 2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == (2, 4, 64, 64)
    assert peak < 16 << 20  # of all it would be 98 MB
