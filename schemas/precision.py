"""How a graph computes, and for whom it is written."""

from enum import StrEnum


class Precision(StrEnum):
    """The type a graph computes in. Its ports stay float32, and some sums are float32 in every precision."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class Target(StrEnum):
    """The runtime that a graph is written for: any of opset 20, ONNX Runtime with its own, TensorRT (opset 23)."""

    PORTABLE = "portable"
    ORT = "ort"
    TENSORRT = "tensorrt"


FP16_MAX = 65504.0
E4M3_MAX = 448.0  # of fp8 without infinities
