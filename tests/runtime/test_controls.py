"""Control images against OpenCV and torch by hand; residuals out of a ControlNet of real size, and their refusals."""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cascadekit.parity.reference import load_reference
from cascadekit.parity.reference.torch_engine import TorchEngine
from cascadekit.runtime.engines.protocol import check_inputs
from cascadekit.runtime.images.pictures import fit
from cascadekit.runtime.images.resample import bilinear
from cascadekit.runtime.sampling.controlnets import CONTROLS, FilterInputs, require_control, summed
from cascadekit.schemas.control import control_ports
from cascadekit.schemas.errors import MissingPackageError, UsageError
from cascadekit.schemas.manifest import Manifest, parse_manifest
from cascadekit.schemas.ports import Port, ports_of
from cascadekit.schemas.request import parse_request
from cascadekit.schemas.stages import PRESETS, ControlNetConfig, Stage, Variant
from cascadekit.storage.install_hint import install_hint
from helpers.efficientnets import narrow_controlnet, narrow_effnet
from helpers.graphs import random_tensors

SIZE = (4, 6)  # of the prior's latents: control images are 128x192
PRIOR = PRESETS[Stage.PRIOR, Variant.TINY]
BLOCKS = (0, 2, 3)
CONTROLNETS = {
    Stage.CONTROLNET_CANNY: narrow_controlnet(1, BLOCKS, PRIOR.block_out_channels[0]),
    Stage.CONTROLNET_INPAINTING: narrow_controlnet(4, BLOCKS, PRIOR.block_out_channels[0]),
    Stage.CONTROLNET_SUPER_RESOLUTION: ControlNetConfig(16, (0,), "large", c_proj=PRIOR.block_out_channels[0]),
}


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """24 by 16 blobs of colour, some of them steep enough to have edges."""
    rough = np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def tensor_of(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].contiguous().float().div(255)


def entry(inputs: tuple[Port, ...], outputs: tuple[Port, ...], name: str, control: tuple[int, ...] = ()) -> Any:
    ports = [[{"name": p.name, "dtype": p.dtype, "dims": p.dims} for p in some] for some in (inputs, outputs)]
    path = f"{name}/model.onnx"
    file = {"path": path, "bytes": 1, "mtime_ns": 0, "fingerprint": "0" * 64, "sha256": None}
    return {
        "variant": "tiny", "config": {}, "precision": "fp32", "control": control, "weights": "copy", "sources": [],
        "graphs": {"model": {"path": path, "opset": 20, "inputs": ports[0], "outputs": ports[1]}}, "files": [file],
    }  # fmt: skip


def manifest(
    blocks: tuple[int, ...] = BLOCKS, stages: tuple[Stage, ...] = tuple(CONTROLNETS), **more: dict[str, Any]
) -> Manifest:
    """The manifest of a prior that takes residuals at `blocks`, and of ControlNets."""
    prior = ports_of(PRIOR)
    made = {Stage.PRIOR: entry((*prior.inputs, *control_ports(PRIOR, blocks)), prior.outputs, "prior", blocks)}
    for stage in stages:
        ports = ports_of(CONTROLNETS[stage])
        made[stage] = entry(ports.inputs, ports.outputs, stage)
    content = {"created_by": "test", "default_size": [256, 256], "vqgan_scale": None, "tokenizer": None}
    return parse_manifest(json.dumps({**content, "stages": {**made, **more}}), "test")


@pytest.mark.parametrize("size", [(24, 24), (13, 7), (100, 31), (1, 1), (60, 33)])
@pytest.mark.parametrize("align", [False, True])
def test_resizing_is_torchs(size: tuple[int, int], align: bool) -> None:
    images = np.random.default_rng(0).standard_normal((2, 3, 24, 33), dtype=np.float32)
    expected = F.interpolate(torch.from_numpy(images), size, mode="bilinear", align_corners=align).numpy()
    assert np.abs(bilinear(images, size, align_corners=align) - expected).max() <= 1e-6


@pytest.fixture
def two_threads() -> Iterator[None]:
    """With one, torch rounds elsewhere in `interpolate`: 0.05% of bytes and a few edges come out differently."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def control_image(name: str, picture: Image.Image, size: tuple[int, int], mask: Any = None, encode: Any = None) -> Any:
    return CONTROLS[name].filter(FilterInputs(picture, size, mask, encode))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("shape", [(1000, 700), (192, 128), (90, 300)])
def test_canny(shape: tuple[int, int]) -> None:
    """Stability's filter in its own words: torch.interpolate there and back, cv2.Canny on bytes in between."""
    picture = photo(*shape)
    image = tensor_of(fit(picture, 192, 128))
    small = F.interpolate(image, (224, 224), mode="bilinear")[0].mul(255).permute(1, 2, 0).numpy().astype(np.uint8)
    edges = torch.from_numpy(cv2.Canny(small, 100, 200)).div(255)[None, None]
    expected = F.interpolate(edges, (128, 192), mode="bilinear").numpy()
    found = control_image("canny", picture, SIZE)
    assert found.dtype == np.float32
    assert found.shape == (1, 1, 128, 192)
    assert 0.05 < (expected > 0).mean() < 0.95
    assert np.abs(found - expected).max() <= 1e-6
    check_inputs(Stage.CONTROLNET_CANNY, ports_of(CONTROLNETS[Stage.CONTROLNET_CANNY]).inputs, {"control_image": found})


def test_edges_are_taken_as_they_are() -> None:
    edges = np.random.default_rng(0).integers(0, 2, (128, 192), dtype=np.uint8) * 255
    found = control_image("edges", Image.fromarray(edges).convert("RGB"), SIZE)
    assert np.array_equal(found[0, 0], edges / np.float32(255))


