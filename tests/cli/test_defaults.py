"""Options of the command line and arguments of Python have the same defaults, and values one spelling."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import cascadekit
from cascadekit.cli import main
from cascadekit.cli.build_options import chosen_profiles
from cascadekit.schemas.settings import Settings

EMPTY: tuple[object, ...] = (None, (), [], {}, "")  # all of these say that nothing was given

# Options whose argument has another name, or none: --profile has a default of its own, `output` is another thing.
SAME = {
    ("generate", "images"): "num_images",
    ("generate", "prompts"): "prompt",
    ("build", "profiles"): "",
    ("generate", "output"): "",
}

# Options that a command has for itself: how it prints, and what the caller of a Python function does beside it.
OWN = {
    *("as_json", "dry_run", "help", "pruned", "precision", "text_encoder", "mapping", "record", "undo", "size"),
    *("prompt_file", "name", "log", "keep_going", "preview_every", "force", "batch", "like", "loras", "seeds"),
    *("output", "profiles", "min_size", "opt_size", "max_size", "statics", "ray", "actors", "c2pa"),
}


def defaults_of(*functions: Callable[..., Any]) -> dict[str, Any]:
    found = {}
    for function in functions:
        for name, parameter in inspect.signature(function).parameters.items():
            found[name] = () if "factory" in repr(parameter.default) else parameter.default
    return found


PYTHON: Mapping[str, dict[str, Any]] = {
    "convert": defaults_of(cascadekit.convert),
    "export": defaults_of(cascadekit.export, cascadekit.ExportOptions),
    "build": defaults_of(cascadekit.build, cascadekit.BuildOptions),
    "verify": defaults_of(cascadekit.record_reference, cascadekit.verify),
    "validate": defaults_of(cascadekit.validate),
    "demo": defaults_of(cascadekit.make_demo),
    "generate": defaults_of(Settings, cascadekit.Cascade.generate, cascadekit.Cascade.open),
    "lora merge": defaults_of(cascadekit.merge_loras),
    "lora apply": defaults_of(cascadekit.apply_loras),
    "lora convert": defaults_of(cascadekit.convert_lora),
    "lora inspect": defaults_of(cascadekit.inspect_lora),
}


def command_of(words: str) -> click.Command:
    command: click.Command = main
    for word in words.split():
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), word)
        assert found is not None
        command = found
    return command


@pytest.mark.parametrize("name", PYTHON)
def test_names_and_defaults_are_those_of_python(name: str) -> None:
    command, arguments, compared = command_of(name), PYTHON[name], 0
    context = click.Context(command)
    for option in command.params:
        assert option.name is not None
        argument = SAME.get((name, option.name), option.name)
        if not isinstance(option, click.Option) or argument not in arguments:
            assert option.name in OWN or not option.expose_value or argument in arguments, option.name
            continue
        given, default = option.get_default(context), arguments[argument]
        given = None if repr(given).startswith("Sentinel") else given  # click's own None
        given = str(given) if isinstance(given, Path) else given
        if given in EMPTY and name == "generate":
            compared += 1  # None: what is not given is left to Python
        else:
            assert given == default or (given in EMPTY and default in (*EMPTY, inspect.Parameter.empty)), option.name
            compared += 1
    assert compared


def test_profiles_of_build() -> None:
    assert chosen_profiles(None, None, None, statics=(), profiles=()) == cascadekit.BuildOptions().profiles


def test_sizes_are_width_x_height() -> None:
    for name in PYTHON:
        for option in command_of(name).params:
            assert option.metavar is None or "HxW" not in option.metavar, (name, option.name)
            sizes = [option.name] if option.metavar and "WxH" in option.metavar else []
            assert set(sizes) <= {"size", "min_size", "opt_size", "max_size", "statics"}


def test_a_lora_is_a_file_and_its_strength(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In every command that takes one; `--strength` still works, but not together with it."""
    seen: list[tuple[list[Path], list[float]]] = []

    def record(target: Path, loras: list[Path], *_: Any, strengths: Any, **__: Any) -> None:
        seen.append((loras, list(strengths)))
        raise KeyboardInterrupt

    monkeypatch.setattr("cascadekit.converters.lora.merge_checkpoint.merge_loras", record)
    monkeypatch.setattr("cascadekit.converters.lora.merge_bundle.apply_loras", record)
    for command in (["merge", "c", "a.safetensors:0.5", "b", "-o", "x"], ["apply", "c", "a.safetensors:0.5", "b"]):
        CliRunner().invoke(main, ["lora", *command])
        wrong = CliRunner().invoke(main, ["lora", *command, "--strength", "2", "--strength", "3"])
        assert wrong.exit_code == 2
        assert "give the strengths in one way" in wrong.stderr
    CliRunner().invoke(main, ["lora", "apply", "c", "a", "--strength", "2"])
    assert seen == [([Path("a.safetensors"), Path("b")], [0.5, 1.0])] * 2 + [([Path("a")], [2.0])]
    for name in ("generate", "export"):
        (option,) = (option for option in command_of(name).params if option.name == "loras")
        assert option.metavar == "FILE[:STRENGTH]"


@pytest.mark.parametrize(
    "command",
    [
        *("inspect none", "convert none -o x --to original", "export none -o x", "validate none", "ui none"),
        *("build none --arch sm89", "generate none x", "generate none x --like none", "verify none --against none"),
        *(
            "lora inspect none",
            "lora merge none l -o x",
            "lora convert none -o x.safetensors --to kohya",
            "lora apply none l",
        ),
    ],
)
def test_a_path_that_leads_nowhere_is_wrong_usage(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 2
    assert "error: none: " in result.stderr
    assert [*tmp_path.iterdir()] == []
