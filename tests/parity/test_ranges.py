"""Ranges of activations against hand-written formulas, and advice that export takes and that holds."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from cascadekit import export
from cascadekit.cli import main
from cascadekit.cli.verify_print import export_options
from cascadekit.converters.checkpoints.open_model import open_model
from cascadekit.parity.inside.ranges import FORMATS, BlockRange, RangeAdvice, advise, export_arguments
from cascadekit.parity.reference.loading import load_component, reference_engine
from cascadekit.parity.report.circumstances import Circumstances
from cascadekit.parity.report.write_report import build_report
from cascadekit.parity.results import Report
from cascadekit.parity.sample_inputs import make_inputs
from cascadekit.runtime.text.tokenizer import ClipTokenizer
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle
from helpers.reports import empty_manifest

TOKENIZER = ClipTokenizer.open(None)
ALL = (Stage.TEXT_ENCODER, Stage.PRIOR, Stage.DECODER, Stage.VQGAN)


def advice_for(model: Path, bundle: Path, stage: Stage) -> RangeAdvice:
    return advise(open_bundle(bundle), stage, reference_engine(open_model([model]), ALL))


def rescaled(tiny: Path, target: Path, stage: str, factors: dict[str, float]) -> Path:
    """The tiny model with some tensors of a stage multiplied."""
    shutil.copytree(tiny / "model", target)
    path = next((target / stage).glob("*.safetensors"))
    tensors = load_file(path)
    for name, factor in factors.items():
        tensors[name] *= np.float32(factor)
    save_file(tensors, path)
    return target


@pytest.fixture(scope="module")
def loud(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prior whose residual sums grow as the releases' do."""
    factors = {"down_blocks.1.0.channelwise.4.weight": 40_000.0}
    return rescaled(tiny, tmp_path_factory.mktemp("loud") / "model", "prior", factors)


