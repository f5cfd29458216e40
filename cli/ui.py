"""The command `ui`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import note, say
from .desktop import has_screen, is_terminal, show_folder, show_page
from .generate_common import open_cascade
from .generate_options import machinery
from .help import HelpfulCommand
from .options import C2PA, PATH, listen_options, volume_options

if TYPE_CHECKING:
    from ..runtime.ui.models import Models


@click.command(cls=HelpfulCommand)
@click.argument("bundle", type=PATH)
@listen_options(7860, "the page has no login")
@click.option("-o", "--output", type=PATH, default=Path("images"), show_default=True, help="Folder for the images.")
@click.option(
    "--lora-folder",
    "lora_folders",
    type=PATH,
    multiple=True,
    help="Folder of LoRAs that the page offers, beside those of $CASCADEKIT_LORAS (repeatable).",
)
@click.option(
    "--open/--no-open",
    "opens",
    default=True,
    help="Open the page in the browser; never in a pipe, through ssh or without a screen.  [default: open]",
)
@machinery
@C2PA
@volume_options
def ui(
    bundle: Path,
    port: int,
    host: str,
    output: Path,
    lora_folders: Sequence[Path],
    opens: bool,
    batch: int | None,
    c2pa: Any,
    **options: Any,
) -> None:
    """Generate images on a page in the browser.

    BUNDLE is a bundle, or a folder of bundles. The page offers all bundles of that folder. It has prompt, settings,
    live preview and gallery.

    Example: cascadekit ui bundle
    """
    from ..runtime.server_address import is_loopback
    from ..runtime.ui.page_server import page_server
    from ..storage.output_rules import require_apart, require_writable

    with _models(bundle, lora_folders, options) as models:
        require_writable(output)
        require_apart(output / "0000.png", models.bundles.values())
        seen = is_loopback(host) and has_screen()
        show = partial(show_folder, output.absolute()) if seen else None
        shown: dict[str, Any] = {"batch": batch, "open_folder": show, "sign": c2pa, "say": say}
        with page_server(models, output, host=host, port=port, **shown) as server:  # it listens, and answers nobody yet
            models.cascade(models.first)  # what cannot be opened is refused here
            if not is_loopback(host):
                note("whoever reaches this address can generate, see and delete images; use 127.0.0.1 to be alone")
            say(f"{server.url}  images go to {output}, Ctrl+C ends")
            if opens and seen and is_terminal():
                show_page(server.url)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                say("ending after the step that is being computed; Ctrl+C again does not wait for it")


def _models(bundle: Path, lora_folders: Sequence[Path], options: dict[str, Any]) -> "Models":
    from ..converters.lora.bundle_cache import listed_loras
    from ..runtime.ui.models import Models

    def opener(path: Path, engine: str, loras: Sequence[tuple[str, float]]) -> Any:
        return open_cascade(path, **{**options, "engine": engine, "loras": loras})

    return Models(
        bundle,
        opener,
        engine=options["engine"],
        device=options["device"],
        first_loras=tuple(options["loras"]),
        loras=partial(listed_loras, lora_folders),
        stages=options["stages"],
    )
