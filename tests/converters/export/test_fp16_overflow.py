"""The note of export on fp16 without exponents: by formulas written anew in torch, and by what a prior then gives."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascadekit import export
from cascadekit.converters.export.export_options import ExportOptions
from cascadekit.converters.export.fp16_overflow import largest_stream
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.stages import Stage
from cascadekit.storage.safetensors_reader import read_header

FP16 = ExportOptions(precisions={Stage.PRIOR: Precision.FP16}, fp16_safe="off")


def exported(model: Path, to: Path, wishes: ExportOptions = FP16) -> list[str]:
    said: list[str] = []
    export(model, to, stages=[Stage.PRIOR], options=wishes, say=said.append)
    return [line for line in said if "fp16" in line]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_over_a_stream(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    names = ["up_blocks.0.0.channelwise.4", "up_blocks.0.1.attention.to_out.0", "up_blocks.1.0.channelwise.4"]
    tensors = {f"{name}.weight": torch.randn(8, 5, generator=generator).to(dtype) for name in names}
    tensors |= {f"{name}.bias": torch.randn(8, generator=generator).to(dtype) for name in names}
    tensors |= {"up_blocks.0.0.channelwise.0.weight": torch.full((8, 5), 1e4).to(dtype)}  # which is no last layer
    save_file(tensors, tmp_path / "w.safetensors")
    expected = sum(
        float(tensors[f"{name}.weight"].float().norm(dim=1).max() + tensors[f"{name}.bias"].float().abs().max())
        for name in names[:2]
    )
    stream, size = largest_stream(read_header(tmp_path / "w.safetensors").tensors)
    assert stream == "up_blocks.0"
    assert size == pytest.approx(expected, rel=1e-5)


def test_export_says_what_may_overflow(tiny: Path, tmp_path: Path) -> None:
    (line,) = exported(tiny / "model", tmp_path / "sound")
    assert line.startswith("prior in fp16: how large its values grow was not measured")
    shutil.copytree(tiny / "model", tmp_path / "model")
    (path,) = (tmp_path / "model" / "prior").glob("*.safetensors")
    tensors = load_file(path)
    for name in tensors:
        if name.startswith("up_blocks.1") and (".channelwise.4." in name or ".to_out.0." in name):
            tensors[name] *= 1e5
    save_file(tensors, path, {"format": "pt"})
    (line,) = exported(
        tmp_path / "model",
        tmp_path / "plain",
        ExportOptions(precisions={Stage.PRIOR: Precision.FP16}, storage=Precision.FP32, fp16_safe="off"),
    )
    assert line.startswith("prior in fp16: by its weights up_blocks.1 reaches about ")
    assert 'fp16_safe="auto" measures and prevents it' in line
    assert exported(tmp_path / "model", tmp_path / "fp32", ExportOptions()) == []
