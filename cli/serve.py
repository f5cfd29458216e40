"""The command `serve`."""

from pathlib import Path
from typing import Any

import click

from ..schemas.errors import MissingPackageError, UsageError, reraise_interrupt
from ..storage.install_hint import install_hint
from .console import say
from .generate_common import open_cascade
from .generate_options import machinery
from .help import HelpfulCommand
from .options import C2PA, PATH, listen_options, volume_options


@click.command(cls=HelpfulCommand)
@click.argument("bundle", type=PATH)
@listen_options(8000, "others need --api-key")
@click.option(
    "--api-key",
    envvar="CASCADEKIT_API_KEY",
    help="Key that callers must send; better given in $CASCADEKIT_API_KEY, as other users see command lines.",
)
@click.option("--name", help="Name of the model for callers.  [default: the bundle's folder]")
@click.option(
    "--queue", type=click.IntRange(10), default=64, show_default=True, help="Images that wait before calls get 429."
)
@click.option(
    "--exact/--no-exact",
    default=True,
    show_default=True,
    help="Give each image the same bytes alone and in a batch; --no-exact is faster on a GPU, and images of a batch "
    "differ by rounding.",
)
@click.option("--open-metrics", is_flag=True, help="Answer /metrics without the key, as scrapers have none.")
@click.option("--log-prompts", is_flag=True, help="Put prompts into the request log.")
@click.option(
    "--patience",
    type=click.IntRange(0),
    default=30,
    show_default=True,
    help="Seconds that running requests have to finish when the server ends.",
)
@machinery
@C2PA
@volume_options
def serve(
    bundle: Path, host: str, port: int, api_key: str | None, name: str | None, queue: int, exact: bool, **options: Any
) -> None:
    """Serve a bundle to programs, through OpenAI's images API.

    Example: cascadekit serve bundle
    """
    from ..runtime.server_address import is_loopback

    try:
        from ..runtime.serve.api_server import ServeOptions, api_server
    except ImportError as error:
        reraise_interrupt(error)
        raise MissingPackageError(f"serve: {error.name} is not installed: {install_hint('serve')}") from error
    if not api_key and not is_loopback(host):
        raise UsageError(f"{host}: whoever reaches this address could generate images; give api_key=... too")
    chosen = ServeOptions(
        host=host,
        port=port,
        key=api_key or None,
        queue=queue,
        together=options.pop("batch"),
        log_prompts=options.pop("log_prompts"),
        open_metrics=options.pop("open_metrics"),
        patience=options.pop("patience"),
        sign=options.pop("c2pa"),
    )
    model, rows = name or bundle.resolve().name, 1 if exact else None
    with open_cascade(bundle, rows=rows, **options) as cascade, api_server(cascade, model, chosen, say) as server:
        say(f"{server.url}/v1  serves {model}, Ctrl+C ends")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("ended; requests that ran were answered")
