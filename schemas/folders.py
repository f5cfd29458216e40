"""How folders of components are laid out: the diffusers trees, and the names of their files."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .stages import Stage


@dataclass(frozen=True)
class Place:
    """A folder that may hold `stage`. Of several that exist the first listed is taken."""

    folder: str
    stage: Stage
    lite: bool = False


# The published repositories, our one tree, and the combined pipeline's folder, where prior parts have a prefix.
PLACES: tuple[Place, ...] = (
    *(Place(str(stage), stage) for stage in Stage),
    Place("prior_prior", Stage.PRIOR),
    Place("prior_image_encoder", Stage.IMAGE_ENCODER),
    Place("prior_text_encoder", Stage.TEXT_ENCODER),
    Place("prior_lite", Stage.PRIOR, lite=True),
    Place("decoder_lite", Stage.DECODER, lite=True),
)
TOKENIZER_FOLDERS = ("tokenizer", "prior_tokenizer")

STEMS = ("diffusion_pytorch_model", "model")  # diffusers' name for weights, transformers' name
VARIANTS = ("", "fp32", "bf16", "fp16")  # in the order they are taken when none is asked for

# Where the combined pipeline files what only the prior needs.
COMBINED_FOLDERS: Mapping[str, str] = {
    "prior": "prior_prior",
    "image_encoder": "prior_image_encoder",
    "feature_extractor": "prior_feature_extractor",
}


def weights_names(stem: str, variant: str) -> tuple[str, str]:
    """The name of a component's one weights file, and of the index of its shards."""
    infix = f".{variant}" if variant else ""
    return f"{stem}{infix}.safetensors", f"{stem}.safetensors.index{infix}.json"


def shard_name(stem: str, variant: str, number: int, count: int) -> str:
    """The name of shard `number` (from 1) of `count`; the variant comes before the number."""
    infix = f".{variant}" if variant else ""
    return f"{stem}{infix}-{number:05d}-of-{count:05d}.safetensors"


def parse_size(text: str) -> int:
    """Bytes in "10GB", "500MB" or "123"; decimal units, as in diffusers. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise ValueError(f"{text!r}: expected a size such as 10GB or 500MB")
    return int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()])
