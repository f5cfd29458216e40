"""The manifest of an exported bundle: `cascade.json` at its root."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .errors import CheckpointError
from .json_text import load_json, well_formed
from .layouts import Layout
from .numbers import Number
from .precision import Precision, Target
from .quantization import Quantization
from .stages import Stage, Variant

MANIFEST_NAME = "cascade.json"
MAIN_GRAPH = "model"  # the graph every stage has
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


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise ValueError(f"{path!r} leads out of the bundle")
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Capability = Annotated[str, Field(pattern=r"^sm[0-9]{2,3}$")]


def _well_formed(value: object) -> object:
    return well_formed(value) if isinstance(value, str) else value


# Of a file elsewhere, to be read and not opened; what of it is no UTF-8 becomes escapes, since a manifest is UTF-8.
FileName = Annotated[str, BeforeValidator(_well_formed)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Frozen):
    """A file of the bundle, its path relative to the root, "/" between folders.

    A file whose size and `mtime_ns` are these is taken for the one that was exported. `fingerprint` is of its size,
    its safetensors header and samples of its content (see `runtime.fingerprint`), `sha256` of all of it; linked
    and large weights have the latter only when it was asked for."""

    path: RelativePath
    bytes: int = Field(ge=0)
    mtime_ns: int
    fingerprint: Sha256
    sha256: Sha256 | None


class SourceEntry(_Frozen):
    """A file the bundle was made from; `name` is its name alone, as paths of another machine tell nothing. Its
    `sha256` is known where the bundle holds the very file and had it hashed."""

    name: FileName
    bytes: int = Field(ge=0)
    fingerprint: Sha256
    sha256: Sha256 | None
    layout: Layout


class PortEntry(_Frozen):
    """A port as in `schemas.ports`."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]


class GraphEntry(_Frozen):
    """One graph of a stage: its ONNX file, and what goes in and out."""

    path: RelativePath
    opset: int
    inputs: tuple[PortEntry, ...]
    outputs: tuple[PortEntry, ...]


class ImageSize(_Frozen):
    """What a profile is for, in a user's words: images of a size, and how many at a time."""

    width: int = Field(ge=1)
    height: int = Field(ge=1)
    images: int = Field(ge=1)


class PortShapes(_Frozen):
    """Least, likeliest and largest shape of an input port."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class ProfileEntry(_Frozen):
    """What one optimisation profile of a plan takes. `ports` are its inputs in the order of the graph's; with
    guidance a port's batch is twice the images."""

    min: ImageSize
    opt: ImageSize
    max: ImageSize
    ports: dict[str, PortShapes]


class PlanSource(_Frozen):
    """A file a plan was built from, as the stage's `files` had it then."""

    path: RelativePath
    fingerprint: Sha256
    sha256: Sha256 | None


class DeviceEntry(_Frozen):
    """The GPU that TensorRT built for: its name, and its compute capability as in "sm89"."""

    name: str
    capability: Capability


class WeightInput(_Frozen):
    """A weight that a plan takes as an input: `bytes` bytes at `offset` of a file of the bundle, row by row, of a dtype
    in safetensors' spelling."""

    name: str
    path: RelativePath
    offset: int = Field(ge=0)
    bytes: int = Field(ge=1)
    dtype: Literal["F32", "F16", "BF16"]
    shape: tuple[int, ...]


class BuiltIn(_Frozen):
    """What a plan with weights as inputs has of the same files in itself: ranges of bytes by file, from the first to
    before the last, and the SHA-256 of them all, one after the other."""

    ranges: dict[RelativePath, tuple[tuple[int, int], ...]]
    sha256: Sha256


class PlanEntry(_Frozen):
    """A GPU engine that was built from one graph of the stage.

    `targets` are the compute capabilities TensorRT-RTX built for; TensorRT builds for the one `device` it runs on.
    Profiles are in the order the plan has them. A plan stands for the graphs and weights of `sources`, and is no good
    once `files` have others. Files of `weight_inputs` are not among the sources: `built_in` says what of them is in the
    plan. `seconds` and `peak_rss` (bytes) are what building it took."""

    graph: str
    path: RelativePath
    bytes: int = Field(ge=1)
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
    weight_inputs: tuple[WeightInput, ...] = ()
    built_in: BuiltIn | None = None
    seconds: float = Field(ge=0)
    peak_rss: int = Field(ge=0)

    @model_validator(mode="after")
    def _is_for_something(self) -> Self:
        if bool(self.targets) == bool(self.device):
            raise ValueError("expected either targets or a device")
        if bool(self.weight_inputs) != bool(self.built_in):
            raise ValueError("expected weight_inputs and built_in, or neither")
        return self

    @property
    def input_bytes(self) -> int:
        """Of weights that are no part of it."""
        return sum(weight.bytes for weight in self.weight_inputs)


