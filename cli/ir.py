"""The command `ir`."""

from pathlib import Path

import click

from .console import detail, finish, note
from .help import HelpfulCommand
from .options import AS_JSON, PATH, volume_options


@click.command(cls=HelpfulCommand)
@click.argument("bundle", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="Folder to make.")
@click.option("--force", is_flag=True, help="Replace files of the same names; other files stay.")
@AS_JSON
@volume_options
def ir(bundle: Path, output: Path, force: bool, as_json: bool) -> None:
    """Write a bundle's graphs as OpenVINO IR.

    Each graph becomes an .xml and a .bin file for programs with OpenVINO. Weights are stored as in the bundle:
    `cascadekit export MODEL -o BUNDLE --storage fp16` halves them. `generate --engine openvino` needs no IR.

    Example: cascadekit ir bundle -o ir
    """
    from ..converters.openvino_ir import write_openvino_ir

    sizes = write_openvino_ir(bundle, output, force=force, say=note)
    for name, size in sizes.items():
        detail(f"{name}: {size / 1e6:.1f} MB")
    line = f"wrote {output} ({len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB)"
    finish(line, {"output": str(output), "files": sizes}, as_json=as_json)
