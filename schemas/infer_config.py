"""Infers a network's config from the names and shapes of its tensors (diffusers layout).

Shapes do not show every setting. The releases give the rest: 64 channels per attention head, a patch size of 2 in stage
B and 1 in stage C, dropout at levels with attention. A network that equals a release gets that release's
config, placeholders included. A ControlNet must have as many projections as a released one, because its shapes do not
show which blocks of the prior the projections feed.
"""

import re
from collections.abc import Callable, Mapping

from .clips import SOURCE_MODELS, tower_name
from .errors import LayoutError
from .layer_tensors import EFFICIENTNET_BLOCKS, EFFICIENTNET_HEAD, EFFICIENTNET_WIDTHS
from .stages import (
    CONTROLNET_KINDS,
    CONTROLNETS,
    HEAD_CHANNELS,
    PRESETS,
    PROJ_BLOCKS_ALL,
    PROJ_BLOCKS_ENDS,
    PROJ_BLOCKS_ICONS,
    RES_TIMESTEP,
    RES_TIMESTEP_ATTENTION,
    ControlNetConfig,
    EffnetEncoderConfig,
    ImageEncoderConfig,
    NetworkConfig,
    PreviewerConfig,
    Stage,
    TextEncoderConfig,
    UNetConfig,
    VQGANConfig,
    same_network,
)
from .tensors import Shape


def infer_config(stage: Stage, shapes: Mapping[str, Shape]) -> NetworkConfig:
    """Return the config of the network whose tensors have these shapes, by their diffusers names.

    Raises LayoutError when a tensor that the config is read from is missing or has the wrong number of axes.
    """
    config = _READERS[stage](stage, _Shapes(stage, shapes))
    for (preset_stage, _), preset in PRESETS.items():
        if preset_stage is stage and same_network(config, preset):
            return preset
    return config


class _Shapes:
    """Looks up shapes by tensor name. Raises LayoutError for a tensor that is missing or has too few axes."""

    def __init__(self, stage: Stage, shapes: Mapping[str, Shape]) -> None:
        self.stage = stage
        self.shapes = shapes

    def size(self, name: str, axis: int) -> int:
        shape = self.shapes.get(name)
        if shape is None:
            raise LayoutError(f"the {self.stage} has no tensor {name}, from which its config is read")
        if axis >= len(shape) or shape[axis] <= 0:
            raise LayoutError(f"{name}: expected a positive size on axis {axis}, found shape {list(shape)}")
        return shape[axis]

    def inputs(self, name: str) -> int | None:
        """The number of channels that a layer takes; None when the network does not have the layer."""
        return self.size(name, 1) if name in self.shapes else None

    def count(self, template: str) -> int:
        """Return one more than the largest number at `#` in any tensor name; 0 when no name matches."""
        pattern = re.compile(re.escape(template).replace(r"\#", r"(\d{1,6})"))
        count = max((int(m[1]) + 1 for name in self.shapes if (m := pattern.match(name))), default=0)
        if count > len(self.shapes):
            raise LayoutError(f"tensors called {template} are numbered up to {count - 1}, more than there are tensors")
        return count


