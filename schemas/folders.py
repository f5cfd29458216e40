"""Folders of components: the trees that diffusers writes, and the names of the weights files in them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .stages import CONTROLNETS, Stage

# The files that mark a model folder, whole or modular (of diffusers).
MODEL_INDEX = "model_index.json"
QUANTIZATION = "quantization_config"  # the key of a config.json
MODULAR_INDEX = "modular_model_index.json"  # of diffusers' modular pipelines
MODULAR_FILES = (MODULAR_INDEX, "modular_config.json", "block.py")
MODEL_INDEXES = (MODEL_INDEX, MODULAR_INDEX)
MANIFEST_NAME = "cascade.json"  # of a bundle, see `manifest`
BUNDLE_FORMAT = "cascadekit-bundle"
TRITON_INDEX = "cascadekit-triton.json"  # marks a model repository for Triton, and lists its files
TRITON_FORMAT = "cascadekit-triton"


@dataclass(frozen=True)
class ComponentFolder:
    """A folder that may hold the component of `stage`. When several exist, the first one in PLACES is taken."""

    folder: str
    stage: Stage
    lite: bool = False


# Folders of the published repositories, of the model folder written here, and of the combined pipeline, which prefixes
# the prior's components.
PLACES: tuple[ComponentFolder, ...] = (
    *(ComponentFolder(str(stage), stage) for stage in Stage),
    ComponentFolder("prior_prior", Stage.PRIOR),
    ComponentFolder("prior_image_encoder", Stage.IMAGE_ENCODER),
    ComponentFolder("prior_text_encoder", Stage.TEXT_ENCODER),
    ComponentFolder("prior_lite", Stage.PRIOR, lite=True),
    ComponentFolder("decoder_lite", Stage.DECODER, lite=True),
)
# Stability's names of the files of single stages, without "_lite" and the suffix.
ORIGINAL_NAMES: Mapping[Stage, str] = {
    Stage.PRIOR: "stage_c",
    Stage.DECODER: "stage_b",
    Stage.VQGAN: "stage_a",
    **{stage: str(stage) for stage in (Stage.EFFNET_ENCODER, Stage.PREVIEWER, *CONTROLNETS)},
}
TOKENIZER_FOLDERS = ("tokenizer", "prior_tokenizer")

STEMS = ("diffusion_pytorch_model", "model")  # diffusers' name for weights, transformers' name
VARIANTS = ("", "fp32", "bf16", "fp16")  # in the order of preference when none is given

# Folders of the combined pipeline for components that only the prior needs.
COMBINED_FOLDERS: Mapping[str, str] = {
    "prior": "prior_prior",
    "image_encoder": "prior_image_encoder",
    "feature_extractor": "prior_feature_extractor",
}


WEIGHTS_SUFFIXES = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".pkl")  # in lower case
FORMATS = ("safetensors", "bin")  # of a component's weights, in the order of preference

# Patterns of file names -> why such a file is not read. The first pattern that fits counts.
STRAY_NAMES: Mapping[str, str] = {
    r"\._.*": "a Mac's file attributes, not a file of its own",
    r"\.DS_Store|Thumbs\.db|desktop\.ini": "a file browser's settings",
    r".*\.(part|partial|crdownload|download|opdownload|incomplete|aria2|tmp|temp|!qb)": (
        "a download that was not finished"
    ),
    r"(.*[._-])?(optim(izer)?(_states?)?|scheduler|scaler|rng_state\w*|random_states?(_\d+)?|training_state\w*)"
    r"([._-]\d+)?\.(pt|pth|bin|pkl|ckpt|safetensors)": "training state, not weights",
    r".*\.(onnx|h5|msgpack|npz|tflite|engine|plan)": "weights in a format that is not read here",
}

_STEM = r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)"
_WEIGHTS = re.compile(
    _STEM + r"(?:\.(?P<early>\w+?))?(?:-(?P<number>\d{1,6})-of-(?P<count>\d{1,6}))?(?:\.(?P<late>\w+))?"
    r"\.(?P<format>safetensors|bin)",
    re.IGNORECASE,
)
_INDEX = re.compile(
    _STEM + r"(?:\.(?P<early>\w+?))?\.(?P<format>safetensors|bin)\.index(?:\.(?P<late>\w+))?\.json", re.IGNORECASE
)


@dataclass(frozen=True)
class WeightsName:
    """The facts in the name of a component's weights file, or of the index of its shards."""

    variant: str
    format: str
    is_index: bool = False
    number: int = 0  # of the shard, from 1; 0 for a whole file
    count: int = 0  # of the shards; 0 for a whole file


def read_weights_name(name: str) -> WeightsName | None:
    """Read the name of a weights file. None for a name that neither diffusers nor transformers use for weights."""
    for pattern, is_index in ((_INDEX, True), (_WEIGHTS, False)):
        if match := pattern.fullmatch(name):
            fields = match.groupdict()
            variant = (fields["early"] or fields["late"] or "").lower()
            numbers = (int(fields.get("number") or 0), int(fields.get("count") or 0))
            return WeightsName(variant, fields["format"].lower(), is_index, *numbers)
    return None


def stray_kind(name: str) -> str | None:
    """Return why a file of this name is not a component; None when the name shows nothing."""
    return next((what for pattern, what in STRAY_NAMES.items() if re.fullmatch(pattern, name, re.IGNORECASE)), None)


def preferred_variants(found: Iterable[str], asked: str | None) -> list[str]:
    """Return variants in the order of preference: the variant asked for, then VARIANTS, then others that were found."""
    first = [] if asked is None else [asked.lower()]
    return list(dict.fromkeys([*first, *VARIANTS, *sorted(found)]))


def weights_names(stem: str, variant: str) -> tuple[str, str]:
    """Return the name of a component's single weights file, and the name of the index of its shards."""
    infix = f".{variant}" if variant else ""
    return f"{stem}{infix}.safetensors", f"{stem}.safetensors.index{infix}.json"


def shard_name(stem: str, variant: str, number: int, count: int) -> str:
    """Return the name of shard `number` (from 1) of `count`. The variant comes before the number."""
    infix = f".{variant}" if variant else ""
    return f"{stem}{infix}-{number:05d}-of-{count:05d}.safetensors"


def parse_size(text: str) -> int:
    """Return the number of bytes in "10GB", "500MB" or "123". Units are decimal, as in diffusers.

    Raises ValueError for any other text."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()]) if match else 0
    if not size:
        raise ValueError(f"{text!r}: expected a size such as 10GB or 500MB")
    return size
