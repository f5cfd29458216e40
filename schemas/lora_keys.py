"""The keys of LoRA files for Stable Cascade: prefixes, spellings of modules, suffixes of factors.

Names are flattened in some formats ("." became "_"), which cannot be undone by rule: `down_blocks_0_2` has one
reading only because the network has such a block. So names are looked up in tables made from the network's config.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
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
    """A parameter that a LoRA changes: the module by its diffusers name, and the weight or the bias of it."""

    stage: Stage
    module: str
    parameter: str = "weight"

    @property
    def tensor(self) -> str:
        return f"{self.module}.{self.parameter}"

    @property
    def name(self) -> str:
        """The module's name, and behind it what else than its weight is changed."""
        return self.module if self.parameter == "weight" else self.tensor


@dataclass(frozen=True)
class Prefix:
    """The text before the module in a key, and whether the module after it is flattened."""

    text: str
    flat: bool
    text_encoder: bool
    format: LoraFormat


# The longer one first where one begins with another; those without a prefix last.
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

# Key endings -> our name of the factor (LyCORIS' names). The longer one first where one ends with another.
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

# The endings by length, so that of two that fit the longer one is found.
_LENGTHS = sorted({ending.count(".") for ending in SUFFIXES}, reverse=True)

# Pieces of keys -> what they are a sign of, none of which is a product of factors that is added to a weight.
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

# Attention below "X.attention.": the diffusers spelling -> the original ones with q, k, v apart. The first is what
# kohya, OneTrainer and ComfyUI write today; `to_out` was kohya's before 25 February 2024, the numbers are OneTrainer's.
ATTENTION_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "to_q": ("attn.to_q", "attn.in_proj.0"),
    "to_k": ("attn.to_k", "attn.in_proj.1"),
    "to_v": ("attn.to_v", "attn.in_proj.2"),
    "to_out.0": ("attn.out_proj", "attn.to_out"),
}
JOINED = ("to_q", "to_k", "to_v")  # the rows of in_proj_weight, in this order
_ATTENTION = ".attention."

# The order in which Stability's classes register their parts, which is the order of a list of modules.
_ROOTS = (
    "effnet_mapper pixels_mapper clip_mapper clip_txt_mapper clip_txt_pooled_mapper clip_img_mapper embedding "
    "down_blocks down_downscalers down_repeat_mappers up_blocks up_upscalers up_repeat_mappers clf"
).split()


def lora_modules(config: NetworkConfig) -> dict[str, Shape]:
    """Every module a LoRA can change, by its diffusers name, with its weight's shape: Linear [out, in] and
    convolutions [out, in, height, width]."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in expected_tensors(config).items()
        if name.endswith(".weight") and len(shape) in (2, 4) and not name.endswith("_embedding.weight")
    }


def changeable(config: NetworkConfig) -> dict[str, Shape]:
    """The shape of every tensor that a LoRA can change, by its diffusers name: weights and biases."""
    return {name: shape for name, shape in expected_tensors(config).items() if name.endswith((".weight", ".bias"))}


def split_key(key: str) -> tuple[str, str | None]:
    """A key as its module and the ending, one of SUFFIXES; None where it has no such ending."""
    parts = key.split(".")
    for dots in _LENGTHS:
        ending = ".".join(parts[-dots - 1 :])
        if ending in SUFFIXES and len(parts) > dots + 1:
            return key[: -len(ending) - 1], ending
    return key, None


def is_depthwise(shape: Shape) -> bool:
    """Whether a weight of this shape is that of a depthwise convolution, which these networks have no other kind of
    grouped ones than."""
    return len(shape) == 4 and shape[1] == 1 < shape[0]


def original_spelling(stage: Stage, module: str) -> str:
    """The module's name in Stability's code, with q, k and v apart."""
    return _spellings(stage, module)[-1]


def _spellings(stage: Stage, module: str) -> tuple[str, ...]:
    """Every name of a module, the diffusers one first, today's original one last."""
    block, found, projection = module.partition(_ATTENTION)
    if found:
        others = reversed(ATTENTION_SPELLINGS[projection])
        return (module, *(f"{block}{_ATTENTION}{other}" for other in others))
    return (module, _renamed(stage, module))


def _renamed(stage: Stage, module: str) -> str:
    (made,) = ORIGINAL_TO_DIFFUSERS[stage].inverse.apply({f"{module}.weight": (1,)})
    return made.removesuffix(".weight")


def spelling_table(config: NetworkConfig) -> dict[str, tuple[str, ...]]:
    """Every spelling of every module -> the modules it means: one, or three for attention's joined matrix."""
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


def flattened(table: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The same table by flattened names (all of them differ, in every network of the releases)."""
    return {name.replace(".", "_"): modules for name, modules in table.items()}


@dataclass(frozen=True)
class ListEntry:
    """A weight in Stability's model: its module's original name, the diffusers modules that its rows belong to, and
    its shape."""

    name: str
    modules: tuple[str, ...]
    shape: Shape


def listed_weights(config: UNetConfig, filters: Sequence[str]) -> list[ListEntry]:
    """The weights that Stability's trainer gives a LoRA, in the order of its list.

    `filters` are pieces of module names, one of which must occur; the order is that of `model.modules()` after the
    LoRAs were registered, where an attention's out_proj comes before its in_proj_weight
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
    """Sorts modules by the order of registration; those of one level are in that order already."""
    root, *rest = module.split(".")
    return _ROOTS.index(root), int(rest[0]) if rest and root.startswith(("down_", "up_")) else 0
