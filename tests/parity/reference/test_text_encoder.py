"""The text encoder against CLIPTextModelWithProjection of transformers with the same weights."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers

from cascadekit.parity.reference import load_reference
from cascadekit.runtime.engines.pytorch.networks.text_encoder import end_positions
from cascadekit.schemas.config_json import to_json
from cascadekit.schemas.errors import LayoutError
from cascadekit.schemas.stages import PRESETS, Stage, TextEncoderConfig, Variant
from cascadekit.schemas.tensors import expected_tensors
from helpers.combinations import combinations

LENGTH, BOS, EOS = 77, 49406, 49407
GELU = TextEncoderConfig(
    hidden_size=48, intermediate_size=96, num_attention_heads=3, num_hidden_layers=4, projection_dim=20
)
CONFIGS = {
    "tiny": PRESETS[Stage.TEXT_ENCODER, Variant.TINY],
    "gelu": GELU,
    "quick_gelu": replace(GELU, hidden_act="quick_gelu", projection_dim=48),
    "epsilon": replace(GELU, num_attention_heads=2, num_hidden_layers=2, layer_norm_eps=0.1),
    "legacy end": replace(GELU, num_hidden_layers=2, eos_token_id=2, bos_token_id=0),
}
PROMPTS = {"mixed": (0, 1, 30, 74, 75), "full": (75, 75), "empty": (0,)}  # words of each prompt
CASES = combinations(CONFIGS, PROMPTS, [torch.float32, torch.bfloat16, torch.float16, torch.float64])

Oracle = Callable[[TextEncoderConfig], Any]


@pytest.fixture(scope="module")
def oracle(randomised: Callable[..., Any]) -> Oracle:
    """A function for the network of transformers with random weights; made once, copied per use."""

    @cache
    def build(config: TextEncoderConfig) -> Any:
        values = transformers.CLIPTextConfig.from_dict(to_json(config))
        return randomised(transformers.CLIPTextModelWithProjection(values))

    return lambda config: copy.deepcopy(build(config))


def tokens(*lengths: int) -> dict[str, Any]:
    """Ids and mask of prompts with so many random words, padded with the end token as the tokenizer does."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.full((len(lengths), LENGTH), EOS)
    mask = torch.zeros(len(lengths), LENGTH, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, 0] = BOS
        ids[row, 1 : length + 1] = torch.randint(0, BOS, (length,), generator=generator)
        mask[row, : length + 2] = 1
    return {"input_ids": ids, "attention_mask": mask}


def encode(theirs: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The outputs that the pipelines of diffusers take from the model, under the names of our ports."""
    with torch.no_grad():
        out = theirs(**inputs, output_hidden_states=True)
    return {"prompt_embeds": out.hidden_states[-1], "pooled": out.text_embeds[:, None]}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_transformers_has_the_expected_tensors(oracle: Oracle, config: TextEncoderConfig) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in oracle(config).state_dict().items()}
    assert shapes == expected_tensors(config)


@pytest.mark.parametrize(("config", "lengths", "dtype"), CASES)
def test_embeddings(
    oracle: Oracle,
    difference: Callable[..., float],
    config: TextEncoderConfig,
    lengths: tuple[int, ...],
    dtype: Any,
) -> None:
    theirs = oracle(config).to(dtype)
    ours = load_reference(config, theirs.state_dict(), dtype)
    inputs = tokens(*lengths)
    expected = encode(theirs, inputs)
    with torch.no_grad():
        found = ours(**inputs)
    assert found.keys() == expected.keys()
    # Bit for bit; in double the two ways to the scale of attention, 1/sqrt(d) and d**-0.5, may be an ulp apart.
    tolerance = 1e-14 if dtype == torch.float64 else 0
    for port in expected:
        assert difference(found[port], expected[port]) <= tolerance


def test_prompt_embeds_are_not_normed(oracle: Oracle, difference: Callable[..., float]) -> None:
    """The two candidates differ, so the comparison above has decided between them."""
    with torch.no_grad():
        out = oracle(GELU)(**tokens(3), output_hidden_states=True)
    assert difference(out.hidden_states[-1], out.last_hidden_state) > 0.1


def test_mask_changes_padding_rows_only(oracle: Oracle, difference: Callable[..., float]) -> None:
    ours = load_reference(GELU, oracle(GELU).state_dict())
    inputs = tokens(4)
    with torch.no_grad():
        masked = ours(**inputs)
        unmasked = ours(**{**inputs, "attention_mask": torch.ones(1, LENGTH, dtype=torch.int64)})
    assert difference(masked["prompt_embeds"][:, :6], unmasked["prompt_embeds"][:, :6]) < 1e-6
    assert difference(masked["prompt_embeds"][:, 6:], unmasked["prompt_embeds"][:, 6:]) > 1e-2
    assert difference(masked["pooled"], unmasked["pooled"]) < 1e-6


@pytest.mark.parametrize(
    "name",
    [
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        "text_model.encoder.layers.1.layer_norm1.bias",
        "text_model.encoder.layers.2.self_attn.q_proj.bias",
        "text_model.encoder.layers.2.self_attn.v_proj.bias",
        "text_model.encoder.layers.3.mlp.fc1.bias",
        "text_model.final_layer_norm.weight",
        "text_projection.weight",
    ],
)
def test_one_wrong_row_is_seen(oracle: Oracle, difference: Callable[..., float], name: str) -> None:
    theirs = oracle(GELU)
    weights = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    weights[name][-1] += 0.3  # of the token embedding, the last row is the end token's
    inputs = tokens(3, 75)
    expected = encode(theirs, inputs)
    with torch.no_grad():
        found = load_reference(GELU, weights)(**inputs)
    assert max(difference(found[port], expected[port]) for port in expected) > 1e-4


def test_end_positions() -> None:
    ids = torch.tensor([[BOS, 5, EOS, EOS], [BOS, EOS, EOS, EOS], [BOS, 5, 6, EOS], [BOS, 5, 6, 7]])
    assert end_positions(ids, EOS).tolist() == [2, 1, 3, 0]
    added = torch.tensor([[BOS, EOS + 1, EOS, EOS]])  # a token of a textual inversion
    assert end_positions(added, EOS).tolist() == [2]
    assert end_positions(added, 2).tolist() == [1]  # the known fault of legacy configs, kept for equality


def test_unknown_activation_is_an_error() -> None:
    with pytest.raises(LayoutError, match="hidden_act must be gelu or quick_gelu, found relu"):
        load_reference(replace(GELU, hidden_act="relu"), {})
