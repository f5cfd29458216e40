"""The command line starts quickly: `--help` and `inspect` import little of what is installed."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from cascadekit.cli import main
from cascadekit.cli.lazy import LazyGroup

LOADED = "import json, sys, atexit; atexit.register(lambda: sys.stderr.write(json.dumps(sorted(sys.modules)))); "
PROGRAM = "from cascadekit.__main__ import main; main()"
HEAVY = {"numpy", "pydantic", "rich", "huggingface_hub", "onnx", "onnxruntime", "torch", "PIL", "tokenizers"}
OF_HELP = {
    "cascadekit",
    "cascadekit.__main__",
    "cascadekit.cli",
    *(f"cascadekit.cli.{name}" for name in ("boundary", "console", "escape", "lazy", "signals", "translate")),
    "cascadekit.runtime",
    "cascadekit.runtime.engines",
    "cascadekit.runtime.engines.telemetry",
    "cascadekit.schemas",
    "cascadekit.schemas.errors",
}


def modules(*arguments: object) -> set[str]:
    """The modules that are loaded at the end of a run."""
    command = [sys.executable, "-c", LOADED + PROGRAM, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(ended.stderr.splitlines()[-1]))


def test_help_imports_no_command_and_no_heavy_library() -> None:
    loaded = modules("--help")
    assert not loaded & HEAVY
    assert {name for name in loaded if name.startswith("cascadekit")} == OF_HELP


def test_inspect_of_a_file_imports_no_heavy_library(original: Path) -> None:
    loaded = modules("inspect", original / "stage_a.safetensors")
    assert not loaded & HEAVY
    assert not {name for name in loaded if name.startswith(("cascadekit.converters.hub", "cascadekit.parity"))}
    assert len([name for name in loaded if name.startswith("cascadekit.")]) < 60


def all_places(group: click.Command, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str, click.Command]]:
    found = []
    if isinstance(group, LazyGroup):
        context = click.Context(group)
        for name, place in group.places.items():
            command = group.get_command(context, name)
            assert command is not None
            found += [((*path, name), place.help, command), *all_places(command, (*path, name))]
    return found


@pytest.mark.parametrize(("path", "line", "command"), all_places(main), ids=lambda value: str(value))
def test_the_line_in_the_table_is_the_first_sentence_of_the_command(
    path: tuple[str, ...], line: str, command: click.Command
) -> None:
    assert (command.help or "").split(".")[0] + "." == line, path
