"""Gives quantised weights their scales, whichever program quantised them."""

from collections import Counter
from typing import Any

from ...schemas.errors import CheckpointError, LayoutError
from ...schemas.folders import QUANTIZATION
from ...schemas.json_text import load_object
from ...schemas.quantised_facts import format_name
from ...storage.safetensors_reader import Header
from .attach_bitsandbytes import attach_bitsandbytes
from .attach_scales import attach_scales
from .attach_sdnq import attach_sdnq
from .attach_torchao import attach_torchao

CONFIG, OWN_CONFIG = "config.json", "quantization_config.json"
METHODS = ("sdnq", "torchao", "bitsandbytes")  # values of quant_method


def attach_quantised(header: Header) -> tuple[Header, list[str]]:
    """Give each quantised weight its scales, and remove the tensors that only describe them.

    Returns the header and notes for the user. Raises LayoutError for a format that is not read and for scales that are
    missing or do not fit. Raises CheckpointError for a description that cannot be read."""
    settings = _settings(header)
    method = settings.get("quant_method")
    if settings and method not in METHODS:
        raise LayoutError(
            f"{header.path}: quantised by {method}, which is not supported ({QUANTIZATION} of {CONFIG}); expected one "
            f"of {', '.join(METHODS)}; get the checkpoint in bf16, fp16 or fp32"
        )
    header, notes = attach_scales(header)
    header = attach_bitsandbytes(attach_torchao(header))
    header = attach_sdnq(header, settings if method == "sdnq" else {})
    formats = Counter(str(format_name(each.scale.kind, "")) for each in header.tensors.values() if each.scale)
    for name, count in formats.items():
        program, _, kind = name.partition(" ")
        what = f"quantised by {program}: {count} weights in {kind} have scales, which a cast multiplies in"
        notes.append(f"{header.path}: {what}")
    return header, notes


def _settings(header: Header) -> dict[str, Any]:
    """Return the settings of a quantisation in the files beside the weights; none where there are none.

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
    return {}
