"""Runs every step once on a tiny cascade: original files, model folder, bundle, image, parity report."""

from __future__ import annotations  # help() shows the types as they are written here

import json
from pathlib import Path

from ..converters.checkpoints.convert import convert
from ..converters.checkpoints.open_model import open_model
from ..converters.checkpoints.tiny_cascade import write_tiny_cascade
from ..converters.export.export import export
from ..runtime.cascade import Cascade
from ..runtime.images.png import save_png
from ..schemas.callbacks import Say, ignored
from ..schemas.layouts import Layout
from ..schemas.manifest import MANIFEST_NAME
from ..storage.atomic_output import staged_output
from ..storage.replaceable_folders import DEMO, DEMO_REPORT, MODEL_INDEX, files_in
from .results import Report
from .verify import verify

FILES = ("image.png", DEMO_REPORT, f"model/{MODEL_INDEX}", f"bundle/{MANIFEST_NAME}")


def make_demo(
    output: Path,
    *,
    force: bool = False,
    say: Say = ignored,
    note: Say = ignored,
) -> Report:
    """Write the folder `output`: ``original/``, ``model/``, ``bundle/``, ``image.png`` and ``parity.json``.

    `say` is called with a line for each step before it starts, `note` with what is compared. `force` replaces an
    earlier demo; other files stay. Returns the parity report, which is true when the bundle passed.

    Raises UsageError when `output` exists and `force` is false, or when PyTorch is not installed.

    >>> bool(make_demo(Path("demo")))  # doctest: +SKIP
    True
    """
    with staged_output(output, force=force, files=list(FILES), say=note) as folder:
        say("original/    a tiny cascade in Stability's layout")
        write_tiny_cascade(folder / "original")
        say("model/       converted to a model folder")
        convert([folder / "original"], folder / "model", Layout.DIFFUSERS)
        say("bundle/      exported to ONNX")
        export(open_model([folder / "model"]), folder / "bundle")
        say("image.png    generated with ONNX Runtime")
        with Cascade.open(folder / "bundle") as cascade:
            result = cascade.generate("a tiny cascade", seed=0)
        save_png(folder / "image.png", result.images[0], result.settings[0])
        say("parity.json  compared with PyTorch")
        report = verify(folder / "bundle", folder / "model", say=note)
        content = {**report.to_json(), DEMO: [*files_in(folder), DEMO_REPORT]}
        (folder / DEMO_REPORT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return report
