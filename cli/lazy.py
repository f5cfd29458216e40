"""A group of commands. Each command is imported when it is called, and `--help` of the group imports none."""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from .translate import remember_command

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


LONGEST = 1000  # characters of a command's line; click wraps longer ones and would cut them off at 45


class Place(NamedTuple):
    """The module of a command, and the command's line in the group's help."""

    target: str  # "module:attribute"; the module is relative to the package `cli`
    help: str


class LazyGroup(click.Group):
    """A group whose commands are described by `places`, a table from each command's name to its Place."""

    def __init__(self, *arguments: Any, places: Mapping[str, Place] = MappingProxyType({}), **extra: Any) -> None:
        super().__init__(*arguments, **extra)
        self.places = dict(places)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the table in its order, then those of commands that were added otherwise."""
        return [*self.places, *self.commands.keys() - self.places.keys()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command named `cmd_name`, imported now; None when there is none of this name."""
        if cmd_name in self.places and cmd_name not in self.commands:
            module, _, attribute = self.places[cmd_name].target.partition(":")
            self.add_command(getattr(import_module(module, __package__), attribute), cmd_name)
        return super().get_command(ctx, cmd_name)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem]":
        """The commands that begin with `incomplete`, without importing any of them; else what click completes."""
        from click.shell_completion import CompletionItem

        found = {name: place for name, place in self.places.items() if name.startswith(incomplete)}
        if incomplete.startswith("-") or not found:
            return click.Command.shell_complete(self, ctx, incomplete)
        return [CompletionItem(name, help=place.help) for name, place in found.items()]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that `args` call. Error messages are written in this command's options from here on.

        Raises UsageError for an unknown command, with the one that was probably meant."""
        if not ctx.resilient_parsing and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            from .options_elsewhere import command_meant

            meant = command_meant(args[0], self.list_commands(ctx), root=ctx.parent is None)
            ctx.fail(f"No such command {args[0]!r}{meant}")
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            remember_command(ctx, command)
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands from `places`, without importing any of them."""
        others = {name: command.get_short_help_str(LONGEST) for name, command in self.commands.items()}
        rows = [(name, place.help) for name, place in self.places.items()]
        rows += [(name, text) for name, text in others.items() if name not in self.places]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)
