"""Messages about files that do not hold what a network has: each names the kind, and none says "damaged"."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascadekit import convert, inspect
from cascadekit.schemas.errors import LayoutError
from cascadekit.schemas.stages import Stage

Tensors = dict[str, torch.Tensor]


def lacking(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("up_blocks.1.2.")}


def other_sizes(tensors: Tensors) -> Tensors:
    return {**tensors, "clf.1.weight": torch.zeros(16, 32, 1, 1)}


def more_blocks(tensors: Tensors) -> Tensors:
    return {**tensors, "adapter.0.weight": torch.zeros(3)}


def with_lora(tensors: Tensors) -> Tensors:
    return {**tensors, "down_blocks.0.2.attention.attn.lora_down.weight": torch.zeros(3, 3)}


def with_optimizer(tensors: Tensors) -> Tensors:
    return {**tensors, "clf.1.weight.exp_avg": torch.zeros(3)}


def quantised(tensors: Tensors) -> Tensors:
    name = "down_blocks.0.0.channelwise.0.weight"
    return {**tensors, name: tensors[name].to(torch.int8), f"{name}.absmax": torch.zeros(3)}


KINDS: dict[Callable[[Tensors], Tensors], str] = {
    lacking: "saved in part, pruned, or cut out of a larger file",
    other_sizes: "of a derived model, or it mixes two models",
    more_blocks: "tensors that the network does not have",
    with_lora: "Among its tensors is a LoRA",
    with_optimizer: "Among its tensors is training state",
    quantised: "quantised in a way that is not supported",
}


@pytest.mark.parametrize("change", KINDS)
def test_a_surplus_or_lack_is_named_by_its_kind(
    original: Path, tmp_path: Path, change: Callable[[Tensors], Tensors]
) -> None:
    save_file(change(load_file(original / "stage_c.safetensors")), tmp_path / "x.safetensors")
    with pytest.raises(LayoutError, match=KINDS[change]) as refusal:
        convert([tmp_path / "x.safetensors"], tmp_path / "out", "diffusers")
    assert "damaged" not in str(refusal.value)


def batch_norms(catalog_folder: Path, original: Path, folder: Path) -> Iterator[tuple[Stage, Path]]:
    from helpers.standins import write_stand_in

    for stage in (Stage.VQGAN, Stage.PREVIEWER, Stage.EFFNET_ENCODER):
        path = folder / f"{stage}-whole.safetensors"
        if stage is Stage.VQGAN:
            yield stage, original / "stage_a.safetensors"
        else:
            write_stand_in(catalog_folder / f"original_{stage}.json", path, "BF16")
            yield stage, path


def test_missing_counters_are_written_as_zero(catalog_folder: Path, original: Path, tmp_path: Path) -> None:
    """ComfyUI tells a VAE by these names, so that a file without them would not be found; PyTorch takes 0 for them."""
    for stage, whole in batch_norms(catalog_folder, original, tmp_path):
        tensors = load_file(whole)
        path = tmp_path / f"{stage}.safetensors"
        save_file({name: t for name, t in tensors.items() if not name.endswith("num_batches_tracked")}, path)
        (component,) = inspect(path).components.values()
        assert component.stage is stage
        assert not component.problems
        done = convert([path], tmp_path / f"{stage}-out.safetensors", "original")
        assert any("num_batches_tracked" in note and "written as 0" in note for note in done.notes)
        found = load_file(tmp_path / f"{stage}-out.safetensors")
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            counter = name.endswith("num_batches_tracked")
            assert torch.equal(found[name], torch.zeros_like(tensor) if counter else tensor), name
            assert found[name].dtype == tensor.dtype


def test_a_vqgan_without_its_counter_loads_as_diffusers_loads_it(original: Path, tmp_path: Path) -> None:
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    tensors = load_file(original / "stage_a.safetensors")
    counter = next(name for name in tensors if name.endswith("num_batches_tracked"))
    save_file({n: t for n, t in tensors.items() if n != counter}, tmp_path / "stage_a.safetensors")
    convert([tmp_path / "stage_a.safetensors"], tmp_path / "model", "diffusers")
    network, info = PaellaVQModel.from_pretrained(tmp_path / "model/vqgan", output_loading_info=True)
    assert not info["missing_keys"]
    assert network.state_dict()[counter] == 0
