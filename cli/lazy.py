"""A group of commands each of which is imported when it is called."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click

from .translate import remember_command


class LazyGroup(click.Group):
    """`places` names where each command lies: "module:attribute", the module relative to this package."""

    def __init__(self, *arguments: Any, places: Mapping[str, str], **extra: Any) -> None:
        super().__init__(*arguments, **extra)
        self.places = dict(places)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.places, *self.commands.keys() - self.places.keys()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.places and cmd_name not in self.commands:
            module, _, attribute = self.places[cmd_name].partition(":")
            self.add_command(getattr(import_module(module, __package__), attribute), cmd_name)
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            remember_command(ctx, command)
        return name, command, rest
