"""The command that takes a tiny cascade down the whole road."""

import json
from pathlib import Path

import click

from ..schemas.bundle import MANIFEST_NAME
from ..schemas.layouts import Layout
from .common import PATH
from .console import FAILED, note, say
from .verify_print import print_report


@click.command()
@click.option("-o", "--output", type=PATH, default=Path("demo"), show_default=True, help="Folder to make.")
@click.option("--force", is_flag=True, help="Replace an earlier demo; other files stay.")
def demo(output: Path, force: bool) -> None:
    """Take a tiny cascade down the whole road: original files, model folder, bundle, image, parity.

    Example: cascadekit demo -o demo
    """
    from ..converters.checkpoints.convert import convert as run_convert
    from ..converters.checkpoints.open_model import open_model
    from ..converters.checkpoints.tiny_cascade import write_tiny_cascade
    from ..converters.export.export import export as run_export
    from ..parity.verify import verify
    from ..runtime.cascade import Cascade
    from ..runtime.images.png import save_png
    from ..storage.outputs import staged_output
    from ..storage.own_folders import DEMO, DEMO_REPORT, MODEL_INDEX, files_in

    files = ["image.png", DEMO_REPORT, f"model/{MODEL_INDEX}", f"bundle/{MANIFEST_NAME}"]
    with staged_output(output, force=force, files=files, say=note) as folder:
        say("original/    a tiny cascade in Stability's layout")
        write_tiny_cascade(folder / "original")
        say("model/       converted to a model folder")
        run_convert([folder / "original"], folder / "model", Layout.DIFFUSERS)
        say("bundle/      exported to ONNX")
        run_export(open_model([folder / "model"]), folder / "bundle")
        say("image.png    generated with ONNX Runtime")
        with Cascade.open(folder / "bundle") as cascade:
            result = cascade.generate("a tiny cascade", seed=0)
        save_png(folder / "image.png", result.images[0], result.settings[0])
        say("parity.json  compared with PyTorch")
        report = verify(folder / "bundle", folder / "model", say=note)
        content = {**report.to_json(), DEMO: [*files_in(folder), DEMO_REPORT]}
        (folder / DEMO_REPORT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print_report(report)
    say(f"image: {output / 'image.png'}")
    say(f"parity table: {output / 'parity.json'}")
    if not report:
        raise SystemExit(FAILED)
