"""What an image was made with besides its request: engine, precision, bundle and version. Others give other pixels."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from ...schemas.bundle import Manifest
from ...schemas.stages import Stage
from ..engines.base import Engine

DRAWING = (Stage.TEXT_ENCODER, Stage.PRIOR, Stage.DECODER, Stage.VQGAN)
SHOWN = 60  # characters of what a file says


def made_with(engine: Engine, manifest: Manifest) -> dict[str, Any]:
    """For the settings of an image. `precision` is that of the stages every image goes through, `bundle` a SHA-256 over
    the fingerprints of their files."""
    entries = {stage: manifest.stages[stage] for stage in DRAWING if stage in manifest.stages}
    files = [f"{stage} {file.fingerprint}" for stage, entry in entries.items() for file in entry.files]
    return {
        "engine": engine.name,
        "precision": {str(stage): str(engine.precision or entry.precision) for stage, entry in entries.items()},
        "bundle": hashlib.sha256("\n".join(sorted(files)).encode()).hexdigest(),
        "version": version("cascadekit"),
    }


def changes(settings: Mapping[str, Any], engine: Engine, manifest: Manifest) -> list[str]:
    """What an image with these settings was made with that is another one here, a few words each. Images of older
    versions do not say all of it, and what they do not say does not differ."""
    here = made_with(engine, manifest)
    return [
        f"another bundle ({_shown(settings[name])[:12]}..., here {value[:12]}...)"
        if name == "bundle"
        else f"{name} {_shown(settings[name])} (here {_shown(value)})"
        for name, value in here.items()
        if name in settings and settings[name] != value
    ]


def _shown(value: object) -> str:
    """Of precisions by stage those that there are."""
    if isinstance(value, Mapping):
        value = ", ".join(f"{stage} {precision}" for stage, precision in value.items())
    return str(value)[:SHOWN]
