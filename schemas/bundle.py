"""The manifest of an exported bundle: `cascade.json` at its root."""

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .errors import CheckpointError
from .layouts import Layout
from .stages import Stage, Variant

MANIFEST_NAME = "cascade.json"
GRAPH_NAME = "model.onnx"
FORMAT = "cascadekit-bundle"
VERSION = 1


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise ValueError(f"{path!r} leads out of the bundle")
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Frozen):
    """A file of the bundle, its path relative to the root, "/" between folders."""

    path: RelativePath
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class SourceEntry(_Frozen):
    """A file the bundle was made from; `name` is its name alone, as paths of another machine tell nothing."""

    name: str
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    layout: Layout


class PortEntry(_Frozen):
    """A port as in `schemas.ports`."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]


class StageEntry(_Frozen):
    """One exported stage. `config` is the network's config.json; the graph is `files[0]`."""

    variant: Variant
    config: dict[str, Any]
    precision: Literal["fp32"]
    quantization: str = "none"  # of the weights of Linears, see schemas.quantization
    opset: int
    weights: Literal["copy", "link"]
    sources: tuple[SourceEntry, ...]
    inputs: tuple[PortEntry, ...]
    outputs: tuple[PortEntry, ...]
    files: tuple[FileEntry, ...] = Field(min_length=1)


class Manifest(_Frozen):
    """Everything a runtime needs to know of a bundle without opening a graph."""

    format: Literal["cascadekit-bundle"] = "cascadekit-bundle"
    version: Literal[1] = 1
    created_by: str
    default_size: tuple[int, int]  # (width, height)
    vqgan_scale: float | None  # the factor inside the vqgan graph; None without a vqgan
    tokenizer: RelativePath | None  # a tokenizer.json; None: the one the package ships
    stages: dict[Stage, StageEntry]
    engines: tuple[str, ...] = ("onnxruntime",)  # what can run it, the preferred one first


def parse_manifest(text: str, where: str) -> Manifest:
    """The manifest in `text`. Raises CheckpointError that names `where` and each field that is wrong."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:5])
        raise CheckpointError(f"{where}: not a manifest of format {FORMAT} {VERSION}: {wrong}") from error
