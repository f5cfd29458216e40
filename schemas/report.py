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


class Comparison(FrozenModel):
    """One array x compared with its reference r; true when it passed.

    A comparison fails when the relative L2 error is above `tolerance`, or when either array holds NaN or infinity. It
    also fails when x is constant although r is not: a black image is wrong at any tolerance.

    Errors are taken over the values that are finite in both arrays. A relative error is |x - r| / |r|. It is not
    defined where r is zero; `off_zero` counts the x that are not zero there.

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
    failures: tuple[Text, ...]  # why it failed, in a few words each; empty when it passed
    shape: tuple[int, ...]
    tolerance: Number
    relative_l2: Number  # ‖x - r‖ / ‖r‖: the tolerance it would have needed
    max_abs: Number  # max |x - r|
    mean_abs: Number  # mean |x - r|
    p999_abs: Number  # 99.9% of |x - r| are no larger, between two values linearly interpolated
    max_rel: Number
    mean_rel: Number
    p999_rel: Number
    off_zero: int
    cosine: Number  # <x, r> / (‖x‖ ‖r‖)
    snr_db: Number  # 10·log10(‖r‖² / ‖x - r‖²), infinite when equal
    ulp_of: Precision | None
    ulp_max: int | None  # distance in representable values of `ulp_of`; None without `ulp_of`
    ulp_mean: Number | None
    constant: bool  # all values equal, though the reference's are not
    nonfinite: int  # values that are NaN or infinite
    nan: ValueCountEntry
    positive_infinity: ValueCountEntry
    negative_infinity: ValueCountEntry
    beyond_fp16: ValueCountEntry  # finite, but above 65504 in magnitude
    reference_nonfinite: ValueCountEntry
    reference_rms: Number
    reference_max: Number  # max |r|
    found_max: Number  # max |x| of finite values
    worst: tuple[int, ...] | None  # where |x - r| is largest
    histogram: HistogramEntry

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        verdict = "; ".join(self.failures) or "ok"
        return (
            f"{self.name} {list(self.shape)}: needs a tolerance of {self.needed:.1e}, has {self.tolerance:.1e}; "
            f"max abs {self.max_abs:.1e}, cosine {self.cosine:.8f}, SNR {self.snr_db:.1f} dB: {verdict}"
        )

    @property
    def needed(self) -> float:
        """The tolerance it would have needed to pass, if all values are finite."""
        return self.relative_l2


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
    comparisons: tuple[Comparison, ...]
    image: ImageEntry | None
    depth: tuple[DepthEntry, ...] = ()
    ranges: tuple[RangeEntry, ...] = ()
    left_out: tuple[Text, ...] = ()
    files: tuple[ComparedFile, ...]
