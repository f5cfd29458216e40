"""The keys of LoRA files for Stable Cascade: prefixes, spellings of modules, suffixes of factors.

Some formats flatten names: "." becomes "_". No rule can undo that, since `down_blocks_0_2` has one reading only because
the network has such a block. So names are looked up in tables that are made from the network's config.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from .layouts import ORIGINAL_TO_DIFFUSERS
from .stages import NetworkConfig, Stage, UNetConfig
from .tensors import Shape, expected_tensors


class LoraFormat(StrEnum):
    """The format of a LoRA file, named after the program that writes it."""

    KOHYA = "kohya"
    ONETRAINER = "onetrainer"
    COMFYUI = "comfyui"
    PEFT = "peft"  # an adapter on diffusers' StableCascadeUNet
    DIFFUSERS = "diffusers"  # OneTrainer's choice of that name: diffusers modules behind "prior."
    STABILITY = "stability"  # a list without names, in the order of the model's modules
    LYCORIS = "lycoris"  # read only


class Algorithm(StrEnum):
    """How the change of a weight is computed from the factors."""

    LORA = "lora"
    LOHA = "loha"
    LOKR = "lokr"
    FULL = "full"  # the difference itself, for a weight of any shape or a bias


class LoraTarget(NamedTuple):
    """A parameter that a LoRA changes: the diffusers name of the module, and "weight" or "bias"."""

    stage: Stage
    module: str
    parameter: str = "weight"

    @property
    def tensor(self) -> str:
        return f"{self.module}.{self.parameter}"

    @property
    def name(self) -> str:
        """The module's name; for a parameter other than its weight, the parameter's full name."""
        return self.module if self.parameter == "weight" else self.tensor


@dataclass(frozen=True)
class Prefix:
    """The text before the module in a key; `flat` when the module after it is flattened."""

    text: str
    flat: bool
    text_encoder: bool
    format: LoraFormat


# A prefix that begins with another one comes before it; empty prefixes come last.
PREFIXES: tuple[Prefix, ...] = (
    Prefix("lora_prior_unet_", True, False, LoraFormat.ONETRAINER),
    Prefix("lora_prior_te_", True, True, LoraFormat.ONETRAINER),
    Prefix("lora_unet_", True, False, LoraFormat.KOHYA),
    Prefix("lora_te_", True, True, LoraFormat.KOHYA),
    Prefix("lycoris_", True, False, LoraFormat.LYCORIS),
    Prefix("model.diffusion_model.", False, False, LoraFormat.COMFYUI),
    Prefix("diffusion_model.", False, False, LoraFormat.COMFYUI),
    Prefix("text_encoders.clip_g.transformer.", False, True, LoraFormat.COMFYUI),
    Prefix("lora_prior_unet.", False, False, LoraFormat.ONETRAINER),
    Prefix("lora_prior_te.", False, True, LoraFormat.ONETRAINER),
    Prefix("unet.", False, False, LoraFormat.ONETRAINER),
    Prefix("clip_g.", False, True, LoraFormat.ONETRAINER),
    Prefix("prior.", False, False, LoraFormat.DIFFUSERS),
    Prefix("decoder.", False, False, LoraFormat.DIFFUSERS),
    Prefix("text_encoder.", False, True, LoraFormat.DIFFUSERS),
    Prefix("base_model.model.", False, False, LoraFormat.PEFT),
    Prefix("", False, False, LoraFormat.PEFT),
    Prefix("", False, True, LoraFormat.PEFT),
)

# Key endings -> the name of the factor here, as LyCORIS names it.
SUFFIXES: Mapping[str, str] = {
    "lora_down.weight": "lora_down",
    "lora_up.weight": "lora_up",
    "lora_mid.weight": "lora_mid",
    "lora_A.default.weight": "lora_down",
    "lora_B.default.weight": "lora_up",
    "lora_A.weight": "lora_down",
    "lora_B.weight": "lora_up",
    "lora_magnitude_vector.default.weight": "magnitude",
    "lora_magnitude_vector.default": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
    "lora.down.weight": "lora_down",
    "lora.up.weight": "lora_up",
    "lora_B.default.bias": "bias_up",
    "lora_B.bias": "bias_up",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "diff",
    "b_norm": "diff_b",
    "reshape_weight": "reshape_weight",
    **{name: name for name in "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2".split()},
    **{name: name for name in "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2".split()},
}

# The numbers of dots in endings, the largest first, so that the longest ending that fits is found.
_LENGTHS = sorted({ending.count(".") for ending in SUFFIXES}, reverse=True)

# Pieces of keys -> the method they belong to. None of these methods adds a product of factors to a weight.
REFUSED: Mapping[str, str] = {
    ".oft_": "OFT or BOFT",
    ".boft_": "BOFT",
    ".a1.weight": "GLoRA",
    ".on_input": "IA3",
    ".ia3_l": "IA3",
    ".vera_": "VeRA",
    ".randlora_": "RandLoRA",
    ".fourierft_": "FourierFT",
    ".lora_diag": "KaSA",
    ".wd_for_diff": "a DoRA of the change alone",
    ".set_weight": "a weight that replaces the old one (set_weight)",
    ".lora_embedding_": "a LoRA of PEFT on a table of embeddings",
    ".token_adapter.": "retrained tokens of PEFT (trainable_token_indices)",
    ".modules_to_save.": "whole modules of PEFT (modules_to_save)",
    ".base_layer.": "whole tensors of PEFT's base layers (bias or modules_to_save)",
}

# Attention below "X.attention.": the diffusers spelling -> the original spellings with q, k and v apart. kohya,
# OneTrainer and ComfyUI write the first today. kohya wrote `to_out` before 25 February 2024, OneTrainer the numbers.
ATTENTION_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "to_q": ("attn.to_q", "attn.in_proj.0"),
    "to_k": ("attn.to_k", "attn.in_proj.1"),
    "to_v": ("attn.to_v", "attn.in_proj.2"),
    "to_out.0": ("attn.out_proj", "attn.to_out"),
}
JOINED = ("to_q", "to_k", "to_v")  # the rows of in_proj_weight, in this order
_ATTENTION = ".attention."

# The order in which Stability's classes register their parts, and so the order of a list of their modules.
_ROOTS = (
    "effnet_mapper pixels_mapper clip_mapper clip_txt_mapper clip_txt_pooled_mapper clip_img_mapper embedding "
    "down_blocks down_downscalers down_repeat_mappers up_blocks up_upscalers up_repeat_mappers clf"
).split()


def lora_modules(config: NetworkConfig) -> dict[str, Shape]:
    """The weight's shape of every module that a LoRA can change, by the diffusers name.

    Linears have [out, in], convolutions [out, in, height, width]."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in expected_tensors(config).items()
        if name.endswith(".weight") and len(shape) in (2, 4) and not name.endswith("_embedding.weight")
    }


