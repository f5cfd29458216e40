"""How each format with names writes a LoRA: prefixes, spelling, suffixes, alpha, and what it cannot hold."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from ...schemas.lora_keys import Algorithm, LoraFormat, LoraTarget, is_depthwise, original_spelling
from ...schemas.stages import Stage
from . import factors as F
from .adapters import Adapter, Axis, Magnitude
from .factors import Factor


class Alpha(StrEnum):
    """The place where a format keeps alpha."""

    TENSOR = "a tensor for each module"
    FOLDED = "multiplied into lora_B, so that the scale is 1"
    SETTINGS = "the adapter's settings"


KOHYA_NAMES: Mapping[str, str] = {
    "lora_up": "lora_up.weight",
    "lora_down": "lora_down.weight",
    "lora_mid": "lora_mid.weight",
}
PEFT_NAMES: Mapping[str, str] = {"lora_up": "lora_B.weight", "lora_down": "lora_A.weight"}
DIFFERENCE_NAMES = {"weight": "diff", "bias": "diff_b"}  # key ending of a difference, by the parameter it changes

# ComfyUI finds every module by these dotted names. By flat names it finds only the Linears of the text encoder.
COMFYUI_DOTTED = {Stage.TEXT_ENCODER: "text_encoders.clip_g.transformer."}
COMFYUI_PREFIX = "diffusion_model."


@dataclass(frozen=True)
class NamedFormat:
    """How a LoRA format with keys names its tensors, and what it can hold.

    Attributes:
        prefix: The text before the modules of the prior.
        text_encoder: The text before the modules of the text encoder; None when the format cannot hold them.
        flat: True when "." in module names becomes "_".
        original: True when modules have Stability's names, False when they have those of diffusers.
        names: Our name of a factor -> the ending of its key.
        algorithms: The algorithms that the format can hold.
        magnitudes: The axes of DoRA magnitudes that the format can hold.
        alpha: The place where the format keeps alpha.
        architecture: Modelspec.architecture, by which user interfaces sort their lists; None to write none.
        folded: True when a product of one row is folded into the weight of a depthwise convolution.
        dotted: True when differences have ComfyUI's dotted names.
    """

    prefix: str
    text_encoder: str | None
    flat: bool
    original: bool
    names: Mapping[str, str]
    algorithms: frozenset[Algorithm]
    magnitudes: frozenset[Axis]
    alpha: Alpha
    architecture: str | None = None
    folded: bool = False
    dotted: bool = False


_KOHYA = NamedFormat(
    prefix="lora_unet_",
    text_encoder="lora_te_",
    flat=True,
    original=True,
    names=KOHYA_NAMES,
    algorithms=frozenset(Algorithm),
    magnitudes=frozenset(Axis),
    alpha=Alpha.TENSOR,
    architecture="stable-cascade/lora",
)
# ComfyUI has read these names since its first support of Stable Cascade. It read dotted names only later.
_COMFYUI = replace(
    _KOHYA,
    prefix="lora_prior_unet_",
    text_encoder="lora_prior_te_",
    architecture="stable-cascade-v1-prior/lora",
    folded=True,
    dotted=True,
)
_ONETRAINER = replace(_COMFYUI, algorithms=frozenset({Algorithm.LORA, Algorithm.LOHA, Algorithm.LOKR}), dotted=False)
_PEFT = NamedFormat(
    prefix="base_model.model.",
    text_encoder=None,
    flat=False,
    original=False,
    names=PEFT_NAMES,
    algorithms=frozenset({Algorithm.LORA}),
    magnitudes=frozenset({Axis.OUTPUT}),
    alpha=Alpha.SETTINGS,
)
_DIFFUSERS = replace(_PEFT, prefix="prior.", text_encoder="text_encoder.", magnitudes=frozenset(), alpha=Alpha.FOLDED)

NAMED_FORMATS: Mapping[LoraFormat, NamedFormat] = {
    LoraFormat.KOHYA: _KOHYA,
    LoraFormat.ONETRAINER: _ONETRAINER,
    LoraFormat.COMFYUI: _COMFYUI,
    LoraFormat.PEFT: _PEFT,
    LoraFormat.DIFFUSERS: _DIFFUSERS,
}


def unfit(form: NamedFormat, target: LoraTarget, adapter: Adapter) -> str | None:
    """Return why the format cannot hold this adapter; None when it can."""
    if target.stage is Stage.TEXT_ENCODER and form.text_encoder is None:
        return "the format holds one network, and this is the text encoder"
    if adapter.algorithm not in form.algorithms:
        what = "the difference of a bias" if target.parameter == "bias" else adapter.algorithm
        return f"the format holds {', '.join(sorted(form.algorithms))}, this is {what}"
    if form.names is PEFT_NAMES and is_depthwise(adapter.shape):
        return "PEFT trains no LoRA of a depthwise convolution that can be merged"
    if adapter.folded and not form.folded:
        return "the format holds no product that is folded into a depthwise convolution, as OneTrainer's is"
    if form.names is PEFT_NAMES and "lora_mid" in adapter.factors:
        return "the format has no lora_mid"
    if adapter.magnitude is not None and adapter.magnitude.axis not in form.magnitudes:
        return f"the format holds no DoRA with magnitudes of the {adapter.magnitude.axis}"
    return None


def named_tensors(form: NamedFormat, adapters: Mapping[LoraTarget, Adapter]) -> dict[str, Factor]:
    """Return the tensors of a file in this format, by key."""
    tensors: dict[str, Factor] = {}
    for target, adapter in adapters.items():
        key = _key(form, target, adapter)
        tensors.update((f"{key}.{suffix}", factor) for suffix, factor in _tensors(form, target, adapter))
    return tensors


def _key(form: NamedFormat, target: LoraTarget, adapter: Adapter) -> str:
    module = original_spelling(target.stage, target.module) if form.original else target.module
    if form.dotted and (adapter.algorithm is Algorithm.FULL or module.endswith("_embedding")):
        return COMFYUI_DOTTED.get(target.stage, COMFYUI_PREFIX) + module
    text_encoder = target.stage is Stage.TEXT_ENCODER
    prefix = form.text_encoder if text_encoder else form.prefix
    if target.stage is Stage.DECODER and form.prefix == f"{Stage.PRIOR}.":
        prefix = f"{Stage.DECODER}."
    return f"{prefix}{module.replace('.', '_') if form.flat else module}"


def _tensors(form: NamedFormat, target: LoraTarget, adapter: Adapter) -> Iterator[tuple[str, Factor]]:
    if adapter.algorithm is Algorithm.FULL:
        yield DIFFERENCE_NAMES[target.parameter], adapter.factors["diff"]
        return
    for name, factor in adapter.factors.items():
        folded = form.alpha is Alpha.FOLDED and name == "lora_up"
        yield form.names.get(name, name), F.scaled(factor, adapter.scale) if folded else factor
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    if form.alpha is Alpha.TENSOR and alpha is not None:
        yield "alpha", F.scalar(alpha)
    if adapter.magnitude is not None:
        yield _magnitude(form, adapter.magnitude, adapter.shape)


def _magnitude(form: NamedFormat, magnitude: Magnitude, shape: tuple[int, ...]) -> tuple[str, Factor]:
    """Return the key ending and the shaped magnitudes.

    PEFT keeps [out] for a Linear and [1, out, 1, 1] for a convolution; LyCORIS keeps a column or a row."""
    size, ones = magnitude.factor.shape[0], (1,) * (len(shape) - 2)
    if form.names is PEFT_NAMES:
        return "lora_magnitude_vector", F.reshaped(magnitude.factor, (1, size, *ones) if ones else (size,))
    spread = (size, 1, *ones) if magnitude.axis is Axis.OUTPUT else (1, size, *ones)
    return "dora_scale", F.reshaped(magnitude.factor, spread)
