"""Splits the keys of a LoRA file into module and factor, and recognises the format of the keys."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ...schemas.errors import LayoutError, UsageError
from ...schemas.limits import MAX_LORA_TENSORS
from ...schemas.lora_keys import (
    PREFIXES,
    REFUSED,
    SUFFIXES,
    LoraFormat,
    LoraTarget,
    Prefix,
    spelling_table,
    split_key,
)
from ...schemas.messages import listed_below
from ...schemas.stages import NetworkConfig
from ...schemas.tensors import Shape
from ...storage.safetensors_reader import Header
from ..checkpoints.identify import identify_all
from .factors import Factor, read_values, stored
from .lora_file import Embedding

BUNDLE = re.compile(r"bundle_emb\.(.+)\.clip_g(_out)?")
EMBEDDING_KEYS = ("clip_g", "clip_g_out")  # keys of a file that holds an embedding and nothing else


@dataclass
class Group:
    """The factors of one module by our names, and their keys in the file.

    `reshape` is the shape that ComfyUI gives the weight before it adds the product."""

    factors: dict[str, Factor] = field(default_factory=dict)
    alpha: float | None = None
    reshape: Shape | None = None
    keys: list[str] = field(default_factory=list)


def group_keys(header: Header) -> tuple[dict[str, Group], tuple[Embedding, ...]]:
    """Return the groups of a file by the module's name in the file, and the embeddings beside them.

    Raises LayoutError for keys that belong to no known algorithm, UsageError for a checkpoint."""
    if len(header.tensors) > MAX_LORA_TENSORS:
        raise LayoutError(
            f"{header.path}: not a LoRA for Stable Cascade: it has {len(header.tensors)} tensors, and a LoRA for these "
            f"networks has no more than {MAX_LORA_TENSORS}. Is it for another model?"
        )
    groups: dict[str, Group] = {}
    embeddings = []
    unknown = []
    for key, tensor in header.tensors.items():
        bundle = BUNDLE.fullmatch(key)
        module, suffix = split_key(key)
        if bundle:
            embeddings.append(Embedding(bundle[1], stored(key, tensor), output=bundle[2] is not None))
        elif suffix is None:
            unknown.append(key)
        else:
            _add(groups.setdefault(module, Group()), suffix, key, header)
    if unknown:
        raise LayoutError(_unknown_keys(header, unknown))
    return groups, tuple(embeddings)


def is_factor_key(key: str) -> bool:
    """Return whether `key` has the ending of a LoRA's factor or setting."""
    return split_key(key)[1] is not None


def _add(group: Group, suffix: str, key: str, header: Header) -> None:
    name, tensor = SUFFIXES[suffix], header.tensors[key]
    if name in group.factors or (name == "alpha" and group.alpha is not None):
        raise LayoutError(f"{header.path}: {key}: expected one {name} for a module, found a second; remove one of them")
    group.keys.append(key)
    if name == "alpha":
        values = read_values(key, tensor)
        if len(values) != 1:
            raise LayoutError(f"{header.path}: {key}: expected a single number, found shape {list(tensor.shape)}")
        group.alpha = values[0]
    elif name == "reshape_weight":
        group.reshape = tuple(map(int, read_values(key, tensor)))
    else:
        group.factors[name] = stored(key, tensor)


def _unknown_keys(header: Header, unknown: list[str]) -> str:
    """Return the message for a file with unknown keys. Raises UsageError when the file is a checkpoint."""
    _refuse_checkpoint(header)
    for piece, algorithm in REFUSED.items():
        if any(piece in key for key in unknown):
            example = next(key for key in unknown if piece in key)
            return (
                f"{header.path}: {example}: expected LoRA, LoHa, LoKr or DoRA, found {algorithm}, which is not "
                "supported; extract a LoRA from the merged model with the program that trained it"
            )
    if unknown[0] in EMBEDDING_KEYS:
        return f"{header.path}: an embedding of OneTrainer, not a LoRA; there is nothing to merge into weights"
    return (
        f"{header.path}: {len(unknown)} keys are no part of a LoRA known here:{listed_below(unknown)}\n"
        "Expected endings such as lora_down.weight, lora_A.weight, hada_w1_a, lokr_w1, alpha; is this a LoRA file?"
    )


def _refuse_checkpoint(header: Header) -> None:
    try:
        found = identify_all(header).components
    except LayoutError:
        return
    if any(is_factor_key(key) for key in header.tensors):
        return
    what = ", ".join(component.describe() for component in found)
    raise UsageError(
        f"{header.path}: expected a LoRA, found a checkpoint: {what}; give the checkpoint first, then its LoRAs"
    )


class NameTable:
    """Finds the modules that a key names, in one pair of networks."""

    def __init__(self, unet: NetworkConfig, text_encoder: NetworkConfig) -> None:
        self._networks = (unet, text_encoder)
        self._tables = {
            (flat, of_text): spelling_table(self._networks[of_text], flat=flat)
            for flat in (False, True)
            for of_text in (False, True)
        }

    def find(self, name: str) -> tuple[Prefix, tuple[LoraTarget, ...]] | None:
        """Return the prefix of `name` and the modules after it: one, or q, k and v. Returns None for unknown names."""
        for prefix in PREFIXES:
            if name.startswith(prefix.text):
                modules = self._tables[prefix.flat, prefix.text_encoder].get(name[len(prefix.text) :])
                if modules:
                    stage = self._networks[prefix.text_encoder].stage
                    return prefix, tuple(LoraTarget(stage, module) for module in modules)
        return None


def format_of(prefixes: Iterable[Prefix], groups: Mapping[str, Group]) -> LoraFormat:
    """Return the format of most prefixes. Names without prefix are PEFT's, or OneTrainer's beside lora_down."""
    found = Counter(prefix.format for prefix in prefixes).most_common(1)
    if not found:
        return LoraFormat.KOHYA
    plain = any(key.endswith(("lora_down.weight", ".alpha")) for group in groups.values() for key in group.keys)
    return LoraFormat.ONETRAINER if found[0][0] is LoraFormat.PEFT and plain else found[0][0]
