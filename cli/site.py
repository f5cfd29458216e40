"""The command `site`."""

from pathlib import Path

import click

from .console import finish, note
from .help import HelpfulCommand
from .options import AS_JSON, PATH, volume_options


@click.command(cls=HelpfulCommand)
@click.argument("bundle", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="Folder of the website to make.")
@click.option(
    "--onnxruntime-web",
    required=True,
    type=PATH,
    help="The npm package onnxruntime-web: the archive that `npm pack onnxruntime-web` fetches, or its folder.",
)
@click.option("--force", is_flag=True, help="Replace an existing website; other files stay.")
@AS_JSON
@volume_options
def site(bundle: Path, output: Path, onnxruntime_web: Path, force: bool, as_json: bool) -> None:
    """Write a static website that generates images in the browser.

    Any web server can serve the folder, and nothing is computed there. Weights stored in fp16 halve the download:
    `cascadekit export MODEL -o BUNDLE --storage fp16`.

    Example: cascadekit site bundle -o site --onnxruntime-web onnxruntime-web-1.30.0.tgz
    """
    from ..converters.site.write_site import write_site

    manifest = write_site(bundle, output, onnxruntime_web, force=force, say=note)
    listed = [*manifest.files, *(file for entry in manifest.stages.values() for file in entry.files)]
    size = sum(file.bytes for file in listed)
    line = f"wrote {output} ({len(listed) + 1} files, {size / 1e6:.1f} MB); try it: python -m http.server -d {output}"
    finish(line, {"output": str(output), "files": len(listed) + 1, "bytes": size}, as_json=as_json)
