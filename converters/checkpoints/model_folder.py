"""The files of a model folder ("modular", the diffusers tree) that are not weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...runtime.text.tokenizer import save_tokenizer_folder
from ...schemas.config_json import DIFFUSERS_VERSION, to_json
from ...schemas.folders import COMBINED_FOLDERS
from ...schemas.stages import NetworkConfig, Stage

SCHEDULER = {
    "_class_name": "DDPMWuerstchenScheduler",
    "_diffusers_version": DIFFUSERS_VERSION,
    "s": 0.008,
    "scaler": 1.0,
}

# What CLIP ViT-L/14 expects: 224 pixels, bicubic (resample 3), its own mean and deviation per channel.
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

# model_index.json: the library and class that load each component. The vqgan's library is a pipeline module's
# name: diffusers up to 0.37 finds it there, and later versions load no other spelling either.
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


# Components the prior pipeline can do without: null in an index whose folder has none.
OPTIONAL = ("image_encoder", "feature_extractor")


def write_folder_files(
    folder: Path, configs: Mapping[Stage, NetworkConfig], *, index: bool, combined: bool = False
) -> None:
    """Write config.json for each stage, and with `index` what makes the folder loadable as a pipeline:
    scheduler, tokenizer, feature extractor and model_index.json."""
    for stage, config in configs.items():
        for name in component_folders(stage, combined=combined):
            _write_json(folder / name / "config.json", to_json(config))
    if Stage.IMAGE_ENCODER in configs:
        name = COMBINED_FOLDERS["feature_extractor"] if combined else "feature_extractor"
        _write_json(folder / name / "preprocessor_config.json", FEATURE_EXTRACTOR)
    if index:
        for prefix in ("", "prior_") if combined else ("",):
            save_tokenizer_folder(folder / f"{prefix}tokenizer")
            _write_json(folder / f"{prefix}scheduler" / "scheduler_config.json", SCHEDULER)
        _write_json(folder / "model_index.json", combined_index(configs) if combined else model_index(configs))


def component_folders(stage: Stage, *, combined: bool = False) -> tuple[str, ...]:
    """The folders a component's files go to; the combined pipeline wants the text encoder twice."""
    if not combined:
        return (str(stage),)
    if stage is Stage.TEXT_ENCODER:
        return (str(stage), f"prior_{stage}")
    return (COMBINED_FOLDERS.get(stage, str(stage)),)


def model_index(configs: Mapping[Stage, NetworkConfig]) -> dict[str, Any]:
    """The pipeline index of a folder with these stages.

    A tree with both stages carries the entries of both pipelines; either class loads it, taking its own entries
    (StableCascadePriorPipeline.from_pretrained(folder), the decoder's likewise)."""
    prior_only = Stage.DECODER not in configs
    name = "StableCascadePriorPipeline" if prior_only else "StableCascadeDecoderPipeline"
    present = {*map(str, configs), "tokenizer", "scheduler"}
    if Stage.PRIOR in configs:
        present |= set(OPTIONAL)
    index: dict[str, Any] = {"_class_name": name, "_diffusers_version": DIFFUSERS_VERSION}
    for component in INDEX_ENTRIES:
        if component in present:
            index[component] = _entry(component, configs)
    if Stage.PRIOR in configs:
        index["resolution_multiple"] = 42.67
    if Stage.DECODER in configs:
        index["latent_dim_scale"] = 10.67
    return index


def combined_index(configs: Mapping[Stage, NetworkConfig]) -> dict[str, Any]:
    """The index of StableCascadeCombinedPipeline, whose prior components carry a prefix."""
    index: dict[str, Any] = {
        "_class_name": "StableCascadeCombinedPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
    }
    for component in ("tokenizer", "text_encoder", "decoder", "scheduler", "vqgan"):
        index[component] = _entry(component, configs)
    for component in ("prior", "text_encoder", "tokenizer", "scheduler", *OPTIONAL):
        index[f"prior_{component}"] = _entry(component, configs)
    return index


def _entry(component: str, configs: Mapping[Stage, NetworkConfig]) -> list[str | None]:
    """Library and class of a component, null where it is optional and not there."""
    if component in OPTIONAL and Stage.IMAGE_ENCODER not in configs:
        return [None, None]
    return list(INDEX_ENTRIES[component])


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
