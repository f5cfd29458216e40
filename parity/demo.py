"""Runs every step once on the example model: original files, model folder, bundle, images, parity report."""

from __future__ import annotations  # help() shows the types as they are written here

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..converters.checkpoints.convert import convert
from ..converters.checkpoints.example_model import EXAMPLE_PROMPT, EXAMPLE_PROMPTS, copy_example_model
from ..converters.export.export import export
from ..runtime.cascade import Cascade
from ..runtime.images.contact_sheet import contact_sheet
from ..runtime.images.png import save_png
from ..runtime.sampling.noise import Noise
from ..runtime.text.prompt_weights import check_length
from ..schemas.callbacks import Say, ignored
from ..schemas.errors import MissingPackageError
from ..schemas.folders import MODEL_INDEX
from ..schemas.layouts import Layout
from ..schemas.manifest import MANIFEST_NAME
from ..schemas.messages import known_keywords
from ..storage.atomic_output import check_output, staged_output
from ..storage.install_hint import install_hint
from ..storage.replaceable_folders import DEMO, DEMO_REPORT, files_in
from .results import Report
from .verify import verify

PACKAGES = {"onnx": "export", "onnxruntime": "cpu"}  # the extra of each
FILES = (
    *("image.png", "prompts.png", "report.html", DEMO_REPORT),
    *(f"model/{MODEL_INDEX}", f"bundle/{MANIFEST_NAME}"),
)


@known_keywords
def make_demo(
    output: Path,
    prompt: str = EXAMPLE_PROMPT,
    *,
    seed: int = 0,
    force: bool = False,
    say: Say = ignored,
    note: Say = ignored,
) -> Report | None:
    """Write the folder `output`: ``original/``, ``lora/``, ``model/``, ``bundle/``, images and the parity report.

    ``image.png`` shows `prompt`, ``prompts.png`` eight other prompts. `say` is called with a line for each step before
    it starts, `note` with what is compared. `force` replaces an earlier demo; other files stay.

    Returns the parity report, which is true when the bundle passed; None when PyTorch is not installed, because then
    nothing is compared. Raises UsageError when `output` exists and `force` is false, MissingPackageError when onnx is
    not installed.

    >>> bool(make_demo(Path("demo"), "a red apple, flat style"))  # doctest: +SKIP
    True
    """
    _require_possible(prompt, seed)
    check_output(output, force=force, files=FILES)
    with staged_output(output, force=force, files=list(FILES), say=note) as folder:
        say("original/    a small trained Stable Cascade, in Stability's layout")
        copy_example_model(folder / "original", folder / "lora")
        say("model/       converted to a model folder for diffusers")
        convert([folder / "original"], folder / "model", Layout.DIFFUSERS)
        say("bundle/      exported to ONNX")
        export(folder / "original", folder / "bundle", weights="copy", controlnet=True)
        say(f'image.png    generated with ONNX Runtime: "{prompt}"')
        _generate(folder, prompt, seed, say)
        report = _compare(folder, say, note)
        content: Mapping[str, Any] = report.to_json() if report is not None else {"passed": None}
        files = [*files_in(folder), DEMO_REPORT]
        (folder / DEMO_REPORT).write_text(json.dumps({**content, DEMO: files}, indent=2) + "\n", encoding="utf-8")
    return report


def _require_possible(prompt: str, seed: int) -> None:
    """Raise UsageError, before anything is written, for what a later step would refuse."""
    check_length(prompt)
    Noise(seed, 1)
    for package, extra in PACKAGES.items():
        if find_spec(package) is None:
            raise MissingPackageError(f"the demo needs {package}, which is not installed: {install_hint(extra)}")


def _generate(folder: Path, prompt: str, seed: int, say: Say) -> None:
    with Cascade.open(folder / "bundle", engine="onnxruntime") as cascade:
        result = cascade.generate(prompt, seed=seed)
        save_png(folder / "image.png", result.images[0], result.settings[0])
        say("prompts.png  eight other prompts")
        images = cascade.generate(EXAMPLE_PROMPTS, seed=seed).images
    contact_sheet(images, EXAMPLE_PROMPTS).save(folder / "prompts.png")


def _compare(folder: Path, say: Say, note: Say) -> Report | None:
    if find_spec("torch") is None:
        say(f"             not compared with PyTorch, which is not installed: {install_hint('parity')}")
        return None
    say("report.html  compared with PyTorch, stage by stage")
    return verify(folder / "bundle", folder / "original", reports=[folder / "report.html"], say=note)
