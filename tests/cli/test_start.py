"""The command line starts quickly: `--help` and `inspect` import little of what is installed."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from cascadekit.cli import COMMANDS, main
from cascadekit.cli.build_options import DEFAULT_SIZES
from cascadekit.cli.lazy import LazyGroup
from cascadekit.schemas.profiles import DEFAULT, shown

LOADED = "import json, sys, atexit; atexit.register(lambda: sys.stderr.write(json.dumps(sorted(sys.modules)))); "
PROGRAM = "from cascadekit.__main__ import main; main()"
HEAVY = {"numpy", "pydantic", "rich", "huggingface_hub", "onnx", "onnxruntime", "torch", "PIL", "tokenizers"}
OF_HELP = {
    "cascadekit",
    "cascadekit.__main__",
    "cascadekit.cli",
    *(f"cascadekit.cli.{name}" for name in ("boundary", "console", "escape", "lazy", "signals", "translate")),
    "cascadekit.cli.options_elsewhere",
    "cascadekit.runtime",
    "cascadekit.runtime.engines",
    "cascadekit.runtime.engines.telemetry",
    "cascadekit.schemas",
    "cascadekit.schemas.callbacks",
    "cascadekit.schemas.errors",
    "cascadekit.storage",
    "cascadekit.storage.locks",
}


def modules(*arguments: object, program: str = PROGRAM) -> set[str]:
    """The modules that are loaded at the end of a run."""
    command = [sys.executable, "-c", LOADED + program, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(ended.stderr.splitlines()[-1]))


def test_help_imports_no_command_and_no_heavy_library() -> None:
    loaded = modules("--help")
    assert not loaded & HEAVY
    assert not loaded & {"dataclasses", "importlib.metadata", "hashlib", "shlex", "traceback"}
    assert {name for name in loaded if name.startswith("cascadekit")} == OF_HELP


def test_a_copy_into_another_layout_imports_little(original: Path, tmp_path: Path) -> None:
    """numpy and tokenizers are for casts and for a model's own tokenizer, pydantic is for passports."""
    command = ("convert", original / "stage_c.safetensors", "--to", "diffusers", "-o")
    assert modules(*command, tmp_path / "a") & HEAVY <= {"pydantic"}
    assert not modules(*command, tmp_path / "b", "--no-passport") & HEAVY


# The help of each command that is an argument, one after the other.
HELPS = """
from cascadekit.__main__ import main
for name in sys.argv[1:]:
    sys.argv = ["cascadekit", name, "--help"]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, name
"""


def test_help_of_no_command_imports_a_heavy_library() -> None:
    names = [name for name in COMMANDS if name not in ("lora", "bench")]
    loaded = modules(*names, program=HELPS)
    assert not loaded & HEAVY
    assert {f"cascadekit.cli.{name}" for name in ("convert", "export", "generate", "verify")} <= loaded


def test_the_default_sizes_of_build_are_those_of_the_profiles() -> None:
    assert {name: shown(getattr(DEFAULT, name)) for name in ("min", "opt", "max")} == DEFAULT_SIZES


def test_inspect_of_a_bundle_imports_pydantic_without_its_search_for_plugins(tiny: Path) -> None:
    loaded = modules("inspect", tiny / "bundle")
    assert loaded & HEAVY == {"pydantic"}
    assert len([name for name in loaded if name.startswith("cascadekit.")]) < 50


def test_models_are_built_when_they_are_used() -> None:
    """Only the manifest itself is built: its parts are checked as parts of it."""
    program = "from cascadekit.schemas import manifest as m, plan_entries as p; import sys; "
    built = "print([k.__name__ for k in (m.Manifest, m.StageEntry, p.PlanEntry) if k.__pydantic_complete__])"
    ended = subprocess.run([sys.executable, "-c", program + built], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_inspect_of_a_file_imports_no_heavy_library(original: Path) -> None:
    loaded = modules("inspect", original / "stage_a.safetensors")
    assert not loaded & HEAVY
    assert not {name for name in loaded if name.startswith(("cascadekit.converters.hub", "cascadekit.parity"))}
    assert len([name for name in loaded if name.startswith("cascadekit.")]) < 70


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


def test_inspect_of_a_model_folder_imports_no_heavy_library(tiny: Path) -> None:
    """Its configs have values of the very types that are declared, so that pydantic is not asked."""
    assert not modules("inspect", tiny / "model") & HEAVY
