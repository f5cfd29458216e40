"""GPU engines ("plans") as a bundle's manifest lists them."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from .json_models import Bytes, Capability, Dimension, FrozenModel, Sha256, Side
from .limits import MAX_FILE_BYTES, MAX_SIDE
from .paths import RelativePath
from .precision import Backend, Precision

PARKED = ("weight_inputs", "built_in")  # fields of a plan that earlier versions wrote


class ImageSize(FrozenModel):
    """The images that a profile is for: their size in pixels, and how many are generated at a time."""

    width: Side
    height: Side
    images: int = Field(ge=1, le=MAX_SIDE)


class PortShapes(FrozenModel):
    """The smallest, the likeliest and the largest shape of an input port."""

    min: tuple[Dimension, ...]
    opt: tuple[Dimension, ...]
    max: tuple[Dimension, ...]


class ProfileEntry(FrozenModel):
    """The shapes that one optimisation profile of a plan accepts.

    `ports` has the inputs in the graph's order. With guidance the batch of a port is twice the number of images."""

    min: ImageSize
    opt: ImageSize
    max: ImageSize
    ports: dict[str, PortShapes]


class PlanSource(FrozenModel):
    """A file that a plan was built from, as the stage's `files` listed it at that time."""

    path: RelativePath
    fingerprint: Sha256
    sha256: Sha256 | None


class DeviceEntry(FrozenModel):
    """The device that a plan was built on and for: its name, and a GPU's compute capability as in "sm89", or "cpu"."""

    name: str
    capability: Capability | Literal["cpu"]


class PlanEntry(FrozenModel):
    """A GPU engine that was built from one graph of the stage.

    TensorRT-RTX builds for compute capabilities, the `targets`. TensorRT builds for the one `device` it runs on. The
    profiles have the plan's order. A plan is useless once the stage's `files` are not its `sources` any more. The
    build took `seconds` and at most `peak_rss` bytes of memory."""

    graph: str
    path: RelativePath
    bytes: int = Field(ge=1, le=MAX_FILE_BYTES)
    sha256: Sha256
    backend: Backend
    backend_version: str
    targets: tuple[Capability, ...] = ()
    device: DeviceEntry | None = None
    precision: Precision
    profiles: tuple[ProfileEntry, ...] = Field(min_length=1)
    sources: tuple[PlanSource, ...] = Field(min_length=1)
    refittable: bool = False  # whether the weights can be exchanged for others of the same graph
    weight_streaming: bool = False  # whether weights may stay in the host's memory while the plan runs
    seconds: float = Field(ge=0, allow_inf_nan=False)
    peak_rss: Bytes

    @model_validator(mode="before")
    @classmethod
    def _without_parked(cls, given: Any) -> Any:
        """Drop the empty fields that earlier versions wrote for plans with weights as inputs."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value or name not in PARKED}

    @model_validator(mode="after")
    def _has_targets_or_device(self) -> Self:
        if bool(self.targets) == bool(self.device):
            raise ValueError("expected either targets or a device")
        return self