def _unet(stage: Stage, shapes: _Shapes) -> UNetConfig:
    levels = shapes.count("down_blocks.#.")
    if not 1 <= levels <= 16:
        raise LayoutError(f"the {stage} has {levels} levels of down_blocks; expected 2 to 4")
    widths = tuple(shapes.size(f"down_blocks.{level}.0.depthwise.weight", 0) for level in range(levels))
    attention = tuple(f"down_blocks.{level}.2.kv_mapper.1.weight" in shapes.shapes for level in range(levels))
    attended = next((level for level in range(levels) if attention[level]), None)
    if attended is None:
        raise LayoutError(f"the {stage} has no attention block; the conditioning width is read from one")
    cond = shapes.size(f"down_blocks.{attended}.2.kv_mapper.1.weight", 1)
    patch = 2 if stage is Stage.DECODER else 1
    kinds = tuple(RES_TIMESTEP_ATTENTION if attended else RES_TIMESTEP for attended in attention)
    period = [len(kind) for kind in kinds]
    switch = None if stage is Stage.DECODER else (False,) * (levels - 1)
    mappers = ("sca", "crp")
    first_mapper = "down_blocks.0.1.mapper"
    return UNetConfig(
        in_channels=shapes.size("embedding.1.weight", 1) // patch**2,
        out_channels=shapes.size("clf.1.weight", 0) // patch**2,
        patch_size=patch,
        conditioning_dim=cond,
        block_out_channels=widths,
        num_attention_heads=tuple(w // HEAD_CHANNELS if a else 0 for w, a in zip(widths, attention, strict=True)),
        down_num_layers_per_block=tuple(_layers(shapes, f"down_blocks.{i}.#.", period[i]) for i in range(levels)),
        up_num_layers_per_block=tuple(_layers(shapes, f"up_blocks.{i}.#.", period[-1 - i]) for i in range(levels)),
        down_blocks_repeat_mappers=tuple(shapes.count(f"down_repeat_mappers.{i}.#.") + 1 for i in range(levels)),
        up_blocks_repeat_mappers=tuple(shapes.count(f"up_repeat_mappers.{i}.#.") + 1 for i in range(levels)),
        block_types_per_layer=kinds,
        clip_text_in_channels=shapes.inputs("clip_txt_mapper.weight"),
        clip_text_pooled_in_channels=shapes.size("clip_txt_pooled_mapper.weight", 1),
        clip_image_in_channels=shapes.inputs("clip_img_mapper.weight"),
        effnet_in_channels=shapes.inputs("effnet_mapper.0.weight"),
        pixel_mapper_in_channels=shapes.inputs("pixels_mapper.0.weight"),
        dropout=tuple(0.1 if a else 0 for a in attention),
        switch_level=switch,
        timestep_conditioning_type=tuple(c for c in mappers if f"{first_mapper}_{c}.weight" in shapes.shapes),
        clip_seq=shapes.size("clip_txt_pooled_mapper.weight", 0) // cond,
        kernel_size=shapes.size("down_blocks.0.0.depthwise.weight", 2),
        timestep_ratio_embedding_dim=shapes.size(f"{first_mapper}.weight", 1),
    )


def _layers(shapes: _Shapes, template: str, period: int) -> int:
    """Return the number of layers of a level, each of `period` blocks, even if the last block is missing."""
    return -(-shapes.count(template) // period)


def _vqgan(stage: Stage, shapes: _Shapes) -> VQGANConfig:
    down_blocks = shapes.count("down_blocks.#.")
    levels = down_blocks // 2  # blocks and strided convolutions alternate, and the latent head follows
    if not 1 <= levels <= 8:
        raise LayoutError(f"the {stage} has {down_blocks} down_blocks; expected 4")
    latent = shapes.size("vquantizer.embedding.weight", 1)
    embed = shapes.size("up_blocks.0.0.weight", 0)
    return VQGANConfig(
        # up_blocks: an entrance, the bottleneck, then an upsampler and one block for every further level
        bottleneck_blocks=shapes.count("up_blocks.#.") - 1 - 2 * (levels - 1),
        embed_dim=embed,
        levels=levels,
        in_channels=shapes.size("in_block.1.weight", 1) // 4,
        out_channels=shapes.size("out_block.0.weight", 0) // 4,
        latent_channels=latent,
        num_vq_embeddings=shapes.size("vquantizer.embedding.weight", 0),
    )


def _encoder(stage: Stage, shapes: _Shapes) -> NetworkConfig:
    """Return the config of a released encoder. Shapes do not show the heads and the activation of other encoders."""
    embedding, axis = _EMBEDDINGS[stage]
    width = shapes.size(embedding, axis)
    layers = shapes.count(f"{embedding.partition('.')[0]}.encoder.layers.#.")
    for preset in PRESETS.values():
        if preset.stage is stage and isinstance(preset, TextEncoderConfig | ImageEncoderConfig):
            sizes = (preset.hidden_size, preset.num_hidden_layers)
            if sizes == (width, layers):
                return preset
    raise LayoutError(
        f"the {stage} is {tower_name(stage, width)}, not a released one, and its tensors do not show its number of "
        f"heads and its activation; give the folder that holds its config.json, or {SOURCE_MODELS[stage]}, "
        f'with {stage}="PATH"'
    )


# The tensor whose shape has the width of a tower, and the axis of the width.
_EMBEDDINGS: Mapping[Stage, tuple[str, int]] = {
    Stage.TEXT_ENCODER: ("text_model.embeddings.token_embedding.weight", 1),
    Stage.IMAGE_ENCODER: ("vision_model.embeddings.class_embedding", 0),
}


def _effnet_encoder(stage: Stage, shapes: _Shapes) -> EffnetEncoderConfig:
    widths, blocks = _efficientnet(shapes)
    return EffnetEncoderConfig(shapes.size("mapper.0.weight", 0), widths, blocks)


def _efficientnet(shapes: _Shapes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the widths and the number of blocks of an EfficientNetV2, as in EFFICIENTNET_WIDTHS and _BLOCKS."""
    rows = range(1, len(EFFICIENTNET_BLOCKS) + 1)
    blocks = tuple(shapes.count(f"backbone.{row}.#.") for row in rows)
    last = {row: shapes.count(f"backbone.{row}.0.block.#.") - 1 for row in rows}  # the convolution of the row's width
    widths = (shapes.size(f"backbone.{row}.0.block.{last[row]}.0.weight", 0) for row in rows)
    stem, head = (shapes.size(f"backbone.{part}.0.weight", 0) for part in (0, EFFICIENTNET_HEAD))
    return (stem, *widths, head), blocks


def _previewer(stage: Stage, shapes: _Shapes) -> PreviewerConfig:
    return PreviewerConfig(
        c_in=shapes.size("blocks.0.weight", 1),
        c_hidden=shapes.size("blocks.0.weight", 0),
        c_out=shapes.size("blocks.24.weight", 0),
    )


_RELEASED_PROJ_BLOCKS = {len(blocks): blocks for blocks in (PROJ_BLOCKS_ENDS, PROJ_BLOCKS_ALL)}
_SMALL_WIDTH = 128  # channels of the small prior for icons, whose ControlNet feeds three blocks


def _controlnet(stage: Stage, shapes: _Shapes) -> ControlNetConfig:
    projections, width = shapes.count("projections.#."), shapes.size("projections.0.2.weight", 0)
    small = {len(PROJ_BLOCKS_ICONS): PROJ_BLOCKS_ICONS} if width == _SMALL_WIDTH else {}
    blocks = {**_RELEASED_PROJ_BLOCKS, **small}.get(projections)
    if blocks is None:
        raise LayoutError(
            f"the {stage} has {projections} projections, the released ones have 8 or 64; which blocks of the prior "
            "its projections feed (proj_blocks) is not in the file; give the folder that holds its config.json"
        )
    _, mode = CONTROLNET_KINDS[stage]
    backbone = _efficientnet(shapes) if mode is None else (EFFICIENTNET_WIDTHS, EFFICIENTNET_BLOCKS)
    return ControlNetConfig(
        c_in=shapes.size("backbone.0.0.weight" if mode is None else "backbone.0.weight", 1),
        proj_blocks=blocks,
        bottleneck_mode=mode,
        c_proj=width,
        backbone_widths=backbone[0],
        backbone_blocks=backbone[1],
    )


_READERS: Mapping[Stage, Callable[[Stage, _Shapes], NetworkConfig]] = {
    Stage.PRIOR: _unet,
    Stage.DECODER: _unet,
    Stage.VQGAN: _vqgan,
    Stage.TEXT_ENCODER: _encoder,
    Stage.IMAGE_ENCODER: _encoder,
    Stage.EFFNET_ENCODER: _effnet_encoder,
    Stage.PREVIEWER: _previewer,
    **dict.fromkeys(CONTROLNETS, _controlnet),
}
