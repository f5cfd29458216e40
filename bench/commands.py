"""The `bench` command with all its subcommands."""

from .cli import bench
from .cli_build import build
from .cli_generate import generate
from .cli_quality import quality

__all__ = ["bench"]

for command in (build, generate, quality):
    bench.add_command(command)
