"""The metadata of generated images: the settings that generate an image again, and what made it.

The same settings give other pixels with another engine, precision, bundle or version, so an image names these too.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from ...schemas.manifest import Manifest
from ...schemas.settings import Settings
from ...schemas.stages import EVERY_IMAGE
from ..engines.protocol import Engine
from ..sampling.noise import PlacedSeed

SHOWN = 60  # characters of a value in a message


def image_settings(
    engine: Engine,
    manifest: Manifest,
    settings: Settings,
    *,
    prompts: Sequence[str],
    negatives: Sequence[str],
    seeds: Sequence[PlacedSeed],
) -> list[dict[str, Any]]:
    """For each image the flat settings with which `generate` makes it again; `seeds` has an entry for each image.

    Each prompt belongs to an equal share of the images, in order; without `prompts` no prompt is written down. One
    negative prompt belongs to all prompts."""
    count = len(seeds)
    made = made_with(engine, manifest)
    words: list[dict[str, str]] = [
        {"prompt": prompt, "negative": negatives[0 if len(negatives) == 1 else number]}
        for number, prompt in enumerate(prompts)
    ] or [{}]
    return [
        {
            **words[index * len(words) // count],
            **asdict(seed),
            **settings.to_json(),
            "vqgan_scale": manifest.vqgan_scale,
            **made,
            "created_by": manifest.created_by,
        }
        for index, seed in enumerate(seeds)
    ]


def made_with(engine: Engine, manifest: Manifest) -> dict[str, Any]:
    """Engine, precision, bundle and version for the metadata of an image.

    `precision` names the stages that every image goes through; `bundle` is a SHA-256 over the fingerprints of their
    files."""
    entries = {stage: manifest.stages[stage] for stage in EVERY_IMAGE if stage in manifest.stages}
    files = [f"{stage} {file.fingerprint}" for stage, entry in entries.items() for file in entry.files]
    return {
        "engine": engine.name,
        "precision": {str(stage): str(engine.precision or entry.precision) for stage, entry in entries.items()},
        "bundle": hashlib.sha256("\n".join(sorted(files)).encode()).hexdigest(),
        "version": version("cascadekit"),
    }


def changes(settings: Mapping[str, Any], engine: Engine, manifest: Manifest) -> list[str]:
    """The differences between this engine and bundle and those that made an image with these settings, in words.

    An image of an older version may lack some of the metadata; missing values count as equal."""
    here = made_with(engine, manifest)
    return [
        f"another bundle ({_shown(settings[name])[:12]}..., here {value[:12]}...)"
        if name == "bundle"
        else f"{name} {_shown(settings[name])} (here {_shown(value)})"
        for name, value in here.items()
        if name in settings and settings[name] != value
    ]


def _shown(value: object) -> str:
    """A value as text; precisions by stage become one line."""
    if isinstance(value, Mapping):
        value = ", ".join(f"{stage} {precision}" for stage, precision in value.items())
    return str(value)[:SHOWN]
