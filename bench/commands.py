"""The `bench` command with all its subcommands."""

from .cli import bench
from .cli_build import build
from .cli_first_image import first_image
from .cli_generate import generate
from .cli_gpu import gpu

__all__ = ["bench"]

for command in (build, first_image, generate, gpu):
    bench.add_command(command)
