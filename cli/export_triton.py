"""The command `export-triton`."""

from pathlib import Path
from typing import Any, get_args

import click

from ..converters.export.export_options import WeightsMode
from ..converters.triton.triton_options import BACKENDS, KINDS
from .console import finish, note
from .dry_run import plan_only
from .help import HelpfulCommand
from .options import AS_JSON, DRY_RUN, PATH, choice_option, volume_options
from .progress import byte_progress


@click.command("export-triton", cls=HelpfulCommand)
@click.argument("bundle", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="Folder of the repository to make.")
@choice_option(
    "--backend",
    list(BACKENDS),
    "What runs the stages: a backend of Triton's, or ONNX Runtime in Python. tensorrt needs plans of whole "
    "graphs, which `build --graph model` makes.",
    default="onnxruntime",
)
@choice_option(
    "--device",
    list(KINDS),
    "Where the stages run; auto is each GPU that the server has, else the CPU.",
    default="auto",
)
@click.option(
    "--batch", type=click.IntRange(1, 64), default=8, show_default=True, help="Most images of a call, and of a stage."
)
@click.option(
    "--exact/--no-exact",
    default=True,
    show_default=True,
    help="Give each image the same bytes alone and in a batch; with --no-exact stages take several rows at once.",
)
@click.option(
    "--instances",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Batches that are generated at the same time; take one for each GPU.",
)
@choice_option(
    "--weights",
    list(get_args(WeightsMode)),
    "auto: clones of the bundle's files where the file system has them, else copies. link: hard links.",
    default="auto",
)
@click.option("--force", is_flag=True, help="Replace an earlier repository; other files stay.")
@DRY_RUN
@AS_JSON
@volume_options
def export_triton(bundle: Path, output: Path, dry_run: bool, as_json: bool, **chosen: Any) -> None:
    """Write a bundle as a model repository for Triton Inference Server.

    Each stage becomes a model; two models in Python generate images with them.

    Example: cascadekit export-triton bundle -o repository
    """
    from ..converters.triton.triton_options import TritonOptions
    from ..converters.triton.write_repository import export_triton as run

    options = TritonOptions(**chosen)
    with plan_only(dry_run, as_json=as_json) as on_plan, byte_progress() as start_file:
        made = run(bundle, output, options, start_file=start_file, say=note, on_plan=on_plan)
    size = sum(file.bytes for file in made.files) / 1e6
    finish(f"wrote {output} ({', '.join(made.models)}; {size:.1f} MB)", made.to_json(), as_json=as_json)
