"""The result of a verification: every comparison, what was found inside graphs, and the verdict."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.quantization import Quantization
from ..schemas.report import Comparison
from ..schemas.stages import Stage
from .tolerances import QUANTISED_IMAGE, StageTolerance

if TYPE_CHECKING:
    from .inside.bisection import Bisection
    from .inside.ranges import RangeAdvice


@dataclass(frozen=True)
class Report:
    """Everything that was compared; true when all of it passed.

    `comparisons` are empty when only the inside of graphs was looked at. `left_out` names the inputs that an engine
    built for some image sizes does not accept. `differs` has a line for each stage in which the model is not the one
    that the bundle was exported from."""

    engine: str
    reference: str
    comparisons: tuple[Comparison, ...] = ()
    image_psnr: float | None = None  # dB; None without a final image
    image_psnr_needed: float = 0.0
    images: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None  # found and expected, (1, 3, h, w) in 0..1
    tolerances: Mapping[Stage, StageTolerance] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    bisections: "tuple[Bisection, ...]" = ()
    ranges: "tuple[RangeAdvice, ...]" = ()
    differs: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        found = self.comparisons or self.bisections or self.ranges
        return bool(found) and all(self.comparisons) and all(self.bisections) and not self.image_failed

    def __repr__(self) -> str:  # there are hundreds of comparisons, and images
        counts = f"comparisons={len(self.comparisons)}, bisections={len(self.bisections)}, ranges={len(self.ranges)}"
        run = f"engine={self.engine!r}, reference={self.reference!r}, image_psnr={self.image_psnr}"
        return f"Report(passed={bool(self)}, {run}, {counts})"

    @property
    def comparisons_passed(self) -> bool:
        """True when every comparison and the final image passed; bisections and ranges do not count."""
        return bool(self.comparisons) and all(self.comparisons) and not self.image_failed

    @property
    def image_failed(self) -> bool:
        return self.image_psnr is not None and not self.image_psnr >= self.image_psnr_needed

    @property
    def image_note(self) -> str:
        """Why the image says little about a bundle that is quantised; "" for other bundles and without an image."""
        quantised = any(each.quantization is not Quantization.NONE for each in self.tolerances.values())
        return QUANTISED_IMAGE if quantised and self.image_psnr is not None else ""

    def to_json(self) -> dict[str, Any]:
        """Plain values. The PSNR of equal images is null, and "images_equal" is true."""
        content = self._compared() if self.comparisons else {}
        if self.differs:
            content["differs_from_exported"] = list(self.differs)
        if self.bisections:
            content["bisection"] = [bisection.to_json() for bisection in self.bisections]
        if self.ranges:
            content["ranges"] = [advice.to_json() for advice in self.ranges]
        return content

    def _compared(self) -> dict[str, Any]:
        equal = self.image_psnr == float("inf")
        return {
            "passed": self.comparisons_passed,
            "engine": self.engine,
            "reference": self.reference,
            "image_psnr_db": None if equal else self.image_psnr,
            "image_psnr_needed_db": None if self.image_psnr is None else self.image_psnr_needed,
            "images_equal": equal,
            "image_note": self.image_note,
            "presets": {stage: {**asdict(t), "tolerance": t.tolerance} for stage, t in self.tolerances.items()},
            "left_out": list(self.left_out),
            "comparisons": [comparison.model_dump(mode="json") for comparison in self.comparisons],
        }
