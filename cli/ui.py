"""The command `ui`."""

import ipaddress
from pathlib import Path
from typing import Any

import click

from .console import note, say
from .generate_common import open_cascade
from .generate_options import machinery
from .help import HelpfulCommand
from .options import PATH


@click.command(cls=HelpfulCommand)
@click.argument("bundle", type=PATH)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=7860,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; the page has no login.")
@click.option("-o", "--output", type=PATH, default=Path("images"), show_default=True, help="Folder for the images.")
@machinery
def ui(bundle: Path, port: int, host: str, output: Path, batch: int | None, **engine: Any) -> None:
    """Generate images on a page in the browser.

    The page has prompt, settings, live preview and gallery.

    Example: cascadekit ui bundle
    """
    from ..runtime.ui.page_server import page_server
    from ..storage.output_rules import require_apart

    require_apart(output / "0000.png", [bundle])
    with open_cascade(bundle, **engine) as cascade:
        name = bundle.resolve().name
        page = page_server(
            cascade, output, name=name, host=host, port=port, batch=batch, loras=engine["loras"], say=say
        )
        with page as server:
            if not _is_loopback(host):
                note("whoever reaches this address can generate and see images; use 127.0.0.1 for this machine alone")
            say(f"{server.url}  images go to {output}, Ctrl+C ends")
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                say("ending after the step that is being computed; Ctrl+C again does not wait for it")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
