"""The format of Stability's trainer: a list of factors without names, in the order of the model's modules.

Its scale is 1 / rank with one rank for the whole file (https://github.com/Stability-AI/StableCascade, modules/lora.py).
"""

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ...schemas.errors import LayoutError
from ...schemas.lora_keys import Algorithm, ListEntry, LoraFormat, LoraTarget, listed_weights
from ...schemas.messages import listed_below
from ...schemas.stages import NetworkConfig, UNetConfig
from ...schemas.tensors import Shape
from ...storage.safetensors_reader import Header
from . import factors as F
from .adapters import Adapter, make_adapter, split_rows
from .factors import Factor
from .lora_file import Embedding, Lora, candidates, describe

DEFAULT_FILTERS = (".attn",)
FACTOR_KEY = re.compile(r"weights\.(\d{1,6})\.(lora_down|lora_up)")
EMBEDDING_KEYS = ("embeddings.embeddings", "embeddings.indices")

Pairs = dict[int, dict[str, Factor]]


def is_stability(header: Header) -> bool:
    return any(FACTOR_KEY.fullmatch(key) or key in EMBEDDING_KEYS for key in header.tensors)


def read_stability(header: Header, networks: Sequence[NetworkConfig], filters: Sequence[str]) -> Lora:
    """Return the adapters of a file whose entries are the weights that `filters` select in the first fitting network.

    Raises LayoutError when entries are missing, or when their number or shapes fit none of the networks."""
    pairs = _pairs(header)
    problems = []
    for unet in candidates(UNetConfig, networks):
        entries = listed_weights(unet, filters) if pairs else []
        problem = _misfit(pairs, entries)
        if problem is None:
            note = f"{header.path}: has no names; taken for the modules matching {' '.join(filters)}"
            return Lora(
                path=header.path,
                format=LoraFormat.STABILITY,
                adapters=dict(_adapters(pairs, entries, unet)),
                unet=unet if pairs else None,
                embeddings=tuple(_embeddings(header)),
                metadata=header.metadata,
                notes=(note,) if pairs else (),
            )
        problems.append(f"{describe(unet)}: {problem}")
    raise LayoutError(
        f"{header.path}: a list of {len(pairs)} weights without names, which fits no network with the module filter "
        f"{' '.join(filters)}:{listed_below(problems)}\nGive the checkpoint it is for, and the module_filters of its "
        "training config"
    )


def _pairs(header: Header) -> Pairs:
    pairs: Pairs = {}
    unknown = []
    for key, tensor in header.tensors.items():
        match = FACTOR_KEY.fullmatch(key)
        if match:
            pairs.setdefault(int(match[1]), {})[match[2]] = F.stored(key, tensor)
        elif key not in EMBEDDING_KEYS:
            unknown.append(key)
    if unknown:
        raise LayoutError(f"{header.path}: keys beside weights.N.lora_down and lora_up:{listed_below(unknown)}")
    for index in range(len(pairs)):
        missing = {"lora_down", "lora_up"} - pairs.get(index, {}).keys()
        if missing:
            raise LayoutError(
                f"{header.path}: weights.{index}.{min(missing)} is missing; expected a whole list, get the file again"
            )
    return dict(sorted(pairs.items()))


def _misfit(pairs: Pairs, entries: Sequence[ListEntry]) -> str | None:
    """Return why the pairs cannot be the entries, one after another; None when they can."""
    if len(pairs) != len(entries):
        return f"expected {len(entries)} entries, found {len(pairs)}"
    for (index, pair), entry in zip(pairs.items(), entries, strict=True):
        down, up = pair["lora_down"].shape, pair["lora_up"].shape
        rank = down[0] if down else 0
        if down != (rank, entry.shape[1]) or up != (entry.shape[0], rank):
            return (
                f"weights.{index} as {entry.name}: expected lora_down [r, {entry.shape[1]}] and lora_up "
                f"[{entry.shape[0]}, r], found {list(down)} and {list(up)}"
            )
    return None


def _adapters(pairs: Pairs, entries: Sequence[ListEntry], unet: UNetConfig) -> Iterator[tuple[LoraTarget, Adapter]]:
    for pair, entry in zip(pairs.values(), entries, strict=True):
        factors = {"lora_up": pair["lora_up"], "lora_down": _over_kernel(pair["lora_down"], entry.shape)}
        joined = make_adapter(factors, 1.0, entry.shape)
        parts = [joined] if len(entry.modules) == 1 else split_rows(joined, len(entry.modules))
        for module, adapter in zip(entry.modules, parts, strict=True):
            yield LoraTarget(unet.stage, module), adapter


