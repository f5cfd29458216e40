"""Option types that several commands share."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from ..schemas.stages import Stage
from .console import Volume, note, set_volume

Command = Callable[..., Any]


class GivenPath(click.Path):
    """A path. An empty one is refused: it would be the current folder, and comes from an unset variable of a shell.

    So is "-" where standard input is not read: it would be a file or folder of that name."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("expected a path, found an empty text; the current folder is .", param, ctx)
        if value == "-" and not self.allow_dash:
            self.fail("standard input and output are not taken here; write ./- for a file called -", param, ctx)
        return super().convert(value, param, ctx)


PATH = GivenPath(path_type=Path)
SEED = click.IntRange(-(2**63), 2**64 - 1)
STAGES = click.Choice([str(stage) for stage in Stage])
WEIGHTS = {"copy": "copied", "link": "hard-linked", "reflink": "cloned"}  # a bundle's weights, in words

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, and write nothing.")


def choice_option(
    flag: str, names: Iterable[object], text: str | None = None, *, default: str
) -> Callable[[Command], Command]:
    """An option that takes one of `names`."""
    chosen = click.Choice([str(name) for name in names])
    return click.option(flag, type=chosen, default=default, show_default=True, help=text)


def _volume_option(flags: Sequence[str], chosen: Volume, text: str) -> Callable[[Command], Command]:
    def choose(ctx: click.Context, param: click.Parameter, given: bool) -> None:
        if given:
            set_volume(ctx, chosen)

    return click.option(*flags, is_flag=True, expose_value=False, is_eager=True, callback=choose, help=text)


def volume_options(command: Command) -> Command:
    """Put --quiet and --verbose on a command. `console` reads them; they are no arguments of the command."""
    verbose = _volume_option(["-v", "--verbose"], Volume.VERBOSE, "Also print details.")
    return _volume_option(["-q", "--quiet"], Volume.QUIET, "Print errors only; with --json, also the JSON.")(
        verbose(command)
    )


def _open_signer(ctx: click.Context, param: click.Parameter, given: Path | None) -> Any:
    if given is None:
        return None
    from ..runtime.images.provenance import open_signer

    return open_signer(given)


C2PA = click.option(
    "--c2pa",
    type=PATH,
    envvar="CASCADEKIT_C2PA",
    callback=_open_signer,
    metavar="PEM",
    help="Sign each image as AI-generated (C2PA) with this file's certificates and key; also $CASCADEKIT_C2PA.",
)


def listen_options(port: int, who: str) -> Callable[[Command], Command]:
    """Put --port, which is `port` by default, and --host on a command; `who` says who may reach other hosts."""

    def decorate(command: Command) -> Command:
        host_text, port_text = f"Address to listen on; {who}.", "Port to listen on; 0 takes a free one."
        host = click.option("--host", default="127.0.0.1", show_default=True, help=host_text)
        number = click.IntRange(0, 65535)
        return click.option("--port", type=number, default=port, show_default=True, help=port_text)(host(command))

    return decorate


def local(source: Path) -> Path:
    """The path of a source on this machine; a source named hf://... is downloaded first."""
    from ..converters.hub import local_path

    return local_path(source, note)


def all_local(sources: Sequence[Path]) -> list[Path]:
    """`local` for each of several sources."""
    return [local(source) for source in sources]


def parse_size(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """The value of an option such as 1024x768 as (width, height)."""
    if value is None:
        return None
    try:
        width, height = (int(side) for side in value.lower().split("x"))
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected WIDTHxHEIGHT, such as 1024x768") from None
    return width, height


def parse_loras(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, float]]:
    """Each value is FILE[:STRENGTH]; a value that is the name of a file is that file."""
    found = []
    for value in values:
        name, colon, strength = value.rpartition(":")
        try:
            found.append((value, 1.0) if not colon or Path(value).exists() else (name, float(strength)))
        except ValueError:
            if Path(name).is_file():
                raise click.BadParameter(f"{value!r}: expected a number after the colon, such as 0.8") from None
            found.append((value, 1.0))
    return found
