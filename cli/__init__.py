"""The command line. Each command has a file of its own, which is imported when the command is called."""

from importlib.util import find_spec

import click

from .boundary import CascadeGroup
from .lazy import Place

PACKAGE = __package__.rpartition(".")[0]

# The commands in the order of `--help`.
COMMANDS = {
    "inspect": Place(".inspect:inspect", "Show what a file or folder holds."),
    "convert": Place(".convert:convert", "Rewrite checkpoints in another layout."),
    "lora": Place(".lora:lora", "Inspect, convert and merge LoRA files."),
    "export": Place(".export:export", "Write a model as ONNX graphs and safetensors weights."),
    "validate": Place(".validate:validate", "Check a bundle's graphs, weights and files."),
    "build": Place(".build:build", "Build GPU engines of a bundle's graphs."),
    "many": Place(".many:many", "Run many convert, export and build commands on a Ray cluster."),
    "export-triton": Place(
        ".export_triton:export_triton", "Write a bundle as a model repository for Triton Inference Server."
    ),
    "generate": Place(".generate:generate", "Generate images from an exported bundle."),
    "ui": Place(".ui:ui", "Generate images on a page in the browser."),
    "serve": Place(".serve:serve", "Serve a bundle to programs, through OpenAI's images API."),
    "ir": Place(".ir:ir", "Write a bundle's graphs as OpenVINO IR."),
    "site": Place(".site:site", "Write a static website that generates images in the browser."),
    "verify": Place(".verify:verify", "Compare a bundle with PyTorch, or two checkpoints."),
    "demo": Place(".demo:demo", "Run every step once on a small trained cascade that is part of cascadekit."),
    "doctor": Place(".doctor:doctor", "Show which engines can be built and run here."),
    "completion": Place(".completion:completion", "Complete commands and options with Tab."),
}
if find_spec(f"{PACKAGE}.bench"):  # part of a checkout, not of the wheel
    COMMANDS["bench"] = Place("..bench.commands:bench", "Measure this package on this machine.")


@click.group(cls=CascadeGroup, places=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cascadekit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Convert, export, run and verify Stable Cascade."""
