"""Reads a LoRA file of any known format into adapters by diffusers names."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...schemas.errors import CheckpointError, LayoutError, UsageError
from ...schemas.lora import LoraFormat, Prefix, Target, lora_modules
from ...schemas.stages import NetworkConfig, Stage, TextEncoderConfig, UNetConfig
from ..safetensors_file import Header, read_header
from .adapters import Adapter, make_adapter, split_rows
from .keys import Group, Keys, NameTable, format_of, group_keys, is_factor_key
from .lora_file import Lora, candidate_text_encoders, candidate_unets, describe, listed
from .peft_config import PeftConfig, find_config
from .stability import DEFAULT_FILTERS, is_stability, read_stability

FOLDER_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # PEFT's name, diffusers' name


def open_lora(
    path: str | Path,
    networks: Sequence[NetworkConfig] = (),
    *,
    module_filters: Sequence[str] = DEFAULT_FILTERS,
    alpha: float | None = None,
) -> Lora:
    """Read the LoRA in a file, or in a PEFT adapter's folder; factors are read later, when they are needed.

    `networks` are the configs of the checkpoint it is for; without them the released networks are tried, and the
    first that every key and shape fits is taken. `module_filters` are the trainer's, for Stability's format, which
    has no names. `alpha` counts where the file states none (else: the rank, so a scale of 1).

    Raises CheckpointError for a damaged file, LayoutError for one that is no LoRA or not for these networks."""
    header = read_header(_weights(Path(path)))
    if is_stability(header):
        return read_stability(header, networks, module_filters)
    keys = group_keys(header)
    if not keys.groups and not keys.embeddings:
        raise LayoutError(f"{header.path}: holds no tensors; expected a LoRA")
    attempt = _best(header, keys, networks, alpha)
    if attempt.problems:
        raise LayoutError(_refusal(header, attempt, keys, networks, alpha))
    return _lora(header, keys, attempt)


def holds_lora(path: Path) -> bool:
    """Whether `path` is a file of LoRA keys, or a folder with a LoRA's usual file name; from the header alone.

    Says nothing about whether `open_lora` can read it. Raises CheckpointError for a damaged file."""
    if path.is_dir():
        return any((path / name).is_file() for name in FOLDER_NAMES)
    header = read_header(path)
    return is_stability(header) or any(is_factor_key(key) for key in header.tensors)


def _weights(path: Path) -> Path:
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    if not path.is_dir():
        return path
    for name in FOLDER_NAMES:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path}: no LoRA here; expected {' or '.join(FOLDER_NAMES)} in the folder")


@dataclass(frozen=True)
class Attempt:
    """A file read as being for one pair of networks."""

    unet: UNetConfig
    text_encoder: TextEncoderConfig
    adapters: dict[Target, Adapter]
    prefixes: list[Prefix]
    problems: list[str]
    unnamed: int  # problems that are names the networks do not have


def _best(header: Header, keys: Keys, networks: Sequence[NetworkConfig], alpha: float | None) -> Attempt:
    """The reading with the fewest problems, the first of equals."""
    attempts = (
        _attempt(header, keys, unet, text_encoder, alpha)
        for unet in candidate_unets(networks)
        for text_encoder in candidate_text_encoders(networks)
    )
    return min(_until_sound(attempts), key=lambda attempt: len(attempt.problems))


def _until_sound(attempts: Iterator[Attempt]) -> Iterator[Attempt]:
    for attempt in attempts:
        yield attempt
        if not attempt.problems:
            return


def _attempt(
    header: Header, keys: Keys, unet: UNetConfig, text_encoder: TextEncoderConfig, alpha: float | None
) -> Attempt:
    names = NameTable(unet, text_encoder)
    shapes = {Target(c.stage, m): shape for c in (unet, text_encoder) for m, shape in lora_modules(c).items()}
    settings = find_config(header.path, header.metadata) if _states_no_alpha(keys) else None
    result = Attempt(unet, text_encoder, {}, [], [], 0)
    claimed: dict[Target, str] = {}
    unnamed = 0
    for name, group in keys.groups.items():
        found = names.find(name)
        if found is None:
            unnamed += 1
            result.problems.append(f"{name}: no such module in {describe(unet)}")
            continue
        prefix, targets = found
        result.prefixes.append(prefix)
        try:
            adapters = _adapters(group, targets, shapes, alpha, settings)
        except LayoutError as error:
            result.problems.append(f"{name}: {error}")
            continue
        for target, adapter in zip(targets, adapters, strict=True):
            if target in claimed:
                result.problems.append(f"{name}: changes {target.module}, which {claimed[target]} changes already")
            claimed[target] = name
            result.adapters[target] = adapter
    return replace(result, unnamed=unnamed)


def _states_no_alpha(keys: Keys) -> bool:
    return all(group.alpha is None for group in keys.groups.values())


def _adapters(
    group: Group,
    targets: tuple[Target, ...],
    shapes: Mapping[Target, tuple[int, ...]],
    alpha: float | None,
    settings: PeftConfig | None,
) -> list[Adapter]:
    shape = shapes[targets[0]]
    joined = make_adapter(group.factors, group.alpha, (len(targets) * shape[0], *shape[1:]))
    if group.alpha is None and joined.rank is not None:
        stated = settings.alpha(targets[0].module, joined.rank) if settings and alpha is None else alpha
        joined = replace(joined, alpha=stated or None)
    return [joined] if len(targets) == 1 else split_rows(joined, len(targets))


def _lora(header: Header, keys: Keys, attempt: Attempt) -> Lora:
    stages = {target.stage for target in attempt.adapters}
    kind = format_of(attempt.prefixes, keys.groups)
    return Lora(
        header.path,
        kind,
        attempt.adapters,
        attempt.unet if attempt.unet.stage in stages else None,
        attempt.text_encoder if Stage.TEXT_ENCODER in stages else None,
        keys.embeddings,
        header.metadata,
        tuple(_alpha_notes(header, kind, attempt)),
    )


def _alpha_notes(header: Header, kind: LoraFormat, attempt: Attempt) -> Iterator[str]:
    if kind is LoraFormat.PEFT and any(adapter.alpha is None for adapter in attempt.adapters.values()):
        yield (
            f"{header.path}: states no alpha and has no adapter_config.json beside it; "
            "alpha is taken to be the rank (give --alpha if it was another)"
        )


def _refusal(
    header: Header, attempt: Attempt, keys: Keys, networks: Sequence[NetworkConfig], alpha: float | None
) -> str:
    """Why a file cannot be read as a LoRA for these networks, and what it seems to be for."""
    if attempt.unnamed == len(keys.groups):
        names = listed(list(keys.groups), ", ")
        return (
            f"{header.path}: not a LoRA for Stable Cascade; none of its {len(keys.groups)} modules is one of "
            f"{describe(attempt.unet)} or of the text encoder ({names}). Is it for another model?"
        )
    elsewhere = _best(header, keys, (), alpha) if networks else attempt
    if elsewhere.problems:
        advice = "The file is damaged or made by a program unknown here; get it again from its source."
    else:
        fits = describe(elsewhere.unet)
        advice = f"It fits {fits}: give a checkpoint of that, or get the LoRA made for {describe(attempt.unet)}."
    count = f"{len(attempt.problems)} of {len(keys.groups)} modules"
    return f"{header.path}: not for {describe(attempt.unet)}: {count}:\n  {listed(attempt.problems)}\n{advice}"
