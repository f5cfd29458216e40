"""Weights of real size down the whole road: original file -> model folder -> ONNX -> one forward pass.

Minutes and gigabytes: `make test-slow`. The largest step holds one stage in fp32 twice (weights and prepacked).
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from cascadekit import convert, export
from cascadekit.bench import bench_generate
from cascadekit.converters.checkpoints.open_model import open_model
from cascadekit.parity.compare_engine import compare_engine
from cascadekit.parity.reference import build_reference
from cascadekit.parity.reference.loading import reference_engine
from cascadekit.runtime.engines.onnxruntime import OnnxRuntimeEngine
from cascadekit.schemas.stages import PRESETS, Stage, Variant
from cascadekit.storage.bundle import open_bundle
from helpers.standins import write_stand_in


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage"), [("original_stage_c_lite", Stage.PRIOR), ("original_stage_b_lite", Stage.DECODER)]
)
def test_lite_stages(catalog_folder: Path, tmp_path: Path, name: str, stage: Stage) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    source = tmp_path / f"{name}_bf16.safetensors"
    write_stand_in(catalog_folder / f"{name}.json", source, "BF16")
    convert([source], tmp_path / "model", "diffusers")
    manifest = export(tmp_path / "model", tmp_path / "bundle", weights="copy")
    assert manifest.stages[stage].variant is Variant.LITE

    with safe_open(source, "pt") as before:
        rows = before.get_slice(
            "down_blocks.1.2.attention.attn.in_proj_weight" if stage is Stage.PRIOR else "clf.1.bias"
        )
        first = rows[:4]
    weights = tmp_path / "bundle" / stage / "weights.safetensors"
    with safe_open(weights, "pt") as after:
        copied = after.get_slice("down_blocks.1.2.attention.to_q.weight" if stage is Stage.PRIOR else "clf.1.bias")[:4]
    assert first.equal(copied)

    opened = open_bundle(tmp_path / "bundle")
    reference = reference_engine(open_model([tmp_path / "model"]), [stage])
    report = compare_engine(OnnxRuntimeEngine(opened), reference, opened, [stage])
    for comparison in report.comparisons:
        print(f"{comparison.name}: relative L2 {comparison.relative_l2:.2e}, max abs {comparison.max_abs:.2e}")
    assert report


@pytest.mark.slow
def test_memory_of_a_staged_generation(tmp_path: Path) -> None:
    """A process that draws images with one lite stage in memory at a time needs little more than the largest as it is
    loaded, the prior in fp32; and what is predicted before."""
    report = bench_generate(
        tmp_path, programs=["onnxruntime"], memory="staged", size=(1024, 1024), steps=(1, 1), rounds=1, runs=1
    )
    peak = report.programs["onnxruntime"].peak_rss
    shapes = build_reference(PRESETS[Stage.PRIOR, Variant.LITE]).state_dict().values()
    weights = 4 * sum(tensor.numel() for tensor in shapes)
    print(f"peak {peak / 1e9:.2f} GB, {peak / weights:.2f} times the prior")
    print(f"predicted {report.predicted_peak / 1e9:.2f} GB")
    assert peak <= 1.15 * weights
    assert peak == pytest.approx(report.predicted_peak, rel=0.15)
