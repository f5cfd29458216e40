"""The schema of `report.json`: every figure of a parity run, and the circumstances needed to repeat it."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .json_models import FrozenModel, Number
from .precision import Precision
from .quantization import Quantization
from .stages import Stage, Variant

FORMAT = "cascadekit-parity-report"


def _encodable(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


# Text that may come from file names, which on some systems contain bytes that are not text.
Text = Annotated[str, BeforeValidator(_encodable)]


class ValueCountEntry(FrozenModel):
    """The number of such values, and the index of the first."""

    count: int = Field(ge=0)
    first: tuple[int, ...] | None


class HistogramEntry(FrozenModel):
    """Counts of errors, relative to the reference's root mean square. `exact` errors are zero.

    An error in `counts` is between 10 to the power of an edge and of the next edge."""

    edges: tuple[float, ...]
    exact: int
    below: int
    counts: tuple[int, ...]
    above: int


class ComparisonEntry(FrozenModel):
    """One array compared with its reference; the figures are those of `parity.comparison.Comparison`.

    | kind | compared |
    |---|---|
    | stage | a forward pass by itself |
    | teacher-forced | a pass on the latents of the reference's trajectory |
    | trajectory | a step of the engine's own trajectory |
    | noise | the generated noise |

    `step` counts from 1."""

    name: Text
    kind: Text
    stage: Stage | None  # None for the final image and for noise
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
    nan: ValueCountEntry
    positive_infinity: ValueCountEntry
    negative_infinity: ValueCountEntry
    beyond_fp16: ValueCountEntry
    reference_nonfinite: ValueCountEntry
    reference_rms: Number
    reference_max: Number
    found_max: Number
    worst: tuple[int, ...] | None
    histogram: HistogramEntry


class StageFacts(FrozenModel):
    """Facts from the bundle's manifest about a compared stage."""

    variant: Variant
    precision: Precision
    quantization: Quantization


class ImageEntry(FrozenModel):
    """The final image of the engine compared with that of the reference."""

    passed: bool
    psnr_db: Number
    psnr_needed_db: Number
    ssim: Number | None  # None where the images are smaller than its window


class DepthEntry(FrozenModel):
    """The errors of one part of a stage's graph, as relative L2.

    `own` is its error when its inputs are the reference's values. `floor` is the error of the reference's module in the
    graph's precision. `accumulated` is the error of the whole graph up to this part."""

    stage: Stage
    name: Text
    own: Number
    floor: Number
    accumulated: Number | None
    faulty: bool


class RangeEntry(FrozenModel):
    """The largest magnitude that a block's activations reach."""

    stage: Stage
    name: Text
    max_abs: Number
    precision: Precision


class ComparedFile(FrozenModel):
    """A file that was part of the comparison; its digests are those of `schemas.manifest.FileEntry`."""

    role: Literal["bundle", "reference"]
    path: Text
    bytes: int = Field(ge=0)
    fingerprint: str
    sha256: str | None


class ParityReport(FrozenModel):
    """A parity run. `date` is UTC in ISO 8601. `left_out` names the inputs whose sizes the engine was not built for."""

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
    files: tuple[ComparedFile, ...]
