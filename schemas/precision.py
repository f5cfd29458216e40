"""The precision that a graph computes in, and the runtime that it is written for."""

from enum import StrEnum
from typing import Literal


class Precision(StrEnum):
    """The type that a graph computes in. Its ports are float32 always, and so are some sums."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"

    @property
    def dtype(self) -> str:
        """The name that numpy and torch have for the type."""
        return {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[self]


class Target(StrEnum):
    """The runtime that a graph is written for: any of opset 20, ONNX Runtime with its own, TensorRT (opset 23)."""

    PORTABLE = "portable"
    ORT = "ort"
    TENSORRT = "tensorrt"


Backend = Literal["tensorrt-rtx", "tensorrt", "aotinductor"]  # a compiler of plans for GPUs, and of packages

FP16_MAX = 65504.0
E4M3_MAX = 448.0  # of fp8 without infinities
