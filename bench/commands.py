"""The `bench` command with all its subcommands."""

from .cli import bench
from .cli_build import build
from .cli_generate import generate

__all__ = ["bench"]

for command in (build, generate):
    bench.add_command(command)
