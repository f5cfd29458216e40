"""The `bench` command with all its subcommands."""

from .cli import bench
from .cli_build import build
from .cli_generate import generate
from .cli_start import start

__all__ = ["bench"]

for command in (build, generate, start):
    bench.add_command(command)