def _over_kernel(down: Factor, shape: Shape) -> Factor:
    """Return lora_down repeated over the kernel: the trainer adds one number to a whole kernel."""
    kernel = shape[2:]
    if all(size == 1 for size in kernel):
        return down
    single, repeated = (*down.shape, *(1 for _ in kernel)), (*down.shape, *kernel)
    return Factor(down.dtype, repeated, lambda: np.broadcast_to(down.load().reshape(single), repeated).copy())


def _embeddings(header: Header) -> Iterator[Embedding]:
    present = [key for key in EMBEDDING_KEYS if key in header.tensors]
    if not present:
        return
    if len(present) == 1:
        raise LayoutError(f"{header.path}: expected both {' and '.join(EMBEDDING_KEYS)}, found {present[0]} alone")
    rows, where = (header.tensors[key] for key in EMBEDDING_KEYS)
    if len(rows.shape) != 2 or where.shape != rows.shape[:1] or where.dtype != "I64":
        raise LayoutError(
            f"{header.path}: embeddings: expected rows [n, width] and I64 indices [n], "
            f"found {list(rows.shape)} and {where.dtype} {list(where.shape)}"
        )
    values = tuple(int(index) for index in np.frombuffer(F.read_bytes(where), "<i8"))
    if min(values, default=0) < 0:
        raise LayoutError(f"{header.path}: embeddings.indices: expected rows from 0, found {min(values)}")
    source = Factor("I64", where.shape, lambda: np.asarray(values, np.float64), where)
    yield Embedding("tokens", F.stored(EMBEDDING_KEYS[0], rows), source, values)


def stability_tensors(
    adapters: Mapping[str, Adapter], unet: UNetConfig, filters: Sequence[str]
) -> tuple[dict[str, Factor], list[str]]:
    """Return the tensors of the list, and a line for each module that has no place in it.

    q, k and v become one pair: side by side in the rank, or of one rank if their lora_down is the same. The trainer's
    loader has one rank for all entries, so smaller factors are filled up with zeros. Modules that the filters select
    but the LoRA does not change get zeros."""
    reasons = {module: _unfit(adapter) for module, adapter in adapters.items()}
    entries = listed_weights(unet, filters)
    selected = {module for entry in entries for module in entry.modules}
    for module in adapters.keys() - selected:
        reasons[module] = reasons[module] or f"not among the modules matching {' '.join(filters)}"
    fit = {module: adapter for module, adapter in adapters.items() if reasons[module] is None}
    refused = [f"{module}: {reason}" for module, reason in reasons.items() if reason]
    if not fit:
        return {}, refused
    blocks = [[fit.get(module) for module in entry.modules] for entry in entries]
    downs = [_downs(parts) for parts in blocks]
    rank = max(sum(down.shape[0] for down in each) for each in downs)
    tensors: dict[str, Factor] = {}
    for index, (rows, columns) in enumerate(entry.shape[:2] for entry in entries):
        parts, no_change = blocks[index], F.zeros((rows // len(blocks[index]), 0))
        down = F.stacked(downs[index]) if downs[index] else F.zeros((0, columns))
        ups = [F.scaled(_matrix(a, "lora_up"), a.scale * rank) if a else no_change for a in parts]
        shared = all(parts) and len(downs[index]) == 1
        up = F.stacked(ups) if shared else F.block_diagonal(ups)
        tensors[f"weights.{index}.lora_down"] = F.padded(down, (rank, columns))
        tensors[f"weights.{index}.lora_up"] = F.padded(up, (rows, rank))
    return tensors, refused


def _unfit(adapter: Adapter) -> str | None:
    if adapter.algorithm is not Algorithm.LORA or adapter.magnitude is not None:
        return f"the format holds LoRA only, this is {'DoRA' if adapter.magnitude else adapter.algorithm}"
    if "lora_mid" in adapter.factors or any(size != 1 for size in adapter.shape[2:]):
        return "the format holds no kernel larger than 1x1"
    return None


def _downs(adapters: Sequence[Adapter | None]) -> list[Factor]:
    """Return the lora_down of the blocks of one entry: one for all when they have the same, else those there are."""
    downs = [_matrix(adapter, "lora_down") for adapter in adapters if adapter is not None]
    shared = len(downs) == len(adapters) and all(_equal(downs[0], down) for down in downs[1:])
    return downs[:1] if shared else downs


def _matrix(adapter: Adapter, name: str) -> Factor:
    factor = adapter.factors[name]
    return F.reshaped(factor, factor.shape[:2])


def _equal(a: Factor, b: Factor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(np.array_equal(a.load(), b.load()))
