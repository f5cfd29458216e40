"""Sizes of images as shapes of every graph, against shapes worked out by hand."""

from dataclasses import replace

import pytest

from cascadekit.converters.onnx import WRITERS, GraphOptions, graph_ports
from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.manifest import PortEntry
from cascadekit.schemas.plan_entries import ProfileEntry
from cascadekit.schemas.profiles import DEFAULT, Bounds, parse_image_size, profile_for
from cascadekit.schemas.stages import (
    PRESETS,
    PROJ_BLOCKS_ENDS,
    ControlNetConfig,
    EffnetEncoderConfig,
    NetworkConfig,
    PreviewerConfig,
    Stage,
    Variant,
)

LITE_PRIOR, DECODER = PRESETS[Stage.PRIOR, Variant.LITE], PRESETS[Stage.DECODER, Variant.LITE]
PRIOR, VQGAN, TEXT = (PRESETS[stage, Variant.FULL] for stage in (Stage.PRIOR, Stage.VQGAN, Stage.TEXT_ENCODER))
IMAGE = PRESETS[Stage.IMAGE_ENCODER, Variant.FULL]
CONTROLNETS = [
    ControlNetConfig(channels, PROJ_BLOCKS_ENDS, mode)
    for channels, mode in ((1, None), (4, None), (16, "large"), (512, "simple"))
]
ALL = [LITE_PRIOR, DECODER, PRIOR, VQGAN, TEXT, IMAGE, EffnetEncoderConfig(), PreviewerConfig(), *CONTROLNETS]
STATIC = Bounds(*[parse_image_size("1344x768x2")] * 3)
WIDE = Bounds(*map(parse_image_size, ("384x256", "1344x768x2", "1536x1024x4")))


def profile(config: NetworkConfig, bounds: Bounds, graph: str = "model", **options: object) -> ProfileEntry:
    ports = graph_ports(config, replace(GraphOptions(), **options), graph)  # type: ignore[arg-type]
    entries = [PortEntry(name=port.name, dtype=port.dtype, dims=port.dims) for port in ports.inputs]
    return profile_for(config, graph, entries, bounds)


def shapes(found: ProfileEntry) -> dict[str, tuple[tuple[int, ...], ...]]:
    return {name: (port.min, port.opt, port.max) for name, port in found.ports.items()}


def test_the_prior() -> None:
    """ceil(side / 42.67): 6 for 256, 9 for 384, 18 for 768, 24 for 1024, 32 for 1344, 36 for 1536. Guidance doubles."""
    assert shapes(profile(PRIOR, WIDE)) == {
        "sample": ((1, 16, 6, 9), (4, 16, 18, 32), (8, 16, 24, 36)),
        "timestep_ratio": ((1,), (4,), (8,)),
        "clip_text_pooled": ((1, 1, 1280), (4, 1, 1280), (8, 1, 1280)),
        "clip_text": ((1, 77, 1280), (4, 77, 1280), (8, 231, 1280)),
        "clip_img": ((1, 1, 768), (4, 1, 768), (8, 4, 768)),
    }


def test_the_prior_in_parts() -> None:
    """77 tokens of text, 4 of pooled text, 4 of an image: 85, as many as `context` in the step."""
    conditioning = shapes(profile(LITE_PRIOR, DEFAULT, "conditioning"))
    assert conditioning["timestep_ratios"] == ((1,), (20,), (100,))
    assert conditioning["clip_text"] == ((1, 77, 1280), (2, 77, 1280), (4, 231, 1280))
    step = shapes(profile(LITE_PRIOR, DEFAULT, "step"))
    assert step["sample"] == ((1, 16, 12, 12), (2, 16, 24, 24), (4, 16, 36, 36))
    keys = [shape for name, shape in step.items() if name.endswith(".keys")]
    assert {tuple(end[:2] for end in shape) for shape in keys} == {((1, 85), (2, 85), (4, 231 + 4 + 16))}


def test_the_decoder() -> None:
    """ceil(side / 4), the effnet's map of the size of the prior's latents; no guidance unless asked for."""
    found = shapes(profile(DECODER, WIDE))
    assert found["sample"] == ((1, 4, 64, 96), (2, 4, 192, 336), (8, 4, 256, 384))
    assert found["effnet"] == ((1, 16, 6, 9), (2, 16, 18, 32), (8, 16, 24, 36))
    step = shapes(profile(DECODER, WIDE, "step"))
    assert [end[:3] for end in step["effnet_map"]] == [(1, 32, 48), (2, 96, 168), (8, 128, 192)]  # after patches of 2
    assert {end[1] for name, ends in step.items() if name.endswith(".values") for end in ends} == {4}


