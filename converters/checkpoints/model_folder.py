"""The files of a model folder (the diffusers tree) that are not weights: configs, pipeline index, tokenizer."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.text.tokenizer_file import LIST_NAMES, NAMES, WHOLE_NAME, TokenizerFile, save_tokenizer_folder
from ...schemas.config_json import DIFFUSERS_VERSION, to_json
from ...schemas.errors import CheckpointError, ConversionError
from ...schemas.folders import COMBINED_FOLDERS, MODEL_INDEX, QUANTIZATION
from ...schemas.limits import MAX_TOKENIZER_BYTES
from ...schemas.messages import listed
from ...schemas.stages import NetworkConfig, Stage
from .provenance import lies_in

TOKENIZER_FOLDER = "tokenizer"  # in a bundle and in a model folder

SCHEDULER = {
    "_class_name": "DDPMWuerstchenScheduler",
    "_diffusers_version": DIFFUSERS_VERSION,
    "s": 0.008,
    "scaler": 1.0,
}

# The input of CLIP ViT-L/14: 224 pixels, bicubic (resample 3), with the mean and deviation of each channel.
FEATURE_EXTRACTOR = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 224},
}

# Entries of model_index.json: the library and the class that load each component. The vqgan's library is the name of
# a pipeline module, which is the only spelling that every version of diffusers loads.
INDEX_ENTRIES: Mapping[str, tuple[str, str]] = {
    "prior": ("diffusers", "StableCascadeUNet"),
    "decoder": ("diffusers", "StableCascadeUNet"),
    "vqgan": ("wuerstchen", "PaellaVQModel"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizerFast"),
    "scheduler": ("diffusers", "DDPMWuerstchenScheduler"),
    "feature_extractor": ("transformers", "CLIPImageProcessor"),
}

# Components that the prior pipeline works without. Their entries are null when the folder lacks them.
OPTIONAL = ("image_encoder", "feature_extractor")
# The keys of the combined pipeline's index, and the component that each stands for.
COMBINED: Mapping[str, str] = {
    **{name: name for name in ("tokenizer", "text_encoder", "decoder", "scheduler", "vqgan")},
    **{f"prior_{name}": name for name in ("prior", "text_encoder", "tokenizer", "scheduler", *OPTIONAL)},
}


def write_folder_files(
    folder: Path,
    configs: Mapping[Stage, NetworkConfig],
    *,
    index: bool,
    combined: bool = False,
    quantization: Mapping[Stage, Mapping[str, Any]] | None = None,
) -> None:
    """Write config.json for each stage, and the feature extractor's settings for an image encoder.

    `quantization` has the settings of stages whose weights are quantised.
    With `index`, also write the files that a pipeline loads: scheduler, tokenizer and model_index.json."""
    for stage, config in configs.items():
        for name in component_folders(stage, combined=combined):
            settings = (quantization or {}).get(stage)
            extra = {QUANTIZATION: dict(settings)} if settings else {}
            write_json(folder / name / "config.json", to_json(config) | extra)
    if Stage.IMAGE_ENCODER in configs:
        name = COMBINED_FOLDERS["feature_extractor"] if combined else "feature_extractor"
        write_json(folder / name / "preprocessor_config.json", FEATURE_EXTRACTOR)
    if index:
        write_pipeline_parts(folder, combined=combined)
        write_json(folder / MODEL_INDEX, model_index(configs, combined=combined))


def write_pipeline_parts(folder: Path, *, combined: bool = False) -> None:
    """Write the tokenizer and the scheduler."""
    for prefix in ("", "prior_") if combined else ("",):
        save_tokenizer_folder(folder / f"{prefix}tokenizer")
        write_json(folder / f"{prefix}scheduler" / "scheduler_config.json", SCHEDULER)


def component_folders(stage: Stage, *, combined: bool = False) -> tuple[str, ...]:
    """Return the folders for a component's files. The combined pipeline has the text encoder twice."""
    if not combined:
        return (str(stage),)
    if stage is Stage.TEXT_ENCODER:
        return (str(stage), f"prior_{stage}")
    return (COMBINED_FOLDERS.get(stage, str(stage)),)


