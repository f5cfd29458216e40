"""Every multiple of 8 from 256 to 640 comes out exactly and holds a picture."""

from pathlib import Path

import numpy as np
import pytest

from cascadekit import Cascade

SIDES = range(256, 648, 8)
# Every side once, as a width or as a height, the smallest beside the largest; and strips.
BOTH = [pair[:: (-1) ** place] for place, pair in enumerate(zip(SIDES[:25], SIDES[:23:-1], strict=True))]
STRIPS = [(64, 1024), (1024, 64), (72, 640), (640, 88), (256, 1272)]
# Squares, and each remainder of a side's eighths with another's.
OTHERS = [*((side, side) for side in SIDES), *((side, 256 + (11 * side + 40) % 392 // 8 * 8) for side in SIDES[::2])]
SIZES = [*BOTH, *STRIPS, *(pytest.param(*size, marks=pytest.mark.slow) for size in OTHERS)]


@pytest.fixture(scope="module")
def cascade(tiny: Path) -> Cascade:
    return Cascade.open(tiny / "bundle", threads=1)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_exact_finite_and_not_constant(cascade: Cascade, width: int, height: int) -> None:
    result = cascade.generate(
        "x", seed=width, width=width, height=height, prior_steps=1, decoder_steps=1, decoder_guidance=1.1
    )
    assert result.pixels is not None
    assert result.pixels.shape == (1, 3, height, width)
    assert result.images[0].size == (width, height)
    assert np.isfinite(result.pixels).all()
    assert np.isfinite(result.prior_latents).all()
    quarters = [result.pixels[..., y, x] for y in _halves(height) for x in _halves(width)]
    assert all(quarter.std() > 0.01 for quarter in quarters)


def _halves(side: int) -> tuple[slice, slice]:
    return slice(0, side // 2), slice(side // 2, side)