class StageEntry(_Frozen):
    """One exported stage. `config` is the network's config.json; the graphs share the weights, and "model" is the
    one that is the whole network. `weights` says how they came into the bundle: as its own copy, as a hard link to
    the model's file, or as a clone that shares its blocks on disk until either changes."""

    variant: Variant
    config: dict[str, Any]
    precision: Precision
    target: Target = Target.PORTABLE
    quantization: Quantization = Quantization.NONE  # of the weights of Linears
    exponents: dict[str, int] = {}  # of streams kept smaller than meant, see `schemas.fp16`
    fp16_margins: dict[str, float] = {}  # by block: bits from its largest value measured to the end of fp16
    fp32_blocks: tuple[str, ...] = ()  # residual blocks that compute in fp32 all the same
    control: tuple[int, ...] = ()  # residual blocks that take a ControlNet's residual
    weights: Placement
    sources: tuple[SourceEntry, ...]
    graphs: dict[str, GraphEntry]
    files: tuple[FileEntry, ...] = Field(min_length=1)
    plans: tuple[PlanEntry, ...] = ()  # GPU engines, the one asked for last at the end; none of them is among `files`

    @model_validator(mode="after")
    def _graphs_are_files(self) -> Self:
        if MAIN_GRAPH not in self.graphs:
            raise ValueError(f"no graph {MAIN_GRAPH!r}")
        unlisted = self.graph_paths - {file.path for file in self.files}
        if unlisted:
            raise ValueError(f"{', '.join(sorted(unlisted))}: a graph that is none of the files")
        unknown = {plan.graph for plan in self.plans} - self.graphs.keys()
        if unknown:
            raise ValueError(f"plans of {', '.join(sorted(unknown))}, which is no graph of the stage")
        return self

    def is_current(self, plan: PlanEntry) -> bool:
        """Whether `plan` was built from the very files the stage has now: by their SHA-256 where that is known of
        both, else by fingerprint. What is `built_in` has to be read besides, see `runtime.plan_weights`."""
        files = {file.path: file for file in self.files}
        return all(source.path in files and _same(source, files[source.path]) for source in plan.sources)

    @property
    def inputs(self) -> tuple[PortEntry, ...]:
        """Of the graph "model"."""
        return self.graphs[MAIN_GRAPH].inputs

    @property
    def outputs(self) -> tuple[PortEntry, ...]:
        """Of the graph "model"."""
        return self.graphs[MAIN_GRAPH].outputs

    @property
    def opset(self) -> int:
        """Of the graph "model"."""
        return self.graphs[MAIN_GRAPH].opset

    @property
    def graph_paths(self) -> frozenset[str]:
        return frozenset(graph.path for graph in self.graphs.values())


def _same(source: PlanSource, file: FileEntry) -> bool:
    if source.sha256 and file.sha256:
        return source.sha256 == file.sha256
    return source.fingerprint == file.fingerprint


class LoraEntry(_Frozen):
    """A LoRA that is merged into the weights, and how strongly: into the UNets, into the text encoder."""

    name: FileName
    fingerprint: Sha256
    strength: float
    text_encoder_strength: float


class LoraState(_Frozen):
    """The LoRAs in the weights, in the order they were merged. `kept` are the files they replaced, manifest
    included, which undoing puts back; none when the bundle was exported with its LoRAs."""

    loras: tuple[LoraEntry, ...] = Field(min_length=1)
    kept: tuple[FileEntry, ...]


class StageVerdict(_Frozen):
    """How one stage did: the worst relative L2 error of its comparisons, and what its files were, by path and
    fingerprint."""

    passed: bool
    worst_relative_l2: Number
    files: dict[RelativePath, Sha256]


class VerdictEntry(_Frozen):
    """What a parity run found; `date` is the day in UTC, as in 2026-01-31. `passed` is about all of the run, the
    image included."""

    engine: str
    reference: str
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    created_by: str
    passed: bool
    image_psnr_db: Number | None
    stages: dict[Stage, StageVerdict]


class Manifest(_Frozen):
    """Everything a runtime needs to know of a bundle without opening a graph."""

    format: Literal["cascadekit-bundle"] = "cascadekit-bundle"
    version: Literal[2] = 2
    created_by: str
    default_size: tuple[int, int]  # (width, height)
    vqgan_scale: float | None  # the factor inside the vqgan graph; None without a vqgan
    tokenizer: RelativePath | None  # a tokenizer.json; None: the one the package ships
    stages: dict[Stage, StageEntry]
    lora: LoraState | None = None
    engines: tuple[str, ...] = ("onnxruntime",)  # what can run it, the preferred one first
    parity: tuple[VerdictEntry, ...] = ()  # the latest last, see `runtime.parity.verdict`


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
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:5])
        raise CheckpointError(f"{where}: not a manifest of format {FORMAT} {VERSION}: {wrong}") from error


def _other_version(text: str) -> int | None:
    """The version of a well-formed manifest that is not of this one."""
    try:
        content = load_json(text)
    except ValueError:
        return None
    version = content.get("version") if isinstance(content, dict) and content.get("format") == FORMAT else None
    return version if type(version) is int and version != VERSION else None