def model_index(configs: Mapping[Stage, NetworkConfig], *, combined: bool) -> dict[str, Any]:
    """Return the pipeline index of a folder with these stages.

    A folder with prior and decoder has the entries of both pipelines: StableCascadePriorPipeline and
    StableCascadeDecoderPipeline both load it, each with its own entries. The index of a `combined` folder is for
    StableCascadeCombinedPipeline, which names the prior's components with a prefix."""
    optional = OPTIONAL if Stage.PRIOR in configs else ()
    present = {*map(str, configs), "tokenizer", "scheduler", *optional}
    components = COMBINED if combined else {name: name for name in INDEX_ENTRIES if name in present}
    numbers = {Stage.PRIOR: ("resolution_multiple", 42.67), Stage.DECODER: ("latent_dim_scale", 10.67)}
    pipeline = "Combined" if combined else "Decoder" if Stage.DECODER in configs else "Prior"
    absent = OPTIONAL if Stage.IMAGE_ENCODER not in configs else ()
    return {
        "_class_name": f"StableCascade{pipeline}Pipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        **{key: [None, None] if name in absent else [*INDEX_ENTRIES[name]] for key, name in components.items()},
        **dict(number for stage, number in numbers.items() if stage in configs and not combined),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` into a file, whose folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class OwnTokenizer:
    """A model's own tokenizer after all checks: its content, its files, and notes for the user."""

    content: TokenizerFile
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def check_tokenizer(folder: Path | None, rows: int | None) -> OwnTokenizer | None:
    """Read and check the tokenizer in `folder`, for a text encoder with `rows` tokens (None: no encoder).

    Returns None when there is no folder or no tokenizer in it; the tokenizer of this package is used then.
    Raises CheckpointError for a tokenizer that is not CLIP's, and for tokens without a row in the text encoder. Links
    out of the folder and files above MAX_TOKENIZER_BYTES are refused too."""
    if folder is None or not any((folder / name).exists() for name in (WHOLE_NAME, LIST_NAMES[0])):
        return None
    files = tuple(folder / name for name in NAMES if (folder / name).exists() or (folder / name).is_symlink())
    for path in files:
        if not lies_in(path, folder):
            raise CheckpointError(
                f"{path}: expected a file in this folder, found a link that leads out of it or no regular file; put "
                "the file itself there"
            )
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(
                f"{path}: expected at most {MAX_TOKENIZER_BYTES} bytes, it has {path.stat().st_size}; give CLIP's own"
            )
    from ...runtime.text.tokenizer import read_checked  # imports numpy and tokenizers

    content = read_checked(folder, rows)
    return OwnTokenizer(content, files, (*_notes_on_other_files(folder), *_notes_on_rows(folder, content, rows)))


def _notes_on_other_files(folder: Path) -> Iterator[str]:
    others = sorted(path.name for path in folder.iterdir() if path.name not in NAMES)
    if others:
        yield f"{folder}: not a tokenizer's files, left out: {listed(others)}"


def _notes_on_rows(folder: Path, content: TokenizerFile, rows: int | None) -> Iterator[str]:
    known = 1 + max(content.added.values(), default=0)
    if rows is not None and content.added and known < rows:
        yield f"{folder}: its tokens end at {known}, the text encoder has {rows} rows; no prompt reaches the others"


def write_tokenizer(tokenizer: OwnTokenizer | None, root: Path) -> Path | None:
    """Write the bundle's tokenizer.json, which holds everything in the model's tokenizer files.

    Returns its path, or None without a tokenizer."""
    if tokenizer is None:
        return None
    path = root / TOKENIZER_FOLDER / WHOLE_NAME
    path.parent.mkdir()
    path.write_bytes(tokenizer.content.text.encode())
    return path


def copy_tokenizer(tokenizer: OwnTokenizer, target: Path) -> None:
    """Copy the tokenizer's files into the folder `target`, in place of all files there.

    Raises ConversionError when a file cannot be copied."""
    target.mkdir(exist_ok=True)
    try:
        for old in target.iterdir():
            old.unlink()
        for path in tokenizer.files:
            (target / path.name).write_bytes(path.read_bytes())
    except OSError as error:
        raise ConversionError(f"{error.filename}: the tokenizer cannot be copied: {error.strerror}") from error
