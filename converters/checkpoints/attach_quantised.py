"""Gives quantised weights their scales, whichever program quantised them."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...schemas.errors import CheckpointError, LayoutError
from ...schemas.folders import QUANTIZATION
from ...schemas.json_text import load_object
from ...storage.safetensors_reader import Header
from .attach_bitsandbytes import attach_bitsandbytes
from .attach_scales import attach_scales
from .attach_sdnq import attach_sdnq
from .attach_torchao import attach_torchao

CONFIG, OWN_CONFIG = "config.json", "quantization_config.json"
METHODS: Mapping[str, str] = {"sdnq": "SDNQ", "torchao": "torchao", "bitsandbytes": "bitsandbytes"}  # quant_method


def attach_quantised(header: Header) -> tuple[Header, list[str]]:
    """Give each quantised weight its scales, and remove the tensors that only describe them.

    Returns the header and notes for the user. Raises LayoutError for a format that is not read and for scales that are
    missing or do not fit, CheckpointError for a description that cannot be read."""
    settings = _settings(header)
    method = settings.get("quant_method") if settings else None
    if settings and method not in METHODS:
        raise LayoutError(
            f"{header.path}: quantised by {method}, which is not supported ({QUANTIZATION} of {CONFIG}); expected one "
            f"of {', '.join(METHODS)}; get the checkpoint in bf16, fp16 or fp32"
        )
    header, notes = attach_scales(header)
    for attach in (attach_torchao, attach_bitsandbytes):
        header, kinds = attach(header)
        notes += _notes(header, attach.__name__.removeprefix("attach_"), kinds)
    header, kinds = attach_sdnq(header, settings if method == "sdnq" else None)
    return header, [*notes, *_notes(header, "SDNQ", kinds)]


def _notes(header: Header, program: str, kinds: Mapping[str, str]) -> list[str]:
    shown = " and ".join(f"{count} weights in {kind}" for kind, count in Counter(kinds.values()).items())
    return [f"{header.path}: quantised by {program}: {shown} have scales, which a cast multiplies in"] if kinds else []


def _settings(header: Header) -> dict[str, Any] | None:
    """Return the settings of a quantisation in the files beside the weights; None where there are none.

    A config.json that cannot be read is refused where the network's config is read from it."""
    for name in (OWN_CONFIG, CONFIG):
        path = header.path.with_name(name)
        try:
            content = load_object(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, ValueError) as error:
            if name == OWN_CONFIG:
                raise CheckpointError(f"{path}: not readable as JSON: {error}; download it again") from error
            continue
        settings = content if name == OWN_CONFIG else content.get(QUANTIZATION)
        if settings and isinstance(settings, dict):
            return settings
    return None
