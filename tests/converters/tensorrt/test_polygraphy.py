"""Polygraphy, NVIDIA's own tool, reads our graphs and builds the very plans we do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cascadekit.converters.tensorrt import BuildOptions, build
from cascadekit.schemas.profiles import Bounds, parse_image_size
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle

# Apart from the environment, where `validate` would run it on every graph of every test.
ORACLES = Path(sys.prefix) / "oracles"
POLYGRAPHY = (sys.executable, "-c", "import sys; from polygraphy.tools import main; sys.exit(main())")
NARROW = Bounds(*map(parse_image_size, ("256x256", "512x512", "768x512x2")))

pytestmark = pytest.mark.skipif(not (ORACLES / "polygraphy").is_dir(), reason="polygraphy is not installed")


def polygraphy(*arguments: object) -> str:
    paths = os.pathsep.join([str(ORACLES), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    command = (*POLYGRAPHY, *map(str, arguments))
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.parametrize(
    ("stage", "graph", "targets"),
    [
        pytest.param(Stage.PRIOR, "step", ("sm80", "sm86", "sm89"), marks=pytest.mark.slow),
        (Stage.VQGAN, "model", ("sm80", "sm120")),
        (Stage.TEXT_ENCODER, "model", ("sm89",)),
    ],
)
def test_the_same_plans(bundle: Path, tmp_path: Path, stage: Stage, graph: str, targets: tuple[str, ...]) -> None:
    """But for three bytes, as it asks for detailed profiling and leaves TF32 on, and for what TensorRT-RTX numbers by
    addresses in memory, which a process of polygraphy has others of: up to some hundred bytes."""
    (built,) = build(bundle, BuildOptions(targets=targets, stages=(stage,), graphs=(graph,), profiles=(NARROW,)))
    shapes = {
        end: [
            f"{name}:[{','.join(map(str, getattr(port, end)))}]" for name, port in built.plan.profiles[0].ports.items()
        ]
        for end in ("min", "opt", "max")
    }
    polygraphy(
        "convert",
        bundle / open_bundle(bundle).entry(stage).graphs[graph].path,
        *("--convert-to", "trt", "-o", tmp_path / "plan"),
        *("--compute-capabilities", *(f"{t[2:-1]}.{t[-1]}" for t in targets)),
        *(part for end, each in shapes.items() for part in (f"--trt-{end}-shapes", *each)),
    )
    ours, theirs = (bundle / built.plan.path).read_bytes(), (tmp_path / "plan").read_bytes()
    assert len(ours) == len(theirs)
    assert sum(a != b for a, b in zip(ours, theirs, strict=True)) < len(ours) / 1000


def test_it_finds_nothing_it_does_not_know(bundle: Path) -> None:
    said = polygraphy("inspect", "capability", bundle / "decoder/model.onnx")
    assert "Graph is fully supported by TensorRT" in said
