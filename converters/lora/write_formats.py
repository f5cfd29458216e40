"""How each format with names writes a LoRA: prefixes, spelling, suffixes, alpha, and what it cannot hold."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from ...schemas.lora_keys import Algorithm, LoraFormat, Target, is_depthwise, original_spelling
from ...schemas.stages import Stage
from . import factors as F
from .adapters import Adapter, Axis, Magnitude
from .factors import Factor


class Alpha(StrEnum):
    """Where a format keeps alpha."""

    TENSOR = "a tensor for each module"
    FOLDED = "multiplied into lora_B, so that the scale is 1"
    SETTINGS = "the adapter's settings"


KOHYA_NAMES: Mapping[str, str] = {
    "lora_up": "lora_up.weight",
    "lora_down": "lora_down.weight",
    "lora_mid": "lora_mid.weight",
}
PEFT_NAMES: Mapping[str, str] = {"lora_up": "lora_B.weight", "lora_down": "lora_A.weight"}
WHOLE_NAMES = {"weight": "diff", "bias": "diff_b"}  # of a difference, by what it changes

# ComfyUI finds a module by these names whatever it is; by flat ones only the text encoder's Linears.
COMFYUI_DOTTED = {Stage.TEXT_ENCODER: "text_encoders.clip_g.transformer."}
COMFYUI_PREFIX = "diffusion_model."


@dataclass(frozen=True)
class Style:
    """`text_encoder` None: the format has no place for it. `flat` names have "_" for "."."""

    prefix: str
    text_encoder: str | None
    flat: bool
    original: bool  # Stability's names of modules, else diffusers'
    names: Mapping[str, str]
    algorithms: frozenset[Algorithm]
    magnitudes: frozenset[Axis]
    alpha: Alpha
    architecture: str | None = None  # modelspec.architecture, by which interfaces sort their lists
    folded: bool = False  # whether a product of one row is folded into a depthwise convolution's weight
    dotted: bool = False  # whether differences go by ComfyUI's dotted names


_ALL = frozenset(Algorithm)
_BOTH = frozenset(Axis)
_ONETRAINER = frozenset({Algorithm.LORA, Algorithm.LOHA, Algorithm.LOKR})
_LORA = frozenset({Algorithm.LORA})
_V1 = "stable-cascade-v1-prior/lora"

STYLES: Mapping[LoraFormat, Style] = {
    LoraFormat.KOHYA: Style(
        "lora_unet_", "lora_te_", True, True, KOHYA_NAMES, _ALL, _BOTH, Alpha.TENSOR, "stable-cascade/lora"
    ),
    LoraFormat.ONETRAINER: Style(
        "lora_prior_unet_",
        "lora_prior_te_",
        True,
        True,
        KOHYA_NAMES,
        _ONETRAINER,
        _BOTH,
        Alpha.TENSOR,
        _V1,
        folded=True,
    ),
    # ComfyUI has read these names since it knows Stable Cascade; the dotted ones came later.
    LoraFormat.COMFYUI: Style(
        "lora_prior_unet_", "lora_prior_te_", True, True, KOHYA_NAMES, _ALL, _BOTH, Alpha.TENSOR, _V1, True, True
    ),
    LoraFormat.PEFT: Style(
        "base_model.model.", None, False, False, PEFT_NAMES, _LORA, frozenset({Axis.OUTPUT}), Alpha.SETTINGS
    ),
    LoraFormat.DIFFUSERS: Style("prior.", "text_encoder.", False, False, PEFT_NAMES, _LORA, frozenset(), Alpha.FOLDED),
}


def unfit(style: Style, target: Target, adapter: Adapter) -> str | None:
    """Why the format cannot hold this adapter."""
    if target.stage is Stage.TEXT_ENCODER and style.text_encoder is None:
        return "the format holds one network, and this is the text encoder"
    if adapter.algorithm not in style.algorithms:
        what = "the difference of a bias" if target.parameter == "bias" else adapter.algorithm
        return f"the format holds {', '.join(sorted(style.algorithms))}, this is {what}"
    if style.names is PEFT_NAMES and is_depthwise(adapter.shape):
        return "PEFT trains no LoRA of a depthwise convolution that can be merged"
    if adapter.folded and not style.folded:
        return "the format holds no product that is folded into a depthwise convolution, as OneTrainer's is"
    if style.names is PEFT_NAMES and "lora_mid" in adapter.factors:
        return "the format has no lora_mid"
    if adapter.magnitude is not None and adapter.magnitude.axis not in style.magnitudes:
        return f"the format holds no DoRA with magnitudes of the {adapter.magnitude.axis}"
    return None


def named_tensors(style: Style, adapters: Mapping[Target, Adapter]) -> dict[str, Factor]:
    """The tensors of a file in this style."""
    tensors: dict[str, Factor] = {}
    for target, adapter in adapters.items():
        key = _key(style, target, adapter)
        tensors.update((f"{key}.{suffix}", factor) for suffix, factor in _tensors(style, target, adapter))
    return tensors


def _key(style: Style, target: Target, adapter: Adapter) -> str:
    module = original_spelling(target.stage, target.module) if style.original else target.module
    if style.dotted and (adapter.algorithm is Algorithm.FULL or module.endswith("_embedding")):
        return COMFYUI_DOTTED.get(target.stage, COMFYUI_PREFIX) + module
    text_encoder = target.stage is Stage.TEXT_ENCODER
    prefix = style.text_encoder if text_encoder else style.prefix
    if target.stage is Stage.DECODER and style.prefix == f"{Stage.PRIOR}.":
        prefix = f"{Stage.DECODER}."
    return f"{prefix}{module.replace('.', '_') if style.flat else module}"


def _tensors(style: Style, target: Target, adapter: Adapter) -> Iterator[tuple[str, Factor]]:
    if adapter.algorithm is Algorithm.FULL:
        yield WHOLE_NAMES[target.parameter], adapter.factors["diff"]
        return
    for name, factor in adapter.factors.items():
        folded = style.alpha is Alpha.FOLDED and name == "lora_up"
        yield style.names.get(name, name), F.scaled(factor, adapter.scale) if folded else factor
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    if style.alpha is Alpha.TENSOR and alpha is not None:
        yield "alpha", F.scalar(alpha)
    if adapter.magnitude is not None:
        yield _magnitude(style, adapter.magnitude, adapter.shape)


def _magnitude(style: Style, magnitude: Magnitude, shape: tuple[int, ...]) -> tuple[str, Factor]:
    """PEFT keeps [out] for a Linear and [1, out, 1, 1] for a convolution; LyCORIS a column or a row."""
    size, ones = magnitude.factor.shape[0], (1,) * (len(shape) - 2)
    if style.names is PEFT_NAMES:
        return "lora_magnitude_vector", F.reshaped(magnitude.factor, (1, size, *ones) if ones else (size,))
    spread = (size, 1, *ones) if magnitude.axis is Axis.OUTPUT else (1, size, *ones)
    return "dora_scale", F.reshaped(magnitude.factor, spread)
