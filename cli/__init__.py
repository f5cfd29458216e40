"""The command line: parses, calls the library, prints. Everything heavy is imported by the command that needs it."""

import click

from .bench import bench
from .bundles import export, validate
from .checkpoints import convert, inspect
from .console import CascadeGroup
from .demo import demo
from .generate import generate
from .lora import lora
from .lora_bundle import apply
from .verify import verify


@click.group(cls=CascadeGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cascadekit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Convert, export, run and verify Stable Cascade."""


for command in (inspect, convert, lora, export, validate, generate, verify, demo, bench):
    main.add_command(command)
lora.add_command(apply)
