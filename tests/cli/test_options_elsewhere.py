"""Words that people bring along from other programs are answered with those of this one."""

import inspect
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import cascadekit
from cascadekit.cli import main
from cascadekit.cli.options_elsewhere import ARGUMENTS_ELSEWHERE, COMMANDS_ELSEWHERE, IMAGE_OPTIONS
from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.messages import NAMES_ELSEWHERE


def every_command(group: click.Group) -> list[click.Command]:
    found: list[click.Command] = []
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        found += every_command(command) if isinstance(command, click.Group) else [command]
    return found


def test_every_word_of_the_tables_leads_somewhere() -> None:
    params = [param for command in every_command(main) for param in command.params]
    options = {name for param in params if isinstance(param, click.Option) for name in param.opts}
    arguments = {param.name for param in params if isinstance(param, click.Argument)}
    generate = main.get_command(click.Context(main), "generate")
    assert generate is not None
    assert set(IMAGE_OPTIONS) <= {name for param in generate.params for name in param.opts}
    functions = [getattr(cascadekit, name) for name in cascadekit.__all__]
    keywords = {name for each in functions if inspect.isfunction(each) for name in inspect.signature(each).parameters}
    for kind in (cascadekit.Settings, cascadekit.ExportOptions, cascadekit.BuildOptions, cascadekit.Cascade.generate):
        keywords |= inspect.signature(kind).parameters.keys()
    for word, names in NAMES_ELSEWHERE.items():
        assert keywords.intersection(names) or options.intersection(f"--{name.replace('_', '-')}" for name in names), (
            word
        )
    assert {name for names in ARGUMENTS_ELSEWHERE.values() for name in names} <= arguments
    commands = main.list_commands(click.Context(main))
    for here in COMMANDS_ELSEWHERE.values():
        for name in re.findall(r"cascadekit ([a-z][a-z-]*)", here):
            assert name in commands
    assert not COMMANDS_ELSEWHERE.keys() & {*commands} - {"bench"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("genrate b x", "No such command 'genrate': did you mean generate?"),
        ("Inspect x", "did you mean inspect?"),
        ("lora megre a b", "No such command 'megre': did you mean merge?"),
        ("diff a b", "No such command 'diff': take `cascadekit verify CHECKPOINT --against CHECKPOINT`."),
        ("merge a b", "No such command 'merge': take `cascadekit lora merge`, or `cascadekit lora apply`."),
        ("version", "No such command 'version': take `cascadekit --version`."),
        ("help generate", "take `cascadekit --help`, or `cascadekit COMMAND --help`."),
        ("frobnicate", "No such command 'frobnicate'."),
        ("lora help", "No such command 'help'."),
    ],
)
def test_an_unknown_command_is_answered_with_the_one_that_was_meant(words: str, said: str) -> None:
    result = CliRunner().invoke(main, words.split())
    assert result.exit_code == 2
    assert result.stderr.strip().endswith(said)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["generate", "b", "x", "--steps", "20"],
            "option --steps: here it is --prior-steps or --decoder-steps.",
        ),
        (["generate", "b", "x", "--num_inference_steps=20"], "here it is --prior-steps or --decoder-steps."),
        (["generate", "b", "x", "--width", "64"], "No such option --width: here it is --size WxH."),
        (["generate", "b", "x", "--height", "64"], "here it is --size WxH."),
        (["generate", "b", "x", "--guidance_scale", "4"], "here it is --prior-guidance or --decoder-guidance."),
        (["generate", "b", "x", "--cfg", "4"], "here it is --prior-guidance or --decoder-guidance."),
        (["generate", "b", "x", "--n", "4"], "here it is --images."),
        (["generate", "b", "x", "-n", "4"], "here it is --images."),
        (["generate", "b", "--prompt", "x"], "give [PROMPT]... as an argument, without an option."),
        (["generate", "b", "x", "--neg", "y"], "here it is --negative."),
        (["generate", "b", "x", "--out", "y"], "here it is --output."),
        (["generate", "--model", "b", "x"], "give BUNDLE as an argument, without an option."),
        (["export", "--model", "m", "-o", "b"], "give MODEL as an argument, without an option."),
        (["export", "m", "-o", "b", "--dtype", "fp16"], "here it is --precision [STAGE=]fp32|bf16|fp16."),
        (["convert", "m", "-o", "b", "--to", "original", "--precision", "fp16"], "here it is --dtype."),
        (["lora", "merge", "m", "l", "-o", "x", "--scale", "2"], "here it is --strength."),
        (["generate", "b", "x", "--prior-stepz", "2"], "--prior-steps"),
        (["demo", "--steps", "4"], "--steps: `cascadekit generate` has --prior-steps or --decoder-steps."),
        (["demo", "--prompt", "x"], "give PROMPT as an argument, without an option."),
        (["ui", "b", "--width", "64"], "--width: `cascadekit generate` has --size."),
        (["ui", "b", "--num_inference_steps", "4"], "`cascadekit generate` has --prior-steps or --decoder-steps."),
        (["export", "m", "-o", "b", "--guidance_scale", "4"], "`cascadekit generate` has --prior-guidance or"),
        (["verify", "b", "--against", "m", "--height", "64"], "here it is --size WxH."),
        (["verify", "b", "--against", "m", "--seed", "1"], "--seed: `cascadekit generate` has --seed."),
        (["build", "b", "--fp16"], "here it is --precision."),
        (["inspect", "b", "--force"], "No such option '--force'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("function", "arguments", "keyword", "meant"),
    [
        ("convert", ("m", "b", "original"), "torch_dtype", "dtype"),
        ("convert", ("m", "b", "original"), "overwrite", "force"),
        ("export", ("m", "b"), "dtype", "precision"),
        ("export", ("m", "b"), "stage", "stages"),
        ("verify", ("b",), "reference_model", "against"),
        ("verify", ("b",), "bisekt", "bisect"),
        ("build", ("b",), "arch", "targets"),
        ("apply_loras", ("b", ["l"]), "weight", "strengths"),
        ("compare_checkpoints", ("a", "b"), "stage", "stages"),
        ("convert_lora", ("l", "o", "kohya"), "overwrite", "force"),
        ("inspect_lora", ("l",), "reference_model", "against"),
        ("make_demo", ("d",), "generator", "seed"),
        ("merge_loras", ("m", ["l"], "o"), "lora_scale", "strengths"),
        ("record_reference", ("b", "m", "r"), "stage", "stages"),
        ("validate", ("b",), "hsah", "hash"),
        ("with_loras", ("b", []), "cach", "cache"),
        ("Settings", (64, 64), "guidance_scale", "prior_guidance or decoder_guidance"),
        ("ExportOptions", (), "dtype", "precision"),
        ("BuildOptions", (), "arch", "targets"),
    ],
)
def test_keywords(function: str, arguments: tuple[str, ...], keyword: str, meant: str) -> None:
    with pytest.raises(UsageError, match=rf"^{function}: {keyword}: unknown, did you mean {meant}\?$"):
        getattr(cascadekit, function)(*arguments, **{keyword: 1})


