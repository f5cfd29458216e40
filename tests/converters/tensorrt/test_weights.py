"""Plans whose weights are streamed: real ones of TensorRT-RTX."""

from dataclasses import replace
from pathlib import Path

from cascadekit.converters.tensorrt import BuildOptions, Built, build
from cascadekit.runtime.engines.tensorrt.plan_header import find_contradiction, read_header
from cascadekit.schemas.profiles import Bounds, parse_image_size
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle

SMALL = Bounds(*[parse_image_size("256x256")] * 3)
TEXT = BuildOptions(targets=("sm89",), stages=(Stage.TEXT_ENCODER,), profiles=(SMALL,))


def one(bundle: Path, wishes: BuildOptions) -> Built:
    (built,) = build(bundle, wishes)
    assert open_bundle(bundle).entry(built.stage).plans[-1] == built.plan
    return built


def weight_bytes(plan: Path) -> int:
    header = read_header(plan)
    assert header is not None
    return header.weight_bytes


def test_weights_that_are_streamed(bundle: Path) -> None:
    """Its header says that no weights stay on the GPU; a plan that was not built so is not taken for one."""
    whole = one(bundle, TEXT).plan
    plan = one(bundle, replace(TEXT, weight_streaming=True)).plan
    assert (whole.weight_streaming, plan.weight_streaming) == (False, True)
    assert weight_bytes(bundle / whole.path) > 0
    assert weight_bytes(bundle / plan.path) == 0
    assert find_contradiction(bundle / plan.path, plan) is None
    wrong = whole.model_copy(update={"weight_streaming": True})
    problem = find_contradiction(bundle / whole.path, wrong)
    assert problem == (
        f"its header says {weight_bytes(bundle / whole.path)} bytes of weights stay on the GPU, expected 0: "
        "they are streamed"
    )
