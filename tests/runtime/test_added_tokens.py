"""Tokens that training added to CLIP's: the same ids as transformers gives, and a row of the text encoder for each."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from cascadekit import Cascade, convert, export
from cascadekit.converters.checkpoints.model_folder import check_tokenizer
from cascadekit.runtime.text.prompts import encode_texts
from cascadekit.runtime.text.tokenizer import ClipTokenizer
from cascadekit.runtime.text.tokenizer_file import LENGTH, save_tokenizer_folder
from cascadekit.schemas.errors import CheckpointError
from cascadekit.schemas.stages import Stage

TABLE = "text_model.embeddings.token_embedding.weight"
TOKENS = ("<sks>", "my-cat", "<Upper>")
PROMPTS = [
    "a photo of <sks>",
    "<sks>",
    "<sks><sks> my-cat,my-cat",
    "A PHOTO OF <SKS> AND <sks>",
    "the <upper> <Upper> of sks, <sks>.",
    "cat " * 72 + "<sks> <sks> <sks> <sks>",
    "<|endoftext|> <sks>",
    " <sks>\t<sks>  x<sks>y",
    "",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer's folder as transformers saves it after tokens were added."""
    folder = tmp_path_factory.mktemp("tokens")
    save_tokenizer_folder(folder / "plain")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "plain", local_files_only=True)
    tokenizer.add_tokens(list(TOKENS[:2]))
    tokenizer.add_tokens([transformers.AddedToken(TOKENS[2], special=True)])
    tokenizer.save_pretrained(folder / "saved")
    return folder / "saved"


