"""`bench build` measures builds and estimates larger ones."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cascadekit import bench
from cascadekit.bench import BuildsReport
from cascadekit.cli import main

ARGUMENTS = "--network tiny --static 256x256 --arch sm86,sm89".split()
FILES = {"prior": "original_stage_c", "decoder": "original_stage_b"}


def parameters(catalog: Path) -> int:
    """The number of values in a released file."""
    tensors = json.loads(catalog.read_text())["tensors"].values()
    return sum(math.prod(tensor["shape"]) for tensor in tensors)


@pytest.fixture(scope="module")
def measured_once() -> Iterator[None]:
    """Both tests below print the same measurement; the first one to run makes it."""
    measure, reports = bench.bench_builds, list[BuildsReport]()

    def once(work: Path, **options: Any) -> BuildsReport:
        reports[:] = reports or [measure(work, **options)]
        return reports[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "bench_builds", once)
        yield


@pytest.mark.usefixtures("measured_once")
def test_bench_build(tmp_path: Path, catalog_folder: Path) -> None:
    result = CliRunner().invoke(main, ["bench", "build", "--work", str(tmp_path), *ARGUMENTS, "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert [(built["graph"], built["targets"]) for built in content["builds"]] == [
        ("conditioning", ["sm86", "sm89"]),
        ("step", ["sm86", "sm89"]),
    ]
    for built in content["builds"]:
        assert built["peak_rss"] > built["peak_own"] > 0
        assert built["ratios"]["plan / weights"] == pytest.approx(built["plan_bytes"] / built["weight_bytes"])
        assert 0.5 < built["ratios"]["peak_own / estimate"] < 1.5
        assert 0.5 < built["ratios"]["plan / estimate"] < 1.5
    found = {}
    for network, name in FILES.items():
        weights = sum(each["weights"] for each in content["estimates"] if each["network"] == network)
        found[network] = weights / 2 / parameters(catalog_folder / f"{name}.json")
    assert found["decoder"] == pytest.approx(1, rel=0.01)
    assert 1 < found["prior"] < 1.2  # both of its graphs read the weights that make keys and values
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("measured_once")
def test_the_table(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["bench", "build", "--work", str(tmp_path), *ARGUMENTS])
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert "tiny conditioning" in words
    assert "estimated network graph nodes weights MB s own MB plan MB prior conditioning" in words
    assert "Example: cascadekit bench build" in " ".join(
        CliRunner().invoke(main, ["bench", "build", "-h"]).output.split()
    )
