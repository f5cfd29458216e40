"""Names of GPUs and what they cannot run."""

import pytest

from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.quantization import Quantization
from cascadekit.schemas.targets import (
    RTX_TARGETS,
    group_targets,
    parse_target,
    parse_targets,
    refusal,
    require_rtx_targets,
)

# Compute capabilities as NVIDIA lists them, https://developer.nvidia.com/cuda-gpus
CARDS = {
    "sm75": ["GTX 1650", "GeForce GTX 1660 Ti", "RTX 2060", "rtx 2080 super", "2080ti", "Titan RTX", "Tesla T4"],
    "sm80": ["A100", "A100-SXM4-80GB", "NVIDIA A100 80GB PCIe", "A30"],
    "sm86": ["rtx 3060", "NVIDIA GeForce RTX 3090 Ti", "RTX A6000", "RTX A1000", "A10", "A40", "rtx-3050-laptop"],
    "sm89": ["rtx 4090", "RTX4060ti", "NVIDIA GeForce RTX 4070 Laptop GPU", "RTX 6000 Ada", "L4", "L40S", "4080"],
    "sm120": ["rtx 5090", "RTX 5070 Ti", "RTX PRO 6000 Blackwell Workstation Edition"],
    "sm121": ["DGX Spark", "GB10"],
    "sm90": ["H100", "H200", "NVIDIA H100 80GB HBM3", "GH200"],
    "sm100": ["B200", "GB200"],
    "sm70": ["V100", "Titan V"],
}


@pytest.mark.parametrize(("target", "names"), CARDS.items())
def test_cards(target: str, names: list[str]) -> None:
    assert {name: parse_target(name) for name in names} == dict.fromkeys(names, target)


@pytest.mark.parametrize("name", ["sm89", "SM_89", "8.9", "89", "compute_89"])
def test_capabilities(name: str) -> None:
    assert parse_target(name) == "sm89"
    assert parse_target(name.replace("89", "120").replace("8.9", "12.0")) == "sm120"


@pytest.mark.parametrize("name", ["rtx", "rx 7900", "sm", "gpu0", "8", "rtx 9990", "4090 and more"])
def test_unknown_cards(name: str) -> None:
    with pytest.raises(UsageError, match=r"not a known GPU; expected one of sm75, .*'rtx 4090'"):
        parse_target(name)


def test_several() -> None:
    assert parse_targets(["rtx 5090,sm89", "8.0", "4090", " "]) == ("sm80", "sm89", "sm120")
    assert group_targets(("sm75", "sm80", "sm120")) == [("sm75",), ("sm80", "sm120")]
    assert group_targets(("sm89",)) == [("sm89",)]
    assert group_targets(()) == []


def test_what_rtx_builds_for() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    named = {name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM")}
    assert set(RTX_TARGETS) == named
    require_rtx_targets(RTX_TARGETS)
    with pytest.raises(UsageError, match="""such as targets=\\["sm89"\\] or targets="""):
        require_rtx_targets(())
    with pytest.raises(UsageError, match=r"sm90: .* on the GPU itself use backend=\"tensorrt\""):
        require_rtx_targets(("sm89", "sm90"))
    with pytest.raises(UsageError, match=r"sm61: TensorRT-RTX builds for .* alone; TensorRT needs sm75 or later, too"):
        require_rtx_targets(parse_targets(["gtx 1080"]))


# What TensorRT-RTX 1.7.1 refused to build, and what has operators it does not know (int8-dynamic).
REFUSED = {
    ("sm75", "fp32", "none"),
    ("sm75", "bf16", "none"),
    *((target, precision, "int8-dynamic") for target in RTX_TARGETS for precision in Precision),
    *((target, precision, "fp8") for target in ("sm75", "sm80", "sm86") for precision in Precision),
    *(("sm75", precision, "int4") for precision in Precision),
    ("sm75", "bf16", "int8"),
    ("sm75", "fp32", "int8"),
}


def test_refusals() -> None:
    found = {
        (target, str(precision), str(quantization))
        for target in RTX_TARGETS
        for precision in Precision
        for quantization in Quantization
        if refusal("tensorrt-rtx", target, precision, quantization)
    }
    assert found == {tuple(map(str, case)) for case in REFUSED}


def test_plain_tensorrt_multiplies_fp32_everywhere() -> None:
    assert refusal("tensorrt", "sm75", Precision.FP32, Quantization.NONE) is None
    assert refusal("tensorrt", "sm90", Precision.BF16, Quantization.FP8) is None
    refused = refusal("tensorrt", "sm75", Precision.BF16, Quantization.NONE)
    assert refused is not None
    assert (refused.reason, refused.instead) == ("sm75 in tensorrt has no bf16", Precision.FP16)
    assert (refused.argument, refused.option) == ('precision="fp16"', "--precision fp16")