def older(trained: Path, folder: Path, *, settings: bool) -> Path:
    """As transformers 4 saves its slow tokenizer: two lists, and the added tokens in another file."""
    document = json.loads((trained / "tokenizer.json").read_text(encoding="utf-8"))
    save_tokenizer_folder(folder)
    (folder / "tokenizer.json").unlink()
    added = [token for token in document["added_tokens"] if token["id"] > 49407]
    if settings:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        for token in added:
            config["added_tokens_decoder"][str(token["id"])] = {k: v for k, v in token.items() if k != "id"}
    else:
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
        (folder / "added_tokens.json").write_text(json.dumps({t["content"]: t["id"] for t in added}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def ids_by_transformers(folder: Path, prompts: Sequence[str], length: int = LENGTH) -> Any:
    loaded = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    return loaded(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="np")


def test_ids_are_those_of_transformers(trained: Path) -> None:
    tokens = ClipTokenizer.open(trained, 49411)(PROMPTS)
    expected = ids_by_transformers(trained, PROMPTS)
    np.testing.assert_array_equal(tokens.input_ids, expected["input_ids"])
    np.testing.assert_array_equal(tokens.attention_mask, expected["attention_mask"])
    assert tokens.input_ids.max() == 49410


@pytest.mark.parametrize("settings", [True, False])
def test_older_folders_list_them_elsewhere(trained: Path, tmp_path: Path, settings: bool) -> None:
    folder = older(trained, tmp_path / "tokenizer", settings=settings)
    prompts = PROMPTS if settings else [text for text in PROMPTS if "pper" not in text]  # flags are lost there
    found = ClipTokenizer.open(folder)(prompts).input_ids
    np.testing.assert_array_equal(found, ids_by_transformers(trained, prompts)["input_ids"])


def test_settings_add_to_a_whole_file_too(trained: Path, tmp_path: Path) -> None:
    folder = older(trained, tmp_path / "tokenizer", settings=True)
    save_tokenizer_folder(tmp_path / "plain")
    shutil.copy(tmp_path / "plain/tokenizer.json", folder)
    found = ClipTokenizer.open(folder)(PROMPTS).input_ids
    np.testing.assert_array_equal(found, ids_by_transformers(folder, PROMPTS)["input_ids"])


def test_long_and_weighted_prompts_keep_them_whole(trained: Path) -> None:
    seen: list[np.ndarray[Any, Any]] = []

    def encode(inputs: Any) -> dict[str, Any]:
        seen.append(inputs["input_ids"])
        rows = len(inputs["input_ids"])
        return {"prompt_embeds": np.zeros((rows, 77, 4), np.float32), "pooled": np.zeros((rows, 1, 4), np.float32)}

    text = "cat " * 74 + "<sks> my-cat (<sks>:1.3)"
    encode_texts([text], ClipTokenizer.open(trained), encode, weighted=True, long=True)
    own = [i for row in np.concatenate(seen).tolist() for i in row if i not in (49406, 49407)]
    expected = ids_by_transformers(trained, ["cat " * 74 + "<sks> my-cat <sks>"], 300)["input_ids"][0].tolist()
    assert own[:77] == [i for i in expected if i not in (49406, 49407)]


# In a model.


def with_tokens(tiny: Path, trained: Path, model: Path, rows: int) -> Path:
    """The tiny model with the trained tokenizer and `rows` more rows in the table of its text encoder."""
    shutil.copytree(tiny / "model", model)
    shutil.rmtree(model / "tokenizer")
    shutil.copytree(trained, model / "tokenizer")
    weights = load_file(model / "text_encoder/model.safetensors")
    more = np.random.default_rng(0).standard_normal((rows, weights[TABLE].shape[1])).astype(np.float32)
    save_file({**weights, TABLE: np.concatenate([weights[TABLE], 3 * more])}, model / "text_encoder/model.safetensors")
    config = json.loads((model / "text_encoder/config.json").read_text())
    config["vocab_size"] = len(weights[TABLE]) + rows
    (model / "text_encoder/config.json").write_text(json.dumps(config))
    return model


def test_prompts_are_encoded_as_transformers_encodes_them(tiny: Path, trained: Path, tmp_path: Path) -> None:
    model = with_tokens(tiny, trained, tmp_path / "model", 3)
    converted = tmp_path / "converted"
    convert([model], converted, "diffusers")
    export(converted, tmp_path / "bundle", stages=[Stage.TEXT_ENCODER])
    folder = converted / "text_encoder"
    encoder = transformers.CLIPTextModelWithProjection.from_pretrained(folder, local_files_only=True).eval()
    tokens = {k: torch.from_numpy(v) for k, v in ids_by_transformers(trained, PROMPTS).items()}
    with torch.inference_mode():
        expected = encoder(**tokens, output_hidden_states=True)
    with Cascade.open(tmp_path / "bundle", engine="onnxruntime") as cascade:
        found = cascade.encode_prompt(PROMPTS)
    np.testing.assert_allclose(found.clip_text[: len(PROMPTS)], expected.hidden_states[-1], atol=2e-4)
    np.testing.assert_allclose(found.pooled[: len(PROMPTS), 0], expected.text_embeds, atol=2e-4)


def test_a_bundle_gets_one_file_with_all_of_them(tiny: Path, trained: Path, tmp_path: Path) -> None:
    model = with_tokens(tiny, older(trained, tmp_path / "older", settings=True), tmp_path / "model", 3)
    export(model, tmp_path / "bundle", stages=[Stage.TEXT_ENCODER])
    (file,) = (tmp_path / "bundle/tokenizer").iterdir()
    found = ClipTokenizer.open(file)(PROMPTS).input_ids
    np.testing.assert_array_equal(found, ids_by_transformers(trained, PROMPTS)["input_ids"])


@pytest.mark.parametrize("rows", [0, 2])
def test_tokens_without_a_row_are_refused_before_anything_is_written(
    tiny: Path, trained: Path, tmp_path: Path, rows: int
) -> None:
    model = with_tokens(tiny, trained, tmp_path / "model", rows)
    message = (
        rf"its token .* has the id {49408 + rows}, expected one below {49408 + rows}, the rows of the text encoder"
    )
    for write in (lambda: export(model, tmp_path / "out"), lambda: convert([model], tmp_path / "out", "diffusers")):
        with pytest.raises(CheckpointError, match=message):
            write()
        assert not (tmp_path / "out").exists()


def test_comfyui_has_no_place_for_them(tiny: Path, trained: Path, tmp_path: Path) -> None:
    model = with_tokens(tiny, trained, tmp_path / "model", 3)
    done = convert([model], tmp_path / "comfyui", "comfyui")
    assert any("does not have <sks>, my-cat" in text for text in done.notes)


def test_rows_that_no_token_reaches_are_noted(tiny: Path, trained: Path, tmp_path: Path) -> None:
    tokenizer = check_tokenizer(trained, 49415)
    assert tokenizer is not None
    assert "its tokens end at 49411, the text encoder has 49415 rows" in tokenizer.notes[0]
