"""The text encoder graph in onnxruntime against the PyTorch reference and against transformers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from cascadekit.schemas.config_json import to_json
from cascadekit.schemas.stages import TextEncoderConfig

TOLERANCE = 1e-5  # relative L2 of fp32 against fp32; about 5e-7 is found

GELU = TextEncoderConfig(32, 80, 4, 3, 24, max_position_embeddings=19, vocab_size=50, bos_token_id=48, eos_token_id=49)
QUICK = TextEncoderConfig(24, 48, 2, 2, 16, "quick_gelu", 1e-3, max_position_embeddings=11, vocab_size=40)
CONFIGS = {
    "gelu": GELU,
    "quick_gelu": replace(QUICK, bos_token_id=3, eos_token_id=7),  # the end is not the highest id
    "legacy end": replace(QUICK, eos_token_id=2),
}


def prompts(config: TextEncoderConfig, lengths: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Random words, as many as `lengths` say, between bos and eos; padded with eos and masked there."""
    rng = np.random.default_rng(sum(lengths))
    end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    ids = np.full((len(lengths), config.max_position_embeddings), end, np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, 0] = config.bos_token_id % config.vocab_size
        words = rng.integers(0, config.vocab_size - 1, length)
        ids[row, 1 : length + 1] = np.where(words == end, words + 1, words)
        mask[row, : length + 2] = 1
    return {"input_ids": ids, "attention_mask": mask}


def transformers_outputs(
    config: TextEncoderConfig, tensors: dict[str, torch.Tensor], inputs: dict[str, np.ndarray], attention: str
) -> dict[str, np.ndarray]:
    values = CLIPTextConfig.from_dict(to_json(config), attn_implementation=attention)
    theirs = CLIPTextModelWithProjection(values).eval()
    theirs.load_state_dict(tensors)
    with torch.no_grad():
        ids, mask = (torch.from_numpy(inputs[name]) for name in ("input_ids", "attention_mask"))
        outputs = theirs(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    return {"prompt_embeds": outputs.hidden_states[-1].numpy(), "pooled": outputs.text_embeds[:, None].numpy()}


@pytest.mark.parametrize("lengths", [(0,), (4, 9), (9, 0, 1), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_graph_follows_the_reference(
    export: Callable[..., Any], difference: Callable[..., float], config: TextEncoderConfig, lengths: tuple[int, ...]
) -> None:
    graph = export(config)
    inputs = prompts(config, lengths)
    assert difference(graph.run(inputs), graph.expected(inputs)) <= TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_graph_follows_transformers(
    export: Callable[..., Any], difference: Callable[..., float], config: TextEncoderConfig, attention: str
) -> None:
    graph = export(config)
    inputs = prompts(config, (2, 9, 0))
    theirs = transformers_outputs(config, graph.tensors, inputs, attention)
    assert difference(graph.run(inputs), theirs) <= TOLERANCE
    unpadded = inputs | {"attention_mask": np.ones_like(inputs["attention_mask"])}
    assert difference(graph.run(unpadded), theirs) > 10 * TOLERANCE  # rows of padding see the mask


def test_rows_that_may_see_nothing(export: Callable[..., Any], difference: Callable[..., float]) -> None:
    """Eager attention of transformers gives them the mean of all values; the order of ids and mask is arbitrary."""
    graph = export(GELU)
    inputs = prompts(GELU, (5, 9))
    inputs["attention_mask"][0, :3] = 0
    inputs["attention_mask"][1, ::2] = 0
    theirs = transformers_outputs(GELU, graph.tensors, inputs, "eager")
    assert difference(graph.run(inputs), theirs) <= TOLERANCE


def test_pooled_is_the_first_end(export: Callable[..., Any]) -> None:
    graph = export(GELU)
    inputs = prompts(GELU, (3, 3))
    inputs["input_ids"][1] = inputs["input_ids"][0]
    inputs["input_ids"][1, 5:9] = 1  # what follows the first end at 4 does not matter, more ends neither
    first, second = graph.run(inputs)["pooled"]
    np.testing.assert_array_equal(first, second)


def test_half_precision_storage_is_computed_in_fp32(
    export: Callable[..., Any], difference: Callable[..., float]
) -> None:
    graph = export(GELU, dtype=lambda _: torch.bfloat16)
    inputs = prompts(GELU, (3, 9))
    assert difference(graph.run(inputs), graph.expected(inputs)) <= TOLERANCE
    assert difference(export(GELU).expected(inputs), graph.expected(inputs)) > 10 * TOLERANCE  # it did round
