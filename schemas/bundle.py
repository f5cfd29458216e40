"""The manifest of an exported bundle: `cascade.json` at its root."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from .errors import CheckpointError
from .fp16 import MAX_EXPONENT
from .json_models import FrozenModel, Number
from .json_text import load_object, well_formed
from .layouts import Layout
from .limits import MAX_DIMENSION, MAX_FILE_BYTES, MAX_SIDE, VQGAN_SCALES
from .messages import wrong_fields
from .paths import PlainName, RelativePath
from .precision import Precision, Target
from .quantization import Quantization
from .stages import Stage, Variant

MANIFEST_NAME = "cascade.json"
PARKED = ("weight_inputs", "built_in")  # fields of a plan that earlier versions wrote
MAIN_GRAPH = "model"  # the graph every stage has
ENCODER_GRAPH = "encoder"  # the second graph of a vqgan: from images to latents
FORMAT = "cascadekit-bundle"
VERSION = 2

Placement = Literal["copy", "link", "reflink"]
Backend = Literal["tensorrt-rtx", "tensorrt"]

# The operator sets that what a bundle is for can run; "" is ai.onnx.
DOMAINS: Mapping[Target, tuple[str, ...]] = {
    Target.PORTABLE: ("",),
    Target.ORT: ("", "com.microsoft"),
    Target.TENSORRT: ("",),
}


def _finite(value: Any) -> Any:
    """A value of JSON, unless a number in it is none."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected a number, found {value}")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _finite(part)
    return value