def test_canny_without_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    words = rf"OpenCV .* {re.escape(install_hint('control'))}, or give .* edges=PICTURE"
    with pytest.raises(MissingPackageError, match=words):
        control_image("canny", photo(192, 128), SIZE)
    assert control_image("edges", photo(192, 128), SIZE).shape == (1, 1, 128, 192)


def test_inpainting() -> None:
    picture = photo(192, 128)
    mask = np.zeros((128, 192), np.uint8)
    mask[20:71, 101:150] = 255
    masked = torch.from_numpy(mask > 0)[None, None]
    image = tensor_of(picture)
    expected = torch.cat([torch.where(masked, torch.ones_like(image), image), masked.float()], dim=1)
    found = control_image("inpainting", picture, SIZE, mask=Image.fromarray(mask))
    assert found.dtype == np.float32
    assert np.array_equal(found, expected.numpy())
    with pytest.raises(UsageError, match="needs a mask"):
        control_image("inpainting", picture, SIZE)


@pytest.mark.parametrize("size", [SIZE, (3, 5)])
def test_super_resolution(size: tuple[int, int]) -> None:
    config = narrow_effnet()
    encoder = load_reference(config, random_tensors(config, 0))
    height, width = (32 * side for side in size)
    picture = photo(width, height)
    image = F.interpolate(tensor_of(picture), scale_factor=0.5, mode="nearest")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        latents = encoder(pixels=(image - mean[:, None, None]) / std[:, None, None])["effnet"]
    expected = F.interpolate(latents, scale_factor=2.0, mode="nearest").numpy()

    def encode(pixels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(encoder(pixels=torch.from_numpy(pixels))["effnet"].numpy())

    found = control_image("super_resolution", picture, size, encode=encode)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_residuals_of_a_controlnet() -> None:
    config = CONTROLNETS[Stage.CONTROLNET_CANNY]
    network = load_reference(config, random_tensors(config, 0))
    runner = TorchEngine({Stage.CONTROLNET_CANNY: lambda: (network, ports_of(config))}).load(Stage.CONTROLNET_CANNY)
    image = control_image("canny", photo(400, 300), SIZE)
    found = runner({"control_image": image})
    with torch.no_grad():
        expected = network(control_image=torch.from_numpy(image))
    assert list(found) == [f"control.{block}" for block in BLOCKS]
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        assert found[name].shape == (1, 64, *SIZE)  # one pixel for each latent
        assert np.abs(found[name] - value.numpy()).max() <= 1e-5 * float(value.abs().max())
    check_inputs(Stage.PRIOR, control_ports(PRIOR, BLOCKS), found)


def test_several_controlnets() -> None:
    rng = np.random.default_rng(0)
    one = {f"control.{n}": rng.standard_normal((2, 8, 4, 6), dtype=np.float32) for n in (0, 3)}
    two = {f"control.{n}": rng.standard_normal((2, 8, 5, 3), dtype=np.float32) for n in (3, 9)}
    found = summed([one, two], SIZE)
    resized = {
        name: F.interpolate(torch.from_numpy(value), SIZE, mode="bilinear", align_corners=True).numpy()
        for name, value in two.items()
    }
    assert found.keys() == {"control.0", "control.3", "control.9"}
    assert np.array_equal(found["control.0"], one["control.0"])
    assert np.abs(found["control.3"] - (one["control.3"] + resized["control.3"])).max() <= 1e-6
    assert np.abs(found["control.9"] - resized["control.9"]).max() <= 1e-6
    assert summed([], SIZE) == {}


def test_bundles_that_cannot_be_controlled() -> None:
    assert require_control(manifest(), "edges") == (Stage.CONTROLNET_CANNY,)
    effnet = ports_of(narrow_effnet())
    with_encoder = manifest(effnet_encoder=entry(effnet.inputs, effnet.outputs, "effnet_encoder"))
    stages = (Stage.CONTROLNET_SUPER_RESOLUTION, Stage.EFFNET_ENCODER)
    assert require_control(with_encoder, "super_resolution") == stages
    for words, other, name in (
        ("canny: the bundle has no controlnet/canny; export", manifest(stages=()), "canny"),
        ("super_resolution: the bundle has no effnet_encoder; export", manifest(), "super_resolution"),
        (
            "takes no residuals; export it again: cascadekit export",
            manifest(blocks=()),
            "canny",
        ),
        (r"makes control\.3 of 64 channels, which the prior does not take", manifest(blocks=(0, 2)), "canny"),
    ):
        with pytest.raises(UsageError, match=words):
            require_control(other, name)


def test_what_a_user_writes() -> None:
    for text, (name, path, strength) in {
        "canny=photo.png": ("canny", "photo.png", 1.0),
        "edges=a/b=c.png:0.25": ("edges", "a/b=c.png", 0.25),
        "inpainting=C:\\photo.png": ("inpainting", "C:\\photo.png", 1.0),
        "super_resolution=10:30.png:2": ("super_resolution", "10:30.png", 2.0),
    }.items():
        (found,) = parse_request({"prompt": "x", "seed": 0, "controls": [text]}, (64, 64)).controls
        assert (found.name, found.path, found.strength) == (name, path, strength)
    for text in ("canny", "canny=", "=photo.png"):
        with pytest.raises(UsageError, match="expected NAME=PICTURE or NAME=PICTURE:STRENGTH"):
            parse_request({"prompt": "x", "seed": 0, "controls": [text]}, (64, 64))


def test_every_controlnet_has_a_name() -> None:
    with pytest.raises(UsageError, match="control 'depth': expected one of canny, edges"):
        require_control(manifest(), "depth")
    assert {kind.stage for kind in CONTROLS.values()} == CONTROLNETS.keys()
