"""The `bench` command with all its subcommands."""

from .cli import bench
from .cli_build import build
from .cli_first_image import first_image
from .cli_generate import generate
from .cli_gpu import gpu, gpu_kit
from .cli_quality import quality
from .cli_start import start

__all__ = ["bench"]

for command in (build, first_image, generate, gpu, gpu_kit, quality, start):
    bench.add_command(command)