Bytes = Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]
Dimension = Annotated[int, Field(ge=0, le=MAX_DIMENSION)]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Scale = Annotated[float, Field(ge=VQGAN_SCALES[0], le=VQGAN_SCALES[1])]
Exponent = Annotated[int, Field(ge=0, le=MAX_EXPONENT)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Capability = Annotated[str, Field(pattern=r"^sm[0-9]{2,3}$")]


def _well_formed(value: object) -> object:
    return well_formed(value) if isinstance(value, str) else value


# The name of a file outside the bundle, to be read by people. Bytes that are not UTF-8 become escapes, because the
# manifest is UTF-8.
FileName = Annotated[str, BeforeValidator(_well_formed)]


class FileEntry(FrozenModel):
    """A file of the bundle, its path relative to the root, "/" between folders.

    A file whose size and `mtime_ns` are these is taken for the one that was exported. `fingerprint` is of its size,
    its safetensors header and samples of its content (see `storage.file_hashes`), `sha256` of all of it; an export with
    --no-hash, and bundles from before it was recorded always, lack the latter of weights."""

    path: RelativePath
    bytes: Bytes
    mtime_ns: int = Field(ge=-MAX_FILE_BYTES, le=MAX_FILE_BYTES)
    fingerprint: Sha256
    sha256: Sha256 | None


class SourceEntry(FrozenModel):
    """A file the bundle was made from; `name` is its name alone, as paths of another machine tell nothing. Its
    `sha256` is known where the bundle holds the very file and had it hashed."""

    name: FileName
    bytes: Bytes
    fingerprint: Sha256
    sha256: Sha256 | None
    layout: Layout


class PortEntry(FrozenModel):
    """A port as in `schemas.ports`."""

    name: str
    dtype: str
    dims: tuple[Dimension | str, ...]


class GraphEntry(FrozenModel):
    """One graph of a stage: its ONNX file, and what goes in and out."""

    path: RelativePath
    opset: int = Field(ge=0, le=1000)
    inputs: tuple[PortEntry, ...]
    outputs: tuple[PortEntry, ...]


class ImageSize(FrozenModel):
    """The images that a profile is for: their size in pixels, and how many are made at a time."""

    width: Side
    height: Side
    images: int = Field(ge=1, le=MAX_SIDE)


class PortShapes(FrozenModel):
    """Least, likeliest and largest shape of an input port."""

    min: tuple[Dimension, ...]
    opt: tuple[Dimension, ...]
    max: tuple[Dimension, ...]


class ProfileEntry(FrozenModel):
    """The shapes that one optimisation profile of a plan accepts. `ports` are its inputs in the order of the
    graph's; with guidance a port's batch is twice the images."""

    min: ImageSize
    opt: ImageSize
    max: ImageSize
    ports: dict[str, PortShapes]


class PlanSource(FrozenModel):
    """A file a plan was built from, as the stage's `files` had it then."""

    path: RelativePath
    fingerprint: Sha256
    sha256: Sha256 | None


class DeviceEntry(FrozenModel):
    """The GPU that TensorRT built for: its name, and its compute capability as in "sm89"."""

    name: str
    capability: Capability


class PlanEntry(FrozenModel):
    """A GPU engine that was built from one graph of the stage.

    `targets` are the compute capabilities TensorRT-RTX built for; TensorRT builds for the one `device` it runs on.
    Profiles are in the order the plan has them. A plan stands for the graphs and weights of `sources`, and is no good
    once `files` have others. `seconds` and `peak_rss` (bytes) are what building it took."""

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
    refittable: bool = False  # whether a runtime can give it other weights of the same graph
    weight_streaming: bool = False  # whether weights may stay on the host while it runs
    seconds: float = Field(ge=0, allow_inf_nan=False)
    peak_rss: Bytes

    @model_validator(mode="before")
    @classmethod
    def _without_parked(cls, given: Any) -> Any:
        """Drop the fields of plans with weights as inputs, which cascadekit wrote once, where they are empty."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value or name not in PARKED}

    @model_validator(mode="after")
    def _is_for_something(self) -> Self:
        if bool(self.targets) == bool(self.device):
            raise ValueError("expected either targets or a device")
        return self


class StageEntry(FrozenModel):
    """One exported stage. `config` is the network's config.json; the graphs share the weights, and "model" is the
    one that is the whole network. `weights` says how they came into the bundle: as its own copy, as a hard link to
    the model's file, or as a clone that shares its blocks on disk until either changes."""

    variant: Variant
    config: Annotated[dict[str, Any], AfterValidator(_finite)]
    precision: Precision
    target: Target = Target.PORTABLE
    quantization: Quantization = Quantization.NONE  # of the weights of Linears
    exponents: dict[str, Exponent] = Field(
        default_factory=dict
    )  # of streams kept smaller than meant, see `schemas.fp16`
    fp16_margins: dict[str, Finite] = Field(
        default_factory=dict
    )  # by block: bits from its largest value measured to the end of fp16
    fp32_blocks: tuple[str, ...] = ()  # residual blocks that compute in fp32 all the same
    control: tuple[Dimension, ...] = ()  # residual blocks that take a ControlNet's residual
    weights: Placement
    sources: tuple[SourceEntry, ...]
    graphs: dict[PlainName, GraphEntry]
    files: tuple[FileEntry, ...] = Field(min_length=1)
    plans: tuple[PlanEntry, ...] = ()  # GPU engines, the one asked for last at the end; none of them is among `files`

    @field_validator("plans", mode="before")
    @classmethod
    def _without_parked(cls, given: Any) -> Any:
        """Leave out plans that take weights as inputs: earlier versions built them, this one does not run them."""
        if not isinstance(given, list | tuple):
            return given
        return [plan for plan in given if not (isinstance(plan, dict) and any(plan.get(name) for name in PARKED))]

    @model_validator(mode="after")
    def _graphs_are_files(self) -> Self:
        if MAIN_GRAPH not in self.graphs:
            raise ValueError(f"no graph {MAIN_GRAPH!r}")
        unlisted = self.graph_paths - {file.path for file in self.files}
        if unlisted:
            raise ValueError(f"{', '.join(sorted(unlisted))}: a graph that is none of the files")
        _require_once(file.path for file in self.files)
        unknown = {plan.graph for plan in self.plans} - self.graphs.keys()
        if unknown:
            raise ValueError(f"plans of {', '.join(sorted(unknown))}, which is no graph of the stage")
        return self

    def is_current(self, plan: PlanEntry) -> bool:
        """Whether `plan` was built from the very files the stage has now: by their SHA-256 where that is known of
        both, else by fingerprint."""
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
    def opset(self) -> int:
        """Opset of the graph "model"."""
        return self.graphs[MAIN_GRAPH].opset

    @property
    def graph_paths(self) -> frozenset[str]:
        return frozenset(graph.path for graph in self.graphs.values())


def _same(source: PlanSource, file: FileEntry) -> bool:
    if source.sha256 and file.sha256:
        return source.sha256 == file.sha256
    return source.fingerprint == file.fingerprint


class LoraEntry(FrozenModel):
    """A LoRA that is merged into the weights, and how strongly: into the UNets, into the text encoder."""

    name: FileName
    fingerprint: Sha256
    strength: Finite
    text_encoder_strength: Finite


class LoraState(FrozenModel):
    """The LoRAs in the weights, in the order they were merged. `kept` are the files they replaced, manifest
    included, which undoing puts back; none when the bundle was exported with its LoRAs."""

    loras: tuple[LoraEntry, ...] = Field(min_length=1)
    kept: tuple[FileEntry, ...]


class StageVerdict(FrozenModel):
    """How one stage did: the worst relative L2 error of its comparisons, and what its files were, by path and
    fingerprint."""

    passed: bool
    worst_relative_l2: Number
    files: dict[RelativePath, Sha256]


class VerdictEntry(FrozenModel):
    """The result of a parity run; `date` is the day in UTC, as in 2026-01-31. `passed` is about all of the run, the
    image included."""

    engine: str
    reference: str
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    created_by: str
    passed: bool
    image_psnr_db: Number | None
    stages: dict[Stage, StageVerdict]


class Manifest(FrozenModel):
    """Everything a runtime needs to know of a bundle without opening a graph."""

    format: Literal["cascadekit-bundle"] = "cascadekit-bundle"
    version: Literal[2] = 2
    created_by: str
    default_size: tuple[Side, Side]  # (width, height)
    vqgan_scale: Scale | None  # the factor inside the vqgan graph; None without a vqgan
    tokenizer: RelativePath | None  # a tokenizer.json; None: the one the package ships
    stages: dict[Stage, StageEntry]
    files: tuple[FileEntry, ...] = ()  # those of no stage: the tokenizer; none are listed by earlier versions
    lora: LoraState | None = None
    engines: tuple[str, ...] = ("onnxruntime",)  # what can run it, the preferred one first
    parity: tuple[VerdictEntry, ...] = ()  # the latest last, see `parity.verdict`

    @model_validator(mode="after")
    def _lists_the_tokenizer(self) -> Self:
        paths = [file.path for file in self.files]
        _require_once(paths)
        if self.tokenizer and paths and self.tokenizer not in paths:
            raise ValueError(f"{self.tokenizer}: a tokenizer that is none of the files")
        return self

    @model_validator(mode="after")
    def _scales_latents(self) -> Self:
        entry = self.stages.get(Stage.VQGAN)
        scale = entry.config.get("scale_factor") if entry else None
        if isinstance(scale, int | float) and not VQGAN_SCALES[0] <= scale <= VQGAN_SCALES[1]:
            raise ValueError(f"scale_factor {scale} of the vqgan, expected {VQGAN_SCALES[0]} to {VQGAN_SCALES[1]}")
        return self

    @property
    def text_rows(self) -> int | None:
        """How many tokens the text encoder has a row for; None without one."""
        entry = self.stages.get(Stage.TEXT_ENCODER)
        rows = entry.config.get("vocab_size") if entry else None
        return rows if isinstance(rows, int) else None

    def file(self, path: str) -> FileEntry | None:
        """The entry of a file that belongs to no stage; None for a file that is not listed."""
        return next((file for file in self.files if file.path == path), None)


def _require_once(paths: Iterable[str]) -> None:
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]}: listed twice")


def to_text(manifest: Manifest) -> str:
    """The content of cascade.json."""
    return manifest.model_dump_json(indent=2) + "\n"


def parse_manifest(text: str, where: str) -> Manifest:
    """The manifest in `text`. Raises CheckpointError that names `where` and each field that is wrong, or what to do
    about a manifest of another version."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        other = _other_version(text)
        if other is not None:
            todo = "export the model again" if other < VERSION else "use the cascadekit that made it, or export again"
            raise CheckpointError(
                f"{where}: a bundle of version {other}, expected version {VERSION}; {todo}"
            ) from error
        raise CheckpointError(f"{where}: not a manifest of format {FORMAT} {VERSION}: {wrong_fields(error)}") from error


def _other_version(text: str) -> int | None:
    """The version of a well-formed manifest that is not of this one."""
    try:
        content = load_object(text)
    except ValueError:
        return None
    version = content.get("version") if content.get("format") == FORMAT else None
    return version if type(version) is int and version != VERSION else None
