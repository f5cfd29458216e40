"""Messages of the library name arguments; the command line shows them as options of the running command."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cascadekit.cli import main
from cascadekit.cli.boundary import CascadeGroup
from cascadekit.cli.translate import as_options
from cascadekit.schemas.errors import CheckpointError


@click.command()
@click.argument("bundle")
@click.option("--force", is_flag=True)
@click.option("--verdict/--no-verdict", default=True)
@click.option("--no-memory-check", is_flag=True)
@click.option("--weights")
@click.option("--variant")
@click.option("--size", metavar="WxH")
@click.option("--alpha", type=float)
@click.option("--allow-overflow", is_flag=True)
@click.option("-o", "--output")
@click.option("--stage", "stages", multiple=True)
@click.option("--precision", "precisions", multiple=True)
def command(**options: object) -> None:
    """Has an option of every kind."""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("exists already; add force=True to replace it", "exists already; add --force to replace it"),
        ("see verdict=False.", "see --no-verdict."),
        ("try it with memory_check=False", "try it with --no-memory-check"),
        ('use weights="copy", or weights="link"', "use --weights copy, or --weights link"),
        ('variant="a b"', "--variant 'a b'"),
        ('(variant="bf16")', "(--variant bf16)"),
        ("`variant=None`", "`no --variant`"),
        ("force=False", "no --force"),
        ("size=(1024, 768): too large", "--size 1024x768: too large"),
        ("alpha=4; alpha=-0.5.", "--alpha 4; --alpha -0.5."),
        ("allow_overflow=True", "--allow-overflow"),
        ('output="x"', "--output x"),
        ('stages=["prior", "decoder"]', "--stage prior --stage decoder"),
        ('stage="prior"', "--stage prior"),
        ('precision={"prior": "fp32"}', "--precision prior=fp32"),
        ("give variant=...", "give --variant"),
        ("first\n  force=True", "first\n  --force"),
    ],
)
def test_an_argument_becomes_the_option_that_says_the_same(text: str, shown: str) -> None:
    assert as_options(text, command) == shown


@pytest.mark.parametrize(
    "text",
    [
        "unknown=True",  # no option of this command
        'bundle="x"',  # an argument, which has no name on the command line
        "force=true",
        "force=yes",
        "force = True",
        "force=Truer",
        "my_force=True",
        "self.force=True",
        "/tmp/force=True/x",
        "force=True.safetensors",
        "force=True/x",
        "x,force=True",
        "weights=copy",
        "weights='copy'",
        'weights="copy"x',
        "alpha=4e5",
        "alpha=4.5.6",
        "size=(1024, side)",
        "stages=[[1]]",
        "weights=True",
        'force="x"',
        "force=1",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert as_options(text, command) == text


def test_an_error_is_shown_in_options_of_the_nested_command_that_raised_it() -> None:
    @click.command()
    @click.option("--module-filter", "filters", multiple=True)
    def inner(filters: tuple[str, ...]) -> None:
        raise CheckpointError('give filters=[".attn"] or force=True')

    group = CascadeGroup("program", places={}, params=[click.Option(["--force"], is_flag=True)])
    nested = CascadeGroup("nested", places={})
    nested.add_command(inner, "inner")
    group.add_command(nested, "nested")
    result = CliRunner().invoke(group, ["nested", "inner"])
    assert (result.exit_code, result.stderr) == (1, "error: give --module-filter .attn or force=True\n")


def test_advice_of_a_real_command(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").touch()
    result = CliRunner().invoke(main, ["export", str(tiny / "model"), "-o", str(tiny / "bundle")])
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert "force=True" not in result.stderr
