"""The command line: parses, calls the library, prints. A command is imported when it is called."""

from importlib.util import find_spec

import click

from .boundary import CascadeGroup

PACKAGE = __package__.rpartition(".")[0]

# Where each command lies, in the order of `--help`.
COMMANDS = {
    "inspect": ".checkpoints:inspect",
    "convert": ".checkpoints:convert",
    "lora": ".lora:lora",
    "export": ".bundles:export",
    "validate": ".bundles:validate",
    "build": ".build:build",
    "generate": ".generate:generate",
    "ui": ".ui:ui",
    "verify": ".verify:verify",
    "demo": ".demo:demo",
    "doctor": ".doctor:doctor",
}
if find_spec(f"{PACKAGE}.bench"):  # lies in a checkout and is no part of the wheel
    COMMANDS["bench"] = "..bench.commands:bench"


@click.group(cls=CascadeGroup, places=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cascadekit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Convert, export, run and verify Stable Cascade."""