def changeable(config: NetworkConfig) -> dict[str, Shape]:
    """The shape of every weight and bias that a LoRA can change, by the diffusers name."""
    return {name: shape for name, shape in expected_tensors(config).items() if name.endswith((".weight", ".bias"))}


def split_key(key: str) -> tuple[str, str | None]:
    """Split a key into its module and its ending, one of SUFFIXES; the ending is None when there is none."""
    parts = key.split(".")
    for dots in _LENGTHS:
        ending = ".".join(parts[-dots - 1 :])
        if ending in SUFFIXES and len(parts) > dots + 1:
            return key[: -len(ending) - 1], ending
    return key, None


def is_depthwise(shape: Shape) -> bool:
    """True for the weight of a depthwise convolution. These networks have no other grouped convolutions."""
    return len(shape) == 4 and shape[1] == 1 < shape[0]


def original_spelling(stage: Stage, module: str) -> str:
    """The module's name in Stability's code, with q, k and v apart."""
    return _spellings(stage, module)[-1]


def _spellings(stage: Stage, module: str) -> tuple[str, ...]:
    """Every name of a module: the diffusers name first, the original name of today last."""
    block, found, projection = module.partition(_ATTENTION)
    if found:
        others = reversed(ATTENTION_SPELLINGS[projection])
        return (module, *(f"{block}{_ATTENTION}{other}" for other in others))
    return (module, _renamed(stage, module))


def _renamed(stage: Stage, module: str) -> str:
    (made,) = ORIGINAL_TO_DIFFUSERS[stage].inverse.apply({f"{module}.weight": (1,)})
    return made.removesuffix(".weight")


@lru_cache(maxsize=32)  # every file is tried with every released network
def spelling_table(config: NetworkConfig, *, flat: bool = False) -> Mapping[str, tuple[str, ...]]:
    """Map every spelling of every module to the modules it means: one, or three for attention's joined matrix.

    The names of a `flat` table have "_" for ".". In the released networks no two names become the same so."""
    if flat:
        return {name.replace(".", "_"): modules for name, modules in spelling_table(config).items()}
    table: dict[str, tuple[str, ...]] = {}
    for module in (name.removesuffix(".weight") for name in changeable(config) if name.endswith(".weight")):
        for name in _spellings(config.stage, module):
            table[name] = (module,)
        block, found, projection = module.partition(_ATTENTION)
        if found and projection == JOINED[0]:
            modules = tuple(f"{block}{_ATTENTION}{part}" for part in JOINED)
            for joined in ("in_proj", "in_proj_weight"):
                table[f"{block}{_ATTENTION}attn.{joined}"] = modules
    return table


@dataclass(frozen=True)
class ListEntry:
    """A weight in Stability's model: the original name of its module, its shape, and the diffusers modules that have
    its rows."""

    name: str
    modules: tuple[str, ...]
    shape: Shape


def listed_weights(config: UNetConfig, filters: Sequence[str]) -> list[ListEntry]:
    """The weights that Stability's trainer gives a LoRA, in the order of its list.

    A module is chosen when its name has one of the `filters` in it. The order is that of `model.modules()` once the
    LoRAs are registered, with an attention's out_proj before its in_proj_weight
    (https://github.com/Stability-AI/StableCascade, modules/lora.py)."""
    return [entry for entry in _weights_in_order(config) if any(piece in entry.name for piece in filters)]


def _weights_in_order(config: UNetConfig) -> Iterator[ListEntry]:
    shapes = lora_modules(config)
    for module in sorted(shapes, key=_registration):
        block, found, projection = module.partition(_ATTENTION)
        shape = shapes[module]
        if not found:
            yield ListEntry(_renamed(config.stage, module), (module,), shape)
        elif projection == "to_out.0":
            yield ListEntry(f"{block}.attention.attn.out_proj", (module,), shape)
            parts = tuple(f"{block}{_ATTENTION}{part}" for part in JOINED)
            yield ListEntry(f"{block}.attention.attn", parts, (3 * shape[0], *shape[1:]))


def _registration(module: str) -> tuple[int, int]:
    """A sort key for the order of registration; the modules of one level have that order already."""
    root, *rest = module.split(".")
    return _ROOTS.index(root), int(rest[0]) if rest and root.startswith(("down_", "up_")) else 0
