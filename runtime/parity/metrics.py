"""How far a result is from the one it should be, as numbers and as a verdict."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...schemas.errors import ParityError


@dataclass(frozen=True)
class Comparison:
    """One tensor against its reference; true when it passed.

    It fails when its relative L2 error is above `tolerance`, when it holds NaN or infinity, and when it is constant
    although the reference is not (a black image is wrong at any tolerance)."""

    name: str
    shape: tuple[int, ...]
    max_abs: float  # max |x - r|
    mean_abs: float  # mean |x - r|
    relative_l2: float  # ‖x - r‖ / ‖r‖: the tolerance it would have needed
    cosine: float  # <x, r> / (‖x‖ ‖r‖)
    nonfinite: int  # values that are NaN or infinite
    constant: bool  # all values equal
    tolerance: float

    def __bool__(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """Why it failed, in a few words each; empty when it passed."""
        reasons = {
            f"{self.nonfinite} values are NaN or infinite": self.nonfinite > 0,
            "the output is constant": self.constant,
            f"relative L2 {self.relative_l2:.1e} above {self.tolerance:.0e}": not self.relative_l2 <= self.tolerance,
        }
        return tuple(reason for reason, failed in reasons.items() if failed)


def compare(name: str, found: NDArray[np.float32], reference: NDArray[np.float32], tolerance: float) -> Comparison:
    """Compare two arrays of one shape, in float64. Raises ParityError when the shapes differ."""
    if found.shape != reference.shape:
        raise ParityError(f"{name}: expected shape {list(reference.shape)} as the reference, found {list(found.shape)}")
    finite = np.isfinite(found)
    x, r = found.astype(np.float64), reference.astype(np.float64)
    x = np.where(finite, x, 0)  # counted below; the other figures are of what is left
    error = np.abs(x - r)
    norm_x, norm_r = float(np.linalg.norm(x)), float(np.linalg.norm(r))
    return Comparison(
        name=name,
        shape=found.shape,
        max_abs=float(error.max(initial=0)),
        mean_abs=float(error.mean()) if error.size else 0.0,
        relative_l2=_ratio(float(np.linalg.norm(error)), norm_r),
        cosine=_ratio(float(np.vdot(x, r)), norm_x * norm_r) if norm_x * norm_r else float(norm_x == norm_r),
        nonfinite=int(np.count_nonzero(~finite)),
        constant=found.size > 1 and bool(np.ptp(found) == 0) and bool(np.ptp(reference) != 0),
        tolerance=tolerance,
    )


def psnr(found: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Peak signal-to-noise ratio in dB of images in 0..1: 10·log10(1 / mean squared error); infinite when equal."""
    mse = float(np.mean((found.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return float("inf") if mse == 0 else float(-10 * np.log10(mse))


def _ratio(value: float, norm: float) -> float:
    """value / norm, where nothing over nothing is nothing."""
    if norm:
        return value / norm
    return 0.0 if value == 0 else float("inf")
