"""Option types that several commands share."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from ..schemas.errors import UsageError
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


def parsed(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A callback of an option whose text `parse` reads, or each text where the option may be repeated.

    A text that `parse` refuses is a wrong value of the option."""

    def callback(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        try:
            return tuple(map(parse, value)) if isinstance(value, tuple) else None if value is None else parse(value)
        except (UsageError, ValueError) as error:
            raise click.BadParameter(str(error)) from None

    return callback


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


def parse_size(text: str) -> tuple[int, int]:
    """The size in a text such as 1024x768, as (width, height). Raises UsageError for any other text."""
    try:
        width, height = (int(side) for side in text.lower().split("x"))
    except ValueError:
        raise UsageError(f"{text!r}: expected WIDTHxHEIGHT, such as 1024x768") from None
    return width, height


def parse_lora(text: str) -> tuple[str, float]:
    """The name and the strength in FILE[:STRENGTH]; a text that is the name of a file is that file.

    Raises UsageError for the name of a file with a strength that is no number."""
    name, colon, strength = text.rpartition(":")
    try:
        return (text, 1.0) if not colon or Path(text).exists() else (name, float(strength))
    except ValueError:
        if Path(name).is_file():
            raise UsageError(f"{text!r}: expected a number after the colon, such as 0.8") from None
        return text, 1.0
