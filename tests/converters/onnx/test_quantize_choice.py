"""Which Linears are quantised: what is measured, on what, and what follows from it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cascadekit.converters.export.quantize_choice import choose_layers, seeded_inputs
from cascadekit.converters.export.quantize_values import dequantize, quantize
from cascadekit.schemas.precision import Target
from cascadekit.schemas.quantization import Quantization, Scheme, candidates, linears
from cascadekit.schemas.stages import PRESETS, NetworkConfig, Stage, TextEncoderConfig, Variant
from cascadekit.schemas.tensors import expected_tensors
from cascadekit.storage.safetensors_reader import read_header
from helpers.graphs import Exported

INT8, INT4 = Quantization.INT8, Quantization.INT4
PORTABLE, ORT, TENSORRT = Target
PRIOR = PRESETS[Stage.PRIOR, Variant.TINY]
TEXT = TextEncoderConfig(64, 96, 2, 2, 24, vocab_size=50, eos_token_id=49)


@pytest.mark.parametrize("config", [PRIOR, PRESETS[Stage.DECODER, Variant.TINY], TEXT], ids=lambda c: str(c.stage))
def test_each_layer_is_measured_on_what_goes_into_it(export: Callable[..., Exported], config: NetworkConfig) -> None:
    """Against hooks on the PyTorch reference with the same inputs."""
    graph, scheme = export(config), Scheme(INT4, ORT)
    inputs = seeded_inputs(config)
    choice = choose_layers(config, read_header(graph.path.with_name("weights.safetensors")).tensors, scheme)
    measured = {layer.module: layer.error for layer in choice.layers if layer.error is not None}
    assert set(measured) == set(candidates(config.stage, expected_tensors(config)))
    first: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            first.setdefault(name, given[0].flatten(0, -2))

        return hook

    handles = [graph.reference.get_submodule(name).register_forward_pre_hook(keep(name)) for name in measured]
    graph.expected(inputs)
    for handle in handles:
        handle.remove()
    for module, error in measured.items():
        weight = graph.tensors[f"{module}.weight"].flatten(1)
        rounded = torch.from_numpy(dequantize(quantize(weight.numpy(), scheme), scheme))
        rows = first[module][:: -(-len(first[module]) // 512)]
        expected = float((rows @ (weight - rounded).T).norm() / (rows @ weight.T).norm())
        assert error == pytest.approx(expected, rel=1e-3), module


def test_layers_that_do_not_bear_it_stay_float(export: Callable[..., Exported], tmp_path: Path) -> None:
    scheme = Scheme(INT4, ORT)
    tensors = read_header(export(PRIOR).path.with_name("weights.safetensors")).tensors
    by_default = choose_layers(PRIOR, tensors, scheme)
    assert by_default.chosen == set(candidates(Stage.PRIOR, expected_tensors(PRIOR)))  # random weights have no outliers
    always = {layer.module: layer for layer in by_default.layers if layer.error is None}
    assert {"clf.1", "embedding.1", "clip_txt_mapper", "down_blocks.0.1.mapper"} <= always.keys()
    assert all(layer.reason and layer.bytes_after == layer.bytes_before for layer in always.values())
    errors = sorted(layer.error for layer in by_default.layers if layer.error is not None)
    middle = errors[len(errors) // 2]
    strict = choose_layers(PRIOR, tensors, scheme, threshold=middle)
    kept = {layer.module for layer in strict.layers if layer.error is not None and layer.reason}
    assert kept == {layer.module for layer in by_default.layers if layer.error and layer.error > middle}
    small = next(layer for layer in strict.layers if layer.reason is None)
    assert small.bytes_after == small.bytes_before * (4 + 1) // 32  # four bits, and 32 of a scale for 32 of them
    assert [path for path in tensors["clf.1.bias"].path.parent.iterdir() if path.name.startswith(".")] == []


def test_odd_columns_and_networks_without_rules(export: Callable[..., Exported]) -> None:
    text = PRESETS[Stage.TEXT_ENCODER, Variant.TINY]  # 8 columns, 32 in the last Linear of a layer
    tensors = read_header(export(text).path.with_name("weights.safetensors")).tensors
    chosen = choose_layers(text, tensors, Scheme(INT8, PORTABLE)).chosen
    assert {module.rpartition(".")[2] for module in chosen} == {"fc2"}
    long_blocks = choose_layers(text, tensors, Scheme(INT8, ORT, 128))
    assert long_blocks.chosen == frozenset()
    assert "8 columns take no less room" in str([layer.reason for layer in long_blocks.layers])
    vqgan: NetworkConfig = PRESETS[Stage.VQGAN, Variant.TINY]
    assert not list(linears(vqgan.stage, expected_tensors(vqgan)))


@pytest.mark.parametrize(("kind", "bears"), [(INT4, False), (INT8, False), (Quantization.FP8, True)])
def test_values_far_out_cost_too_much(
    export: Callable[..., Exported], tmp_path: Path, kind: Quantization, bears: bool
) -> None:
    """Two channels of an attention's values are made a hundred times smaller, and the columns of the output projection
    that they meet as much larger: the same network, but those columns take the scales. fp8 has steps in proportion."""
    module, scheme = "up_blocks.1.2.attention", Scheme(kind, PORTABLE)
    tensors = {name: tensor.clone() for name, tensor in export(PRIOR).tensors.items()}
    for part in ("weight", "bias"):
        tensors[f"{module}.to_v.{part}"][::32] /= 100
    tensors[f"{module}.to_out.0.weight"][:, ::32] *= 100
    save_file(tensors, tmp_path / "weights.safetensors")
    found = choose_layers(PRIOR, read_header(tmp_path / "weights.safetensors").tensors, scheme)
    others = candidates(Stage.PRIOR, expected_tensors(PRIOR)).keys() - {f"{module}.to_out.0"}
    assert found.chosen == (others | {f"{module}.to_out.0"} if bears else others)
