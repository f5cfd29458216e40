"""What `report.json` holds: every figure of a parity run, and what it takes to repeat it."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from .numbers import Number
from .precision import Precision
from .quantization import Quantization
from .stages import Stage, Variant

FORMAT = "cascadekit-parity-report"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _encodable(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


# What may come from file names, which hold what is no character where a system allows it.
Text = Annotated[str, BeforeValidator(_encodable)]


class TallyEntry(_Frozen):
    """How many values, and the index of the first."""

    count: int = Field(ge=0)
    first: tuple[int, ...] | None


class HistogramEntry(_Frozen):
    """Errors as a part of the reference's root mean square: `exact` are zero, `counts` lie between 10 to the power of
    neighbouring `edges`."""

    edges: tuple[float, ...]
    exact: int
    below: int
    counts: tuple[int, ...]
    above: int


class ComparisonEntry(_Frozen):
    """One tensor against its reference; the figures are those of `runtime.parity.metrics.Comparison`. `kind` is
    "stage" for a pass on its own, else the way along the sampler that the name begins with, and `step` counts
    from 1."""

    name: Text
    kind: Text
    stage: Stage | None  # None: the image
    step: int | None
    passed: bool
    failures: tuple[Text, ...]
    shape: tuple[int, ...]
    tolerance: Number
    relative_l2: Number
    max_abs: Number
    mean_abs: Number
    p999_abs: Number
    max_rel: Number
    mean_rel: Number
    p999_rel: Number
    off_zero: int
    cosine: Number
    snr_db: Number
    ulp_of: Precision | None
    ulp_max: int | None
    ulp_mean: Number | None
    constant: bool
    nonfinite: int
    nan: TallyEntry
    positive_infinity: TallyEntry
    negative_infinity: TallyEntry
    beyond_fp16: TallyEntry
    reference_nonfinite: TallyEntry
    reference_rms: Number
    reference_max: Number
    found_max: Number
    worst: tuple[int, ...] | None
    histogram: HistogramEntry


class StageFacts(_Frozen):
    """What the bundle's manifest says of a stage that was compared."""

    variant: Variant
    precision: Precision
    quantization: Quantization


class ImageEntry(_Frozen):
    """The final images against each other."""

    passed: bool
    psnr_db: Number
    psnr_needed_db: Number
    ssim: Number | None  # None where the images are smaller than its window


class DepthEntry(_Frozen):
    """One part of a stage's graph, in the order they run: its own error given the reference's values, the same of the
    reference's module in the graph's precision, and the error of everything up to it."""

    stage: Stage
    name: Text
    own: Number
    floor: Number
    accumulated: Number | None
    faulty: bool


class RangeEntry(_Frozen):
    """The largest magnitude that a block's activations reach."""

    stage: Stage
    name: Text
    max_abs: Number
    precision: Precision


class FileEntry(_Frozen):
    """A file that was part of the comparison; the digests are those of `schemas.bundle.FileEntry`."""

    role: Literal["bundle", "reference"]
    path: Text
    bytes: int = Field(ge=0)
    fingerprint: str
    sha256: str | None


class ParityReport(_Frozen):
    """A parity run; `date` is UTC, ISO 8601. `left_out` says what an engine built for some sizes does not take."""

    format: Literal["cascadekit-parity-report"] = "cascadekit-parity-report"
    version: Literal[1] = 1
    passed: bool
    engine: Text
    reference: Text
    bundle: Text
    date: str
    command: Text
    environment: dict[str, Text]
    stages: dict[Stage, StageFacts]
    comparisons: tuple[ComparisonEntry, ...]
    image: ImageEntry | None
    depth: tuple[DepthEntry, ...] = ()
    ranges: tuple[RangeEntry, ...] = ()
    left_out: tuple[Text, ...] = ()
    files: tuple[FileEntry, ...]


def report_schema() -> str:
    """The JSON schema of report.json, as text."""
    schema: dict[str, Any] = ParityReport.model_json_schema(mode="serialization")
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"
