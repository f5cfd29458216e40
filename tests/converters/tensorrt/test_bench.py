"""What `bench build` measures and foretells."""

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from cascadekit.cli import main

FILES = {"prior": "original_stage_c", "decoder": "original_stage_b"}


def parameters(catalog: Path) -> int:
    """Of a released file."""
    tensors = json.loads(catalog.read_text())["tensors"].values()
    return sum(math.prod(tensor["shape"]) for tensor in tensors)


def test_bench_build(tmp_path: Path, catalog_folder: Path) -> None:
    arguments = f"bench build --work {tmp_path} --network tiny --static 256x256 --arch sm86,sm89 --json"
    result = CliRunner().invoke(main, arguments.split())
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


def test_the_table(tmp_path: Path) -> None:
    arguments = f"bench build --work {tmp_path} --network tiny --static 256x256"
    result = CliRunner().invoke(main, arguments.split())
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert "tiny conditioning" in words
    assert "estimated network graph nodes weights MB s own MB plan MB prior conditioning" in words
    assert "Example: cascadekit bench build" in " ".join(
        CliRunner().invoke(main, ["bench", "build", "-h"]).output.split()
    )
