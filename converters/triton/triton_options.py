"""The choices of `export_triton`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ...schemas.errors import UsageError
from ...schemas.messages import known_fields
from ..export.export_options import WeightsMode

TritonBackend = Literal["onnxruntime", "tensorrt", "python"]
BACKENDS: tuple[str, ...] = get_args(TritonBackend)
KINDS: Mapping[str, str] = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "cuda": "KIND_GPU"}  # of instances of the stages
MOST_BATCH, MOST_INSTANCES = 64, 64


@known_fields
@dataclass(frozen=True)
class TritonOptions:
    """How the server runs the bundle.

    `backend` runs the stages: Triton's own "onnxruntime" or "tensorrt", or "python", which runs ONNX Runtime in Python.
    `device` is "auto" (GPUs if the server has any), "cpu" or "cuda". `batch` is the most rows of a call and of a stage.
    `exact` gives each image the same bytes alone and in any batch. `instances` of `cascade` and of `cascade_stream`
    work at the same time. `weights` are clones where the file system has them, else copies ("auto"), hard links or
    copies. `force` replaces an earlier repository."""

    backend: str = "onnxruntime"
    device: str = "auto"
    batch: int = 8
    exact: bool = True
    instances: int = 1
    weights: str = "auto"
    force: bool = False

    def __post_init__(self) -> None:
        """Raises UsageError for a value that is none of those above."""
        for name, allowed in (("backend", BACKENDS), ("device", tuple(KINDS)), ("weights", get_args(WeightsMode))):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        for name, most in (("batch", MOST_BATCH), ("instances", MOST_INSTANCES)):
            if not 1 <= getattr(self, name) <= most:
                raise UsageError(f"{name}={getattr(self, name)}: expected 1 to {most}")
        if self.backend == "tensorrt" and self.device == "cpu":
            raise UsageError('backend="tensorrt": runs on GPUs alone; set device="cuda"')
