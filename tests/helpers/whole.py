"""A whole cascade, tiny: all that a bundle may hold, and the lite stages of another, each with its torch networks.

The EfficientNets are narrow. The ControlNet for super_resolution has one size, 800 MB: its file is a hole, and a test
brings its own network.
"""

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler, StableCascadeDecoderPipeline, StableCascadePriorPipeline
from diffusers import StableCascadeUNet as UNet
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from cascadekit import convert, export
from cascadekit.converters.checkpoints.open_model import open_model
from cascadekit.converters.checkpoints.tiny_cascade import _original_shapes, _random_tensors, write_tiny_cascade
from cascadekit.parity.reference import load_reference
from cascadekit.runtime.engines.onnxruntime import OnnxRuntimeEngine
from cascadekit.schemas.config_json import from_json
from cascadekit.schemas.stages import (
    PROJ_BLOCKS_ENDS,
    ControlNetConfig,
    NetworkConfig,
    PreviewerConfig,
    Stage,
    VQGANConfig,
    decoder_config,
    prior_config,
)
from cascadekit.schemas.tensors import expected_tensors, is_counter
from helpers.efficientnets import narrow_controlnet, narrow_effnet
from helpers.graphs import random_tensors

F32 = NDArray[np.float32]

CHANNELS = 64
IMAGE_SIDE = 56  # of the image encoder, in pixels
# 64 residual blocks, as the ControlNets of the releases count them.
PRIOR = prior_config((CHANNELS, CHANNELS), (1, 1), (8, 24), text=8, pooled=12)
CANNY, INPAINTING = (narrow_controlnet(channels, c_proj=CHANNELS) for channels in (1, 4))
SUPER_RESOLUTION = ControlNetConfig(16, PROJ_BLOCKS_ENDS, "large", c_proj=CHANNELS)
EFFNET, PREVIEWER = narrow_effnet(), PreviewerConfig(c_hidden=32)

LITE_PRIOR = prior_config((128, 128), (2, 2), (1, 2), text=8, pooled=12)
LITE_DECODER = decoder_config((16, 24, 64, 128), (0, 0, 1, 2), (1, 2, 1, 1), (2, 1, 2, 2), conditioning=32, pooled=12)
LITE_VQGAN = VQGANConfig(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=32)


@dataclass(frozen=True)
class Whole:
    """Folders of the cascade, and its networks in torch."""

    root: Path

    @property
    def bundle(self) -> Path:
        return self.root / "bundle"

    @property
    def lite(self) -> Path:
        return self.root / "lite" / "bundle"

    def model(self, lite: bool = False) -> Path:
        return self.root / ("lite/model" if lite else "model")

    @cached_property
    def text_encoder(self) -> Any:
        return CLIPTextModelWithProjection.from_pretrained(self.model() / "text_encoder").eval()

    @cached_property
    def tokenizer(self) -> Any:
        return CLIPTokenizer.from_pretrained(self.model() / "tokenizer")

    @cached_property
    def image_encoder(self) -> Any:
        return CLIPVisionModelWithProjection.from_pretrained(self.model() / "image_encoder").eval()

    @cached_property
    def feature_extractor(self) -> Any:
        size = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
        return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIDE}, crop_size=size)

    @cached_property
    def unets(self) -> dict[tuple[Stage, bool], Any]:
        """diffusers' networks, by stage and whether the lite one."""
        keys = [(stage, lite) for stage in (Stage.PRIOR, Stage.DECODER) for lite in (False, True)]
        return {(stage, lite): UNet.from_pretrained(self.model(lite) / stage).eval() for stage, lite in keys}

    @cached_property
    def vqgans(self) -> dict[bool, Any]:
        return {lite: PaellaVQModel.from_pretrained(self.model(lite) / "vqgan").eval() for lite in (False, True)}

    @cache  # noqa: B019  # one cascade for a session
    def reference(self, stage: Stage) -> Any:
        """Our torch network, for stages that diffusers does not have."""
        folder = self.model() / stage
        (path,) = folder.glob("*.safetensors")
        return load_reference(from_json(stage, json.loads((folder / "config.json").read_text())), load_file(path))

    def pipelines(self, lite: frozenset[Stage] = frozenset()) -> tuple[Any, Any]:
        """diffusers' prior and decoder pipelines, `lite` stages taken from the other cascade."""
        common = {"tokenizer": self.tokenizer, "text_encoder": self.text_encoder}
        prior = StableCascadePriorPipeline(
            prior=self.unets[Stage.PRIOR, Stage.PRIOR in lite],
            scheduler=DDPMWuerstchenScheduler(),
            image_encoder=self.image_encoder,
            feature_extractor=self.feature_extractor,
            **common,
        )
        decoder = StableCascadeDecoderPipeline(
            decoder=self.unets[Stage.DECODER, Stage.DECODER in lite],
            vqgan=self.vqgans[Stage.VQGAN in lite],
            scheduler=DDPMWuerstchenScheduler(),
            **common,
        )
        for pipeline in (prior, decoder):
            pipeline.set_progress_bar_config(disable=True)
        return prior, decoder