def test_spreads_are_those_of_the_modules(tiny: Path) -> None:
    model = open_model([tiny / "model"])
    entry = open_bundle(tiny / "bundle").entry(Stage.PRIOR)
    inputs = make_inputs(Stage.PRIOR, entry, TOKENIZER)[1].inputs
    found = reference_engine(model, ALL).load(Stage.PRIOR).spreads(inputs)
    network = load_component(model.component(Stage.PRIOR))
    seen: dict[str, Any] = {}
    names = [f"up_blocks.1.2.attention.{part}" for part in ("to_q", "to_k")] + ["down_blocks.1.0"]
    for name in names:
        network.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        network(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    block = seen["down_blocks.1.0"].double().numpy()
    assert found["down_blocks.1.0"] == pytest.approx((np.abs(block).max(), np.sqrt((block**2).mean())))
    heads = network.config.num_attention_heads[0]  # type: ignore[union-attr,index]
    q, k = (seen[name].double().numpy() for name in names[:2])
    width = q.shape[-1] // heads
    largest = max(
        np.abs(q[..., h : h + width] @ k[..., h : h + width].swapaxes(1, 2)).max() / width**0.5
        for h in range(0, q.shape[-1], width)
    )
    assert found["up_blocks.1.2.attention/scores"][0] == pytest.approx(largest, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "largest", "usual", "overflows", "lost"),
    [
        ("fp16", 65504.0, 1.0, False, 0.0),
        ("fp16", 70000.0, 1.0, True, 0.0),
        ("fp16", 1.0, 2.0**-17, False, 3.0),  # 2^-14 is the smallest normal number
        ("bf16", 1e38, 1e-30, False, 0.0),
        ("bf16", float("inf"), 1.0, True, 0.0),
        ("fp8", 70000.0, 70000.0 * 2.0**-16, False, np.log2(2.0**-6 / (448 * 2.0**-16))),
    ],
)
def test_bits_and_overflows(kind: str, largest: float, usual: float, overflows: bool, lost: float) -> None:
    block = BlockRange("block", largest, "its sum", usual, largest)
    assert block.overflows(kind) == overflows
    assert block.lost(kind) == pytest.approx(lost)
    for name, form in FORMATS.items():
        info = torch.finfo({"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[name])
        assert float(form.max) == info.max
        assert float(form.smallest_normal) == info.smallest_normal
        assert float(form.eps) == info.eps


@pytest.mark.parametrize("stage", ALL)
def test_predictions_come_true(tiny: Path, stage: Stage) -> None:
    advice = advice_for(tiny / "model", tiny / "bundle", stage)
    assert advice.precision is Precision.FP16
    assert export_arguments([advice]) == {"precisions": {stage: Precision.FP16}}
    assert export_options([advice]) == [f"--precision {stage}=fp16"]
    written = build_report(Report("", "torch", ranges=(advice,)), empty_manifest(), Circumstances("", "", {})).ranges
    assert {entry.name for entry in written} == {block.name for block in advice.blocks}
    for kind in ("fp16", "bf16"):
        error = advice.errors[kind]
        assert error.measured is not None
        assert 0.4 < error.predicted / error.measured < 2.5, kind
    fp8 = advice.errors["fp8"]
    assert fp8.measured is not None
    if stage is Stage.VQGAN:  # of which nothing is quantised
        assert fp8.measured < 1e-6
    else:
        assert 1 < fp8.predicted / fp8.measured < 4  # convolutions and sums are not rounded


def test_an_overflow_is_foreseen_and_the_advice_cures_it(tiny: Path, loud: Path, tmp_path: Path) -> None:
    export(loud, tmp_path / "wide", precision=Precision.FP16, fp16_safe="off")
    call = ["verify", str(tmp_path / "wide"), "--against", str(loud), "--stage", "prior", "--ranges", "--json"]
    result = CliRunner().invoke(main, call)
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    (advice,) = content["ranges"]
    over = [block["name"] for block in advice["blocks"] if block["overflows"]["fp16"]]
    assert "down_blocks.1.0" in over
    assert "down_blocks.0.0" not in over
    assert advice["errors"]["fp16"]["measured"] is None  # the reference in fp16 overflows as foreseen
    assert advice["errors"]["bf16"]["measured"] is not None
    options = " ".join(content["export_options"]).split()
    assert options[:3] == ["--precision", "prior=fp16", "--fp16-safe"]
    assert int(options[3]) > 0

    verify = ["--against", str(loud), "--stage", "prior", "--no-verdict"]
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "wide"), *verify]).exit_code == 1
    made = CliRunner().invoke(main, ["export", str(loud), "-o", str(tmp_path / "safe"), *options])
    assert made.exit_code == 0, made.output
    for look in ([], ["--bisect"]):
        healthy = CliRunner().invoke(main, ["verify", str(tmp_path / "safe"), *verify, *look])
        assert healthy.exit_code == 0, healthy.output
    export(loud, tmp_path / "auto", precision=Precision.FP16, fp16_safe="auto")
    by_probes = open_bundle(tmp_path / "auto").entry(Stage.PRIOR).exponents
    assert abs(max(by_probes.values()) - int(options[3])) <= 1  # other latents, another way to measure


def test_values_too_small_for_fp16_are_named(tiny: Path, tmp_path: Path) -> None:
    names = ("up_blocks.0.0.weight", "up_blocks.0.0.bias")
    quiet = rescaled(tiny, tmp_path / "model", "vqgan", dict.fromkeys(names, 1e-5))
    advice = advice_for(quiet, tiny / "bundle", Stage.VQGAN)
    losing = [block for block in advice.blocks if block.lost("fp16") > 1]
    assert [block.name for block in losing] == ["up_blocks.0.0"]
    assert losing[0].lost("bf16") == 0
    assert "vqgan in fp16: up_blocks.0.0 lose more than 1 bit" in advice.described()


def test_ranges_and_parts_go_into_the_report(tiny: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--stage", "vqgan", "--bisect", "--ranges", "--report", str(report), "--no-verdict"]
    result = CliRunner().invoke(main, ["verify", str(tiny / "bundle"), "--against", str(tiny / "model"), *options])
    assert result.exit_code == 0, result.output
    content = json.loads(report.read_text())
    assert {entry["name"] for entry in content["ranges"]} >= {"up_blocks.1", "out_block.0"}
    assert any(entry["accumulated"] is not None for entry in content["depth"])
