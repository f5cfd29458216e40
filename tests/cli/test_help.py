"""The help of every command fits 80 columns, has examples to paste, and Tab completes what it lists."""

import shlex
import subprocess
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from cascadekit.cli import COMMANDS, main
from cascadekit.cli.generate_options import HELP_GROUPS
from cascadekit.cli.help import RANGE
from cascadekit.cli.lazy import LazyGroup


def call(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env=environment, prog_name="cascadekit")


def words_of(group: LazyGroup = main, *before: str) -> list[tuple[str, ...]]:
    found = []
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        deeper = name != "bench" and isinstance(command, LazyGroup)
        found += words_of(command, *before, name) if deeper else [(*before, name)]
    return found


@pytest.mark.parametrize("words", words_of(), ids=" ".join)
def test_help_fits_80_columns(words: tuple[str, ...]) -> None:
    lines = call(*words, "--help").output.splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if "RANGE" in line or "x<=" in line or "default: (" in line]


def test_the_sections_of_generate_name_its_parameters_once() -> None:
    command = main.get_command(click.Context(main), "generate")
    assert command is not None
    named = [name for names in HELP_GROUPS.values() for name in names]
    assert len(named) == len(set(named))
    assert set(named) <= {param.name for param in command.params}
    shown = call("generate", "--help").output
    assert all(f"\n{title}:\n" in shown for title in HELP_GROUPS)


def test_examples_can_be_pasted() -> None:
    """A shell reads each of them as one command, with the words that the docstring has."""
    shown = call("convert", "--help").output.partition("Example:\n")[2]
    echoed = subprocess.run(["bash", "-c", f"cascadekit() {{ printf '%s\\n' \"$@\"; }}\n{shown}"], capture_output=True)
    words = shlex.split(
        "convert stage_a.safetensors stage_b.safetensors stage_c.safetensors --text-encoder CLIP-ViT-bigG-14 -o model "
        "--to diffusers"
    )
    assert echoed.stdout.decode().split() == words


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("[default: 1; 1<=x<=100000]", "[default: 1]"),
        ("[default: random]  [-92<=x<=18446744073709551615]", "[default: random]"),
        ("N steps.  [x>=1]", "N steps."),
        ("[default: twice that]  [x>0]", "[default: twice that]"),
    ],
)
def test_ranges_of_numbers_are_left_out(text: str, left: str) -> None:
    assert RANGE.sub("", text) == left


def test_completion_knows_commands_and_options() -> None:
    def completed(line: str) -> list[str]:
        environment = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
        found = call(_CASCADEKIT_COMPLETE="bash_complete", **environment).output.split()
        return [item.removeprefix("plain,") for item in found]

    assert completed("cascadekit ") == list(COMMANDS)
    assert completed("cascadekit lora m") == ["merge"]
    assert completed("cascadekit generate b --prior-") == ["--prior-steps", "--prior-guidance", "--prior-shift",
                                                           "--prior-timesteps"]  # fmt: skip
    assert completed("cascadekit convert --to c") == ["comfyui"]


def test_completion_is_printed_or_installed(tmp_path: Path) -> None:
    printed = call("completion", "fish").output
    assert "_CASCADEKIT_COMPLETE=fish_complete" in printed
    home = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert call("completion", "fish", "--install", **home).exit_code == 0
    path = tmp_path / "fish/completions/cascadekit.fish"
    assert path.read_text().strip() == printed.strip()
    assert call("completion", "fish", "--install", **home).exit_code == 0  # again, for a newer version
    path.write_text("mine")
    refused = call("completion", "fish", "--install", **home)
    assert (refused.exit_code, path.read_text()) == (2, "mine")


def test_a_groups_help_is_not_cut_off() -> None:
    """click cuts the lines of commands that are no part of the table, those of `bench`, at 45 characters."""
    group = LazyGroup("group", commands=[click.Command("long", help=f"Measure {'very ' * 20}much.")])
    shown = CliRunner().invoke(group, ["--help"]).output
    assert " ".join(shown.split()).endswith("very much.")
    assert max(map(len, shown.splitlines())) <= 80
