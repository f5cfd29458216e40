"""The page of the example model says how often it is right in each precision, with fewer steps and other guidance.

The shares over fewer prompts, as `bench quality` measures them, lie within three standard deviations of the page's.
"""

import math
import re
from pathlib import Path

import pytest

from cascadekit.bench.judge.prompts import HELD_OUT, SEEN
from cascadekit.bench.quality import VARIANTS, Shares, bench_quality
from cascadekit.schemas.callbacks import ignored

PAGE = Path(__file__).parents[2] / "docs" / "example-model.md"
DOCUMENTED = 96, 48  # prompts behind a row of the page: seen, held out
DEFAULT = "fp32, 20 + 10 steps, ddpm-wuerstchen, guidance 4"
# The row of the page that has a variant's shares. A row for two variants has two shares in a cell, or one for both.
ROWS = {
    **dict.fromkeys(["fp32", "20 + 10", "ddpm-wuerstchen", "4"], (DEFAULT, 0)),
    "fp16": ("fp16, with and without `--fp16-safe`", 0),
    "fp16, fp16-safe": ("fp16, with and without `--fp16-safe`", 0),
    "bf16": ("bf16, `--engine torch-bf16`", 0),
    **{name: (f"`--quantize {name}`", 0) for name in ("int8", "int4", "int8-dynamic", "fp8")},
    **{name: (f"{name} steps", 0) for name in ("10 + 5", "6 + 4", "4 + 2")},
    "gdf": ("sampler gdf", 0),
    **{name: (f"guidance {name}", 0) for name in "12368"},
    **{
        f"gdf, guidance {guidance}, rescale {rescale}": (f"gdf, guidance {guidance}, CFG rescale 0 and 0.7", place)
        for guidance in (4, 8)
        for place, rescale in enumerate((0.0, 0.7))
    },
}


def documented(name: str) -> list[float]:
    """The shares of seen and held-out prompts in the row of the variant `name`, from 0 to 1."""
    row, place = ROWS[name]
    found = re.search(rf"^\| {re.escape(row)} \| (.*) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    assert found, row
    return [int(cell.split(", ")[place].removesuffix("%")) / 100 for cell in found.groups()]


def deviation(share: float, *counts: int) -> float:
    """The standard deviation of the difference of two shares over `counts` prompts.

    A share of 0 or 1 counts as one prompt away from it."""
    share = min(max(share, 1 / min(counts)), 1 - 1 / min(counts))
    return math.sqrt(share * (1 - share) * sum(1 / count for count in counts))


@pytest.mark.parametrize("group", VARIANTS)
def test_shares_are_those_of_the_page(tmp_path: Path, group: str) -> None:
    for package in ("onnx", *(["torch"] if group == "precision" else [])):
        pytest.importorskip(package)
    report = bench_quality(tmp_path, groups=[group], each=8, say=ignored)
    assert not report.missing
    assert report.shares[group].keys() == VARIANTS[group].keys()
    for name, shares in report.shares[group].items():
        for kinds, expected, count in zip((SEEN, HELD_OUT), documented(name), DOCUMENTED, strict=True):
            assert abs(shares.share(kinds) - expected) <= 3 * deviation(expected, count, asked(shares, kinds)), name


def asked(shares: Shares, kinds: tuple[str, ...]) -> int:
    return sum(shares.asked[kind] for kind in kinds)