def test_the_others() -> None:
    assert shapes(profile(VQGAN, WIDE)) == {"latents": ((1, 4, 64, 96), (1, 4, 192, 336), (1, 4, 256, 384))}
    pixels = ((1, 3, 256, 384), (2, 3, 768, 1344), (4, 3, 1024, 1536))
    assert shapes(profile(VQGAN, WIDE, "encoder")) == {"images": pixels}
    assert shapes(profile(TEXT, WIDE))["input_ids"] == ((1, 77), (2, 77), (16, 77))
    assert shapes(profile(IMAGE, WIDE)) == {"pixel_values": tuple((n, 3, 224, 224) for n in (1, 1, 4))}
    latents = ((1, 16, 6, 9), (2, 16, 18, 32), (4, 16, 24, 36))
    assert shapes(profile(PreviewerConfig(), WIDE)) == {"latents": latents}
    maps = ((1, 3, 192, 288), (2, 3, 576, 1024), (4, 3, 1024, 1536))  # 32 pixels for a value; an image as it is
    assert shapes(profile(EffnetEncoderConfig(), WIDE)) == {"pixels": maps}


def test_controlnets() -> None:
    canny, inpainting, large, simple = (shapes(profile(config, WIDE))["control_image"] for config in CONTROLNETS)
    assert canny == ((1, 1, 256, 384), (2, 1, 768, 1344), (4, 1, 1024, 1536))
    assert inpainting[1] == (2, 4, 768, 1344)
    assert large == ((1, 16, 6, 9), (2, 16, 18, 32), (4, 16, 24, 36))
    assert simple == ((1, 512, 1, 1), (2, 512, 1, 1), (4, 512, 24, 36))
    for bounds, largest in ((WIDE, (32, 48)), (STATIC, (24, 42))):  # 1024x1536 and 768x1344 pixels by 32
        ports = profile(PRIOR, bounds, "step", control=(0, 63)).ports
        assert [end[2:] for end in (ports["control.63"].min, ports["control.63"].opt)] == [(1, 1), (18, 32)]
        assert ports["control.0"].max[2:] == largest


def test_one_size_alone() -> None:
    """Every shape is fixed but the text encoder's batch: images may be of one prompt or of several."""
    for config in ALL:
        for graph in WRITERS[config.stage]:
            for least, likeliest, largest in shapes(profile(config, STATIC, graph)).values():
                if config is not TEXT:
                    assert least == likeliest == largest
    assert shapes(profile(PRIOR, STATIC))["sample"][1] == (4, 16, 18, 32)
    assert shapes(profile(DECODER, STATIC))["sample"][1] == (2, 4, 192, 336)
    assert shapes(profile(TEXT, STATIC))["input_ids"] == ((1, 77), (2, 77), (16, 77))
    assert shapes(profile(EffnetEncoderConfig(), STATIC))["pixels"][2] == (2, 3, 576, 1024)


@pytest.mark.parametrize("bounds", [DEFAULT, WIDE, STATIC], ids=str)
@pytest.mark.parametrize("config", ALL, ids=lambda c: f"{c.stage}")
def test_every_shape_is_one_the_graph_takes(config: NetworkConfig, bounds: Bounds) -> None:
    for graph in WRITERS[config.stage]:
        ports = graph_ports(config, name=graph)
        found = profile(config, bounds, graph)
        assert list(found.ports) == [port.name for port in ports.inputs]
        for end in ("min", "opt", "max"):
            sizes: dict[str, int] = {}
            for port in ports.inputs:
                for dim, size in zip(port.dims, getattr(found.ports[port.name], end), strict=True):
                    if isinstance(dim, int):
                        assert size == dim
                        continue
                    assert sizes.setdefault(dim, size) == size, dim
                    least = ports.ranges.get(dim)
                    assert least is None or (size >= least.minimum and size % least.step == 0), (dim, size)
        for shape in found.ports.values():
            assert all(a <= b <= c for a, b, c in zip(shape.min, shape.opt, shape.max, strict=True))


@pytest.mark.parametrize(
    ("port", "dim"), [("sample", "depth"), ("sample", "height/0"), ("sample", "height/x"), ("control.0", "control.0.x")]
)
def test_a_dim_that_no_graph_has(port: str, dim: str) -> None:
    """A manifest may be damaged or hostile."""
    with pytest.raises(UsageError, match=f"prior: no range is known for the dim '{dim}' of its input {port}"):
        profile_for(PRIOR, "model", [PortEntry(name=port, dtype="float32", dims=(dim,))], WIDE)


@pytest.mark.parametrize("text", ["1024", "1024x", "axb", "1024x1024x0", "0x64", "1024x768x2x1", "-64x64", "99999x64"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="WIDTHxHEIGHTxIMAGES, such as 1024x768x2"):
        parse_image_size(text)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (("64x64", "1000x1001", "1536x1536"), "height 1001: expected a multiple of 8"),
        (("512x512", "256x1024", "1024x1024"), "width: least 512, likeliest 256"),
        (("64x64x2", "64x64", "64x64"), "images: least 2, likeliest 1, largest 1"),
    ],
)
def test_bounds_that_make_no_sense(sizes: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Bounds(*map(parse_image_size, sizes))
