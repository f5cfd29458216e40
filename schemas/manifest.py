"""The manifest of an exported bundle: `cascade.json` at its root."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from .errors import CheckpointError
from .folders import BUNDLE_FORMAT as FORMAT
from .folders import MANIFEST_NAME as MANIFEST_NAME
from .json_models import (
    Bytes,
    Dimension,
    Exponent,
    FileName,
    Finite,
    FrozenModel,
    LoraEntry,
    Number,
    Sha256,
    Side,
    finite,
)
from .json_text import load_object
from .layouts import Layout
from .limits import MAX_FILE_BYTES, VQGAN_SCALES
from .messages import shown, wrong_fields
from .paths import PlainName, RelativePath
from .plan_entries import PARKED, PlanEntry, PlanSource
from .precision import Precision, Target
from .quantization import Quantization
from .stages import Stage, Variant

MAIN_GRAPH = "model"  # the graph every stage has
ENCODER_GRAPH = "encoder"  # the second graph of a vqgan: from images to latents
VERSION = 2

PORT_DTYPES = ("float32", "float16", "bfloat16", "int64", "int32")  # numpy's names; graphs have no other ports

Placement = Literal["copy", "link", "reflink"]

# The operator domains that each target can run; "" is ai.onnx.
DOMAINS: Mapping[Target, tuple[str, ...]] = {
    Target.PORTABLE: ("",),
    Target.ORT: ("", "com.microsoft"),
    Target.TENSORRT: ("",),
}

LatentScale = Annotated[float, Field(ge=VQGAN_SCALES[0], le=VQGAN_SCALES[1])]


class FileEntry(FrozenModel):
    """A file of the bundle; `path` is relative to the root, with "/" between folders.

    A file of this size and `mtime_ns` is taken for the one that was exported. The `fingerprint` covers the size, the
    safetensors header and samples of the content (see `storage.file_hashes`). The `sha256` covers every byte. Weights
    have none when they were exported with ``hash=False`` or by an early version."""

    path: RelativePath
    bytes: Bytes
    mtime_ns: int = Field(ge=-MAX_FILE_BYTES, le=MAX_FILE_BYTES)
    fingerprint: Sha256
    sha256: Sha256 | None


class SourceEntry(FrozenModel):
    """A file that the bundle was made from. `name` has no folders, because paths of another machine mean nothing.

    `sha256` is known when the bundle contains the same file and its hash was computed."""

    name: FileName
    bytes: Bytes
    fingerprint: Sha256
    sha256: Sha256 | None
    layout: Layout


class PortEntry(FrozenModel):
    """A port of a graph, see `schemas.ports.Port`."""

    name: str
    dtype: str
    dims: tuple[Dimension | str, ...]


def _typed(port: PortEntry) -> PortEntry:
    if port.dtype not in PORT_DTYPES:
        raise ValueError(f"expected a dtype among {', '.join(PORT_DTYPES)}, found {shown(port.dtype)}")
    return port


TypedPort = Annotated[PortEntry, AfterValidator(_typed)]


class GraphEntry(FrozenModel):
    """One graph of a stage: its ONNX file, its inputs and its outputs."""

    path: RelativePath
    opset: int = Field(ge=0, le=1000)
    inputs: tuple[TypedPort, ...]
    outputs: tuple[TypedPort, ...]


class StageEntry(FrozenModel):
    """One exported stage.

    `config` is the network's config.json. The graphs share the weights; the graph "model" is the whole network.
    `weights` is "copy" for files of the bundle's own, and "link" for hard links to the model's files. It is "reflink"
    for clones, which share their blocks on disk until one file changes."""

    variant: Variant
    config: Annotated[dict[str, Any], AfterValidator(finite)]
    precision: Precision
    target: Target = Target.PORTABLE
    quantization: Quantization = Quantization.NONE  # of the weights of Linears
    # Stream -> k where the graph carries 2^-k of the values, and block -> bits between its largest measured value and
    # fp16's largest number; see `schemas.fp16`.
    exponents: dict[str, Exponent] = Field(default_factory=dict)
    fp16_margins: dict[str, Finite] = Field(default_factory=dict)
    fp32_blocks: tuple[str, ...] = ()  # residual blocks that compute in fp32 in a graph of another precision
    control: tuple[Dimension, ...] = ()  # residual blocks that take a ControlNet's residual
    weights: Placement
    sources: tuple[SourceEntry, ...]
    graphs: dict[PlainName, GraphEntry]
    files: tuple[FileEntry, ...] = Field(min_length=1)
    plans: tuple[PlanEntry, ...] = ()  # GPU engines, the newest last; they are not among `files`

    @field_validator("plans", mode="before")
    @classmethod
    def _without_parked(cls, given: Any) -> Any:
        """Leave out plans that take weights as inputs. Earlier versions built them; this version cannot run them."""
        if not isinstance(given, list | tuple):
            return given
        return [plan for plan in given if not (isinstance(plan, dict) and any(plan.get(name) for name in PARKED))]

    @model_validator(mode="after")
    def _graphs_are_files(self) -> Self:
        if MAIN_GRAPH not in self.graphs:
            raise ValueError(f"no graph {MAIN_GRAPH!r}")
        unlisted = self.graph_paths - {file.path for file in self.files}
        if unlisted:
            raise ValueError(f"{', '.join(sorted(unlisted))}: a graph that is not listed among the files")
        _require_once(file.path for file in self.files)
        unknown = {plan.graph for plan in self.plans} - self.graphs.keys()
        if unknown:
            raise ValueError(f"plans of {', '.join(sorted(unknown))}, which is not a graph of the stage")
        return self

    def is_current(self, plan: PlanEntry) -> bool:
        """True when `plan` was built from the files that the stage has now.

        The SHA-256 decides where both files have one, else the fingerprint."""
        files = {file.path: file for file in self.files}
        return all(source.path in files and _same(source, files[source.path]) for source in plan.sources)

    @property
    def inputs(self) -> tuple[PortEntry, ...]:
        """Inputs of the graph "model"."""
        return self.graphs[MAIN_GRAPH].inputs

    @property
    def outputs(self) -> tuple[PortEntry, ...]:
        """Outputs of the graph "model"."""
        return self.graphs[MAIN_GRAPH].outputs

    @property
    def graph_paths(self) -> frozenset[str]:
        return frozenset(graph.path for graph in self.graphs.values())

    def with_main_graph_alone(self) -> Self:
        """The same stage with the graph "model" alone: without the files of other graphs, and without plans."""
        main = self.graphs[MAIN_GRAPH]
        unused = self.graph_paths - {main.path}
        files = tuple(file for file in self.files if file.path not in unused)
        return self.model_copy(update={"graphs": {MAIN_GRAPH: main}, "files": files, "plans": ()})


def _same(source: PlanSource, file: FileEntry) -> bool:
    if source.sha256 and file.sha256:
        return source.sha256 == file.sha256
    return source.fingerprint == file.fingerprint


class LoraState(FrozenModel):
    """The LoRAs in the weights, in the order they were merged.

    `kept` are the files that the merge replaced, the manifest included; undoing the merge restores them. There are none
    when the bundle was exported with its LoRAs."""

    loras: tuple[LoraEntry, ...] = Field(min_length=1)
    kept: tuple[FileEntry, ...]


class StageVerdict(FrozenModel):
    """The result of one stage: the worst relative L2 error of its comparisons, and the fingerprint of each file."""

    passed: bool
    worst_relative_l2: Number
    files: dict[RelativePath, Sha256]


class VerdictEntry(FrozenModel):
    """The result of a parity run; `date` is the day in UTC, such as 2026-01-31.

    `passed` covers the whole run, the image included."""

    engine: str
    reference: str
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    created_by: str
    passed: bool
    image_psnr_db: Number | None
    stages: dict[Stage, StageVerdict]


class Manifest(FrozenModel):
    """Everything that a runtime needs to know about a bundle without opening a graph."""

    format: Literal["cascadekit-bundle"] = "cascadekit-bundle"
    version: Literal[2] = 2
    created_by: str
    default_size: tuple[Side, Side]  # (width, height)
    vqgan_scale: LatentScale | None  # the factor inside the vqgan graph; None without a vqgan
    tokenizer: RelativePath | None  # a tokenizer.json; None for the one that the package ships
    stages: dict[Stage, StageEntry]
    files: tuple[FileEntry, ...] = ()  # files that belong to no stage: the tokenizer; earlier versions list none
    lora: LoraState | None = None
    engines: tuple[str, ...] = ("onnxruntime",)  # engines that can run the bundle, the preferred one first
    parity: tuple[VerdictEntry, ...] = ()  # the newest last, see `verdicts`

    @model_validator(mode="after")
    def _lists_the_tokenizer(self) -> Self:
        paths = [file.path for file in self.files]
        _require_once(paths)
        if self.tokenizer and paths and self.tokenizer not in paths:
            raise ValueError(f"{self.tokenizer}: a tokenizer that is not listed among the files")
        return self

    @model_validator(mode="after")
    def _scales_latents(self) -> Self:
        entry = self.stages.get(Stage.VQGAN)
        scale = entry.config.get("scale_factor") if entry else None
        if isinstance(scale, int | float) and not VQGAN_SCALES[0] <= scale <= VQGAN_SCALES[1]:
            raise ValueError(
                f"scale_factor of the vqgan: expected {VQGAN_SCALES[0]} to {VQGAN_SCALES[1]}, found {scale}"
            )
        return self

    @property
    def text_rows(self) -> int | None:
        """The number of tokens in the text encoder's table; None without a text encoder."""
        entry = self.stages.get(Stage.TEXT_ENCODER)
        rows = entry.config.get("vocab_size") if entry else None
        return rows if isinstance(rows, int) else None

    def file(self, path: str) -> FileEntry | None:
        """The entry of a file that belongs to no stage; None when it is not listed."""
        return next((file for file in self.files if file.path == path), None)


def _require_once(paths: Iterable[str]) -> None:
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]}: listed twice")


def to_text(manifest: Manifest) -> str:
    """The content of cascade.json."""
    return manifest.model_dump_json(indent=2) + "\n"


def parse_manifest(text: str, where: str) -> Manifest:
    """Return the manifest in `text`. Raises CheckpointError that names `where` and each wrong field.

    For a manifest of another version the message names the version and what to do."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        other = _other_version(text)
        if other is not None:
            todo = "export the model again" if other < VERSION else "use the cascadekit that made it, or export again"
            raise CheckpointError(
                f"{where}: a bundle of version {other}, expected version {VERSION}; {todo}"
            ) from error
        said = f"{where}: not a manifest of format {FORMAT} {VERSION}: {wrong_fields(error)}"
        raise CheckpointError(f"{said}; put the file back, or export the model again") from error


def _other_version(text: str) -> int | None:
    """Return the version of a sound manifest of another version; None for anything else."""
    try:
        content = load_object(text)
    except ValueError:
        return None
    version = content.get("version") if content.get("format") == FORMAT else None
    return version if type(version) is int and version != VERSION else None