def make_whole(root: Path) -> Whole:
    original = root / "original"
    write_tiny_cascade(original)
    _write_unet(PRIOR, original / "stage_c.safetensors", 11)
    _write_controlled(original)
    for name, config in (("effnet_encoder", EFFNET), ("previewer", PREVIEWER)):
        save_file(_tensors(config, 13), original / f"{name}.safetensors")
    _image_encoder().save_pretrained(original / "image_encoder")
    _write_hole(SUPER_RESOLUTION, root / "super_resolution.safetensors")
    convert([original], root / "model", "diffusers")
    model = open_model([root / "model", root / "super_resolution.safetensors"])
    export(model, root / "bundle", controlnet=True)

    lite = root / "lite" / "original"
    lite.mkdir(parents=True)
    _write_unet(LITE_PRIOR, lite / "stage_c.safetensors", 21)
    _write_unet(LITE_DECODER, lite / "stage_b.safetensors", 22)
    tensors = _random_tensors(_original_shapes(LITE_VQGAN), np.random.default_rng(23))
    for name, factor in (("up_blocks.0.0.weight", 0.01), ("out_block.0.weight", 0.15)):
        tensors[name] *= np.float32(factor)  # images around grey, as those of the tiny cascade
    tensors["out_block.0.bias"] += np.float32(0.5)
    save_file(_torch(tensors), lite / "stage_a.safetensors")
    convert([lite], root / "lite" / "model", "diffusers")
    export(root / "lite" / "model", root / "lite" / "bundle")
    shutil.rmtree(original)
    return Whole(root)


def _write_unet(config: NetworkConfig, path: Path, seed: int) -> None:
    """With mappers of the timestep that do not let 64 blocks in a row grow beyond all bounds."""
    tensors = _random_tensors(_original_shapes(config), np.random.default_rng(seed))
    for name, tensor in tensors.items():
        if ".mapper" in name:
            tensor *= np.float32(0.1)
    save_file(_torch(tensors), path)


def _torch(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(1000) if is_counter(name) else torch.from_numpy(t) for name, t in tensors.items()}


def _tensors(config: NetworkConfig, seed: int) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in random_tensors(config, seed).items()}


def _write_controlled(original: Path) -> None:
    (original / "controlnet").mkdir()
    for name, config in (("canny", CANNY), ("inpainting", INPAINTING)):
        save_file(_tensors(config, 12), original / "controlnet" / f"{name}.safetensors")


def _write_hole(config: NetworkConfig, path: Path) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in expected_tensors(config).items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def _image_encoder() -> Any:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        image_size=IMAGE_SIDE,
        patch_size=14,
        projection_dim=768,
    )
    network = CLIPVisionModelWithProjection(config)
    generator = torch.Generator().manual_seed(14)
    with torch.no_grad():
        for name, value in network.named_parameters():
            deviation = value[0].numel() ** -0.5 if value.ndim > 1 else 0.3
            value.copy_(torch.randn(value.shape, generator=generator) * deviation)
            value.add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return network


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coloured shapes with hard edges and soft shades, nowhere the same."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (7, 5, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    y, x = np.mgrid[:height, :width]
    disc = ((x - width * 0.4) ** 2 + (y - height * 0.5) ** 2 < (min(width, height) * 0.3) ** 2)[..., None]
    values = np.where(disc, 255 - smooth, smooth) + rng.integers(-8, 9, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


@dataclass
class Loads:
    """The graphs that an engine loaded and freed, in order: ("+" or "-", stage, graph)."""

    events: list[tuple[str, Stage, str]] = field(default_factory=list)

    @property
    def loaded(self) -> list[Stage]:
        return [stage for sign, stage, _ in self.events if sign == "+"]

    @property
    def alive(self) -> list[tuple[Stage, str]]:
        found: list[tuple[Stage, str]] = []
        for sign, stage, graph in self.events:
            (found.append if sign == "+" else found.remove)((stage, graph))
        return found


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, fake: Mapping[Stage, Callable[..., Any]] = {}) -> Iterator[Loads]:
    """Count what ONNX Runtime loads; `fake` stages are functions in place of their graphs."""
    loads = Loads()
    load = OnnxRuntimeEngine.load

    class Fake:
        def __init__(self, run: Callable[..., Any]) -> None:
            self.run = run

        def __call__(self, inputs: Any) -> Any:
            return self.run(inputs)

        def close(self) -> None: ...

    def counting(self: OnnxRuntimeEngine, stage: Stage, graph: str = "model") -> Any:
        runner: Any = Fake(fake[stage]) if stage in fake else load(self, stage, graph)
        loads.events.append(("+", stage, graph))
        close = runner.close

        def closing() -> None:
            loads.events.append(("-", stage, graph))
            close()

        runner.close = closing
        return runner

    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntimeEngine, "load", counting)
        yield loads