def test_every_public_function_refuses_an_unknown_keyword() -> None:
    """With a UsageError; so does each dataclass of options."""
    plain = {"inspect", "to_images", "undo_loras"}  # they have no keywords
    for name in cascadekit.__all__:
        found = getattr(cascadekit, name)
        if inspect.isfunction(found) and name not in plain:
            needed = [each for each in inspect.signature(found).parameters.values() if each.default is each.empty]
            given = ["x"] * len([each for each in needed if each.kind is each.POSITIONAL_OR_KEYWORD])
            with pytest.raises(UsageError, match="num_inference_steps: unknown"):
                found(*given, num_inference_steps=1)


def test_keywords_of_open() -> None:
    with pytest.raises(UsageError, match=r"provider: unknown, did you mean engine or device\?"):
        cascadekit.Cascade.open("b", **{"provider": "cpu"})  # type: ignore[arg-type]


def test_keywords_of_generate(tiny: Path) -> None:
    with cascadekit.Cascade.open(tiny / "bundle") as cascade:
        for name, meant in (
            ("num_inference_steps", "prior_steps or decoder_steps"),
            ("guidance_scale", "prior_guidance or decoder_guidance"),
            ("negative_prompt", "negative"),
            ("widht", "width"),
        ):
            with pytest.raises(UsageError, match=f"{name}: unknown, did you mean {meant}"):
                cascade.generate("x", **{name: 1})
