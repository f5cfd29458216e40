"""Reads a LoRA file of any known format into adapters by diffusers names."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

from ...schemas.errors import CascadeError, CheckpointError, LayoutError, UsageError
from ...schemas.lora_keys import Algorithm, LoraFormat, LoraTarget, Prefix, changeable
from ...schemas.messages import listed, listed_below
from ...schemas.stages import NetworkConfig, TextEncoderConfig, UNetConfig
from ...schemas.tensors import Shape
from ...storage.open_file import require_exists
from ...storage.safetensors_reader import Header
from ...storage.weights_file import read_weights
from ..checkpoints.open_model import open_model
from .adapters import Adapter, make_adapter, split_rows
from .factors import Factor, scaled
from .lora_file import Lora, candidates, describe
from .peft_config import Configs, find_configs
from .read_keys import Group, NameTable, format_of, group_keys, is_factor_key
from .stability_format import DEFAULT_FILTERS, is_stability, read_stability

# Names of a LoRA's file in a folder: those of PEFT, of diffusers, and of OneTrainer's backups.
FOLDER_NAMES = (
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "lora/lora.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.bin",
)
BIAS_FACTORS = {"diff_b", "bias_up"}  # the difference of a bias; PEFT's bias of lora_B, scaled like the product


def open_lora(
    path: str | Path,
    networks: Sequence[NetworkConfig] = (),
    *,
    module_filters: Sequence[str] = DEFAULT_FILTERS,
    alpha: float | None = None,
) -> Lora:
    """Read the LoRA in a file, or in a PEFT adapter's folder; factors are read later, when they are needed.

    `networks` are the configs of the checkpoint that the LoRA is for. Without them, the first released network that
    every key and shape fits is taken. `module_filters` are those of the training config, for Stability's format, which
    has no names. `alpha` is used when the file states none (None: the rank, so that the scale is 1).

    Raises CheckpointError for a damaged file, UsageError for a checkpoint, and LayoutError for a file that is no LoRA
    or not for these networks."""
    header = read_weights(_weights(Path(path)))
    if is_stability(header):
        return read_stability(header, networks, module_filters)
    states_alpha = any(key.endswith(".alpha") for key in header.tensors)
    settings = {} if states_alpha else find_configs(header.path, header.metadata)
    groups, embeddings = group_keys(header)
    if not groups and not embeddings:
        raise LayoutError(f"{header.path}: holds no tensors; expected a LoRA")
    source = Source(header, groups, settings, alpha)
    attempt = _best(source, networks)
    if attempt.problems:
        raise LayoutError(_refusal(source, attempt, networks))
    kind = format_of(attempt.prefixes, groups)
    return Lora(
        path=header.path,
        format=kind,
        adapters=attempt.adapters,
        unet=attempt.unet if any(target.stage is attempt.unet.stage for target in attempt.adapters) else None,
        embeddings=embeddings,
        metadata=header.metadata,
        notes=tuple(_notes(header, kind, list(attempt.adapters.values()))),
    )


def holds_lora(path: Path) -> bool:
    """Return whether `path` is a file with LoRA keys, or a folder with a LoRA's usual file name.

    Only the header is read: `open_lora` may still refuse the file. Raises CheckpointError for a damaged file."""
    if path.is_dir():
        return any((path / name).is_file() for name in FOLDER_NAMES)
    header = read_weights(path)
    return is_stability(header) or any(is_factor_key(key) for key in header.tensors)


def _weights(path: Path) -> Path:
    require_exists(path)
    if not path.is_dir():
        return path
    for name in FOLDER_NAMES:
        if (path / name).is_file():
            return path / name
    _refuse_model(path)
    raise CheckpointError(f"{path}: no LoRA here; expected one of {', '.join(FOLDER_NAMES)} in the folder")


def _refuse_model(path: Path) -> None:
    try:
        found = open_model([path]).components
    except CascadeError:
        return
    raise UsageError(
        f"{path}: expected a LoRA, found a checkpoint: {', '.join(found)}; give the checkpoint first, then its LoRAs"
    )


@dataclass(frozen=True)
class Source:
    """A LoRA file: its keys by module, its settings, and the alpha to use when the file states none."""

    header: Header
    groups: dict[str, Group]
    settings: Configs
    alpha: float | None


@dataclass
class Attempt:
    """A file read as being for one pair of networks, which is named by its UNet."""

    unet: UNetConfig
    adapters: dict[LoraTarget, Adapter] = field(default_factory=dict)
    prefixes: list[Prefix] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unnamed: int = 0  # problems that are names the networks do not have


def _best(source: Source, networks: Sequence[NetworkConfig]) -> Attempt:
    """Return the first attempt without problems, else the one with the fewest."""
    attempts = []
    for unet, text_encoder in product(candidates(UNetConfig, networks), candidates(TextEncoderConfig, networks)):
        attempts.append(_attempt(source, unet, text_encoder))
        if not attempts[-1].problems:
            break
    return min(attempts, key=lambda attempt: len(attempt.problems))


def _attempt(source: Source, unet: UNetConfig, text_encoder: TextEncoderConfig) -> Attempt:
    names = NameTable(unet, text_encoder)
    shapes = {**_shapes(unet), **_shapes(text_encoder)}
    result, network = Attempt(unet), describe(unet)
    claimed: dict[LoraTarget, str] = {}
    for name, group in source.groups.items():
        found = names.find(name)
        if found is None:
            result.unnamed += 1
            result.problems.append(f"{name}: no such module in {network}")
            continue
        prefix, targets = found
        result.prefixes.append(prefix)
        try:
            adapters = dict(_adapters(group, targets, shapes, source))
        except LayoutError as error:
            result.problems.append(f"{name}: {error}")
            continue
        for target, adapter in adapters.items():
            if target in claimed:
                result.problems.append(f"{name}: changes {target.name}, which {claimed[target]} changes already")
            claimed[target] = name
            result.adapters[target] = adapter
    return result


@lru_cache(maxsize=32)
def _shapes(config: NetworkConfig) -> Mapping[LoraTarget, Shape]:
    """Return the shape of every weight and bias of a network."""
    parts = ((name.rpartition("."), shape) for name, shape in changeable(config).items())
    return {LoraTarget(config.stage, module, parameter): shape for (module, _, parameter), shape in parts}


def _adapters(
    group: Group, targets: Sequence[LoraTarget], shapes: Mapping[LoraTarget, Shape], source: Source
) -> Iterator[tuple[LoraTarget, Adapter]]:
    """Yield the adapter of each weight and bias that a group changes. Several targets are q, k and v in one tensor."""
    weight = {name: factor for name, factor in group.factors.items() if name not in BIAS_FACTORS}
    scale = 1.0
    if weight or not group.factors:
        joined = _weight_adapter(group, weight, _joined(shapes, targets), targets[0], source)
        scale = joined.scale
        yield from zip(targets, _split_adapter(joined, len(targets)), strict=True)
    biases = [target._replace(parameter="bias") for target in targets]
    for name in BIAS_FACTORS & group.factors.keys():
        if biases[0] not in shapes:
            raise LayoutError(f"expected no change of a bias ({name}), as the module has none")
        factor = group.factors[name]
        change = {"diff": scaled(factor, scale) if name == "bias_up" else factor}
        joined = make_adapter(change, None, _joined(shapes, biases))
        yield from zip(biases, _split_adapter(joined, len(biases)), strict=True)


def _joined(shapes: Mapping[LoraTarget, Shape], targets: Sequence[LoraTarget]) -> Shape:
    shape = shapes[targets[0]]
    return (len(targets) * shape[0], *shape[1:])


def _split_adapter(adapter: Adapter, parts: int) -> list[Adapter]:
    return [adapter] if parts == 1 else split_rows(adapter, parts)


def _weight_adapter(
    group: Group, factors: Mapping[str, Factor], shape: Shape, target: LoraTarget, source: Source
) -> Adapter:
    if group.reshape not in (None, shape):
        raise LayoutError(f"expected a weight {list(shape)}, found reshape_weight, which enlarges it")
    adapter = make_adapter(factors, group.alpha, shape)
    settings = source.settings.get(target.stage, source.settings.get(None))
    if settings and settings.use_dora and adapter.magnitude is None:
        raise LayoutError("expected a lora_magnitude_vector, as the settings say use_dora, found none")
    if group.alpha is not None or adapter.algorithm is Algorithm.FULL:
        return adapter
    if adapter.rank is not None:
        stated = settings.alpha(target.module, adapter.rank) if settings and source.alpha is None else source.alpha
        return replace(adapter, alpha=stated or None)
    if settings:  # PEFT scales a LoKr of two whole matrices too
        first = scaled(adapter.factors["lokr_w1"], settings.scale(target.module))
        return replace(adapter, factors={**adapter.factors, "lokr_w1": first})
    return adapter


def _notes(header: Header, kind: LoraFormat, adapters: Sequence[Adapter]) -> Iterator[str]:
    if kind is LoraFormat.PEFT and any(adapter.rank and adapter.alpha is None for adapter in adapters):
        yield (
            f"{header.path}: states no alpha and has no adapter_config.json beside it; "
            "alpha is taken to be the rank (give alpha=NUMBER if it was another)"
        )
    folded = [a for a in adapters if a.folded and a.algorithm is Algorithm.LORA and a.magnitude is None]
    if folded:
        yield (
            f"{header.path}: {len(folded)} depthwise convolutions were trained by a plain LoRA whose own forward pass "
            "(one row for all channels) no change of a weight has; the product folded into the weight is merged, as "
            "ComfyUI does it and as the same trainer's DoRA and LoHa do"
        )


def _refusal(source: Source, attempt: Attempt, networks: Sequence[NetworkConfig]) -> str:
    """Return why a file cannot be read as a LoRA for these networks, and the network that it seems to be for."""
    path, groups = source.header.path, source.groups
    if attempt.unnamed == len(groups):
        names = listed(list(groups))
        return (
            f"{path}: not a LoRA for Stable Cascade; none of its {len(groups)} modules is one of "
            f"{describe(attempt.unet)} or of the text encoder ({names}). Is it for another model?"
        )
    elsewhere = _best(source, ()) if networks else attempt
    if elsewhere.problems:
        advice = "It fits none of the released networks; get the LoRA made for Stable Cascade, or a whole copy of it."
    else:
        fits = describe(elsewhere.unet)
        advice = f"It fits {fits}: give a checkpoint of that, or get the LoRA made for {describe(attempt.unet)}."
    count = f"{len(attempt.problems)} of {len(groups)} modules"
    return f"{path}: not for {describe(attempt.unet)}: {count}:{listed_below(attempt.problems)}\n{advice}"
