"""The command line: parses, calls the library, prints. Everything heavy is imported by the command that needs it."""

import click

from .bench import bench
from .bench_build import build as bench_build
from .bench_generate import generate as bench_generate
from .boundary import CascadeGroup
from .build import build
from .bundles import export, validate
from .checkpoints import convert, inspect
from .demo import demo
from .doctor import doctor
from .generate import generate
from .lora import lora
from .lora_bundle import apply
from .ui import ui
from .verify import verify


@click.group(cls=CascadeGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cascadekit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Convert, export, run and verify Stable Cascade."""


for command in (inspect, convert, lora, export, validate, build, generate, ui, verify, demo, bench, doctor):
    main.add_command(command)
lora.add_command(apply)
for command in (bench_build, bench_generate):
    bench.add_command(command)
