"""Commands and options that people bring along from other programs, and what the same is called here."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import click

# Options of `generate` that change the image, and that only it has.
IMAGE_OPTIONS = (
    *("--prior-steps", "--decoder-steps", "--prior-guidance", "--decoder-guidance", "--size", "--images"),
    *("--negative", "--sampler", "--strength", "--init-image", "--image-prompt", "--mask"),
    *("--control", "--seed", "--prompts", "--like", "--weighted", "--long-prompts"),
)

# Words that are options elsewhere, and an argument here, which a command has by one of the names.
_MODEL = ("model", "bundle", "checkpoint", "sources", "path")
_PROMPT = ("prompts", "prompt")
ARGUMENTS_ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("prompt", "p", "text"), _PROMPT),
    **dict.fromkeys(("model", "m", "ckpt", "checkpoint", "input", "i"), _MODEL),
    "bundle": ("bundle",),
    "lora": ("loras",),
}

# Words that people try as commands -> what does it here. Words close to the name of a command need no entry.
_COMMANDS: Mapping[str, str] = {
    "help": "`cascadekit --help`, or `cascadekit COMMAND --help`",
    "version": "`cascadekit --version`",
    "diff compare": "`cascadekit verify CHECKPOINT --against CHECKPOINT`",
    "info show list": "`cascadekit inspect PATH`",
    "check test": "`cascadekit validate BUNDLE`, or `cascadekit verify BUNDLE --against MODEL`",
    "quantize quantise": "`cascadekit convert` and `cascadekit export` with --quantize",
    "merge apply": "`cascadekit lora merge`, or `cascadekit lora apply`",
    "onnx": "`cascadekit export MODEL -o BUNDLE`",
    "tensorrt compile engine": "`cascadekit build BUNDLE`",
    "openvino": "`cascadekit ir BUNDLE -o FOLDER`",
    "triton": "`cascadekit export-triton BUNDLE -o FOLDER`",
    "run image txt2img img2img infer sample batch": "`cascadekit generate BUNDLE PROMPT`",
    "web gui webui browser": "`cascadekit ui BUNDLE`",
    "server api": "`cascadekit serve BUNDLE`",
    "download": "any command with hf://OWNER/NAME, such as `cascadekit convert`",
    "bench benchmark": "`python -m cascadekit bench` in a checkout",
}
COMMANDS_ELSEWHERE = {word: here for words, here in _COMMANDS.items() for word in words.split()}


def command_meant(word: str, known: Sequence[str], *, root: bool) -> str:
    """What to do in place of the unknown command `word`, for the end of a message; "" when nothing is near.

    `known` are the commands of the group; `root` is true for that of `cascadekit` itself."""
    if root and (here := COMMANDS_ELSEWHERE.get(word.lower())):
        return f": take {here}."
    near = get_close_matches(word.lower(), known, 2)
    return f": did you mean {' or '.join(near)}?" if near else "."


def meant_instead(error: click.NoSuchOption) -> click.UsageError | None:
    """An error that names the option or argument which is the same here; None when the tables have none."""
    if error.ctx is None:
        return None
    params = error.ctx.command.params
    options = {name: param for param in params if isinstance(param, click.Option) for name in param.opts}
    arguments = {param.name: param for param in params if isinstance(param, click.Argument)}
    word = error.option_name.lstrip("-").replace("-", "_").lower()
    meant = [name for name in _options(word) if name in options]
    places = [name for name in ARGUMENTS_ELSEWHERE.get(word, ()) if name in arguments]
    if meant:
        here = " or ".join(" ".join(filter(None, (name, options[name].metavar))) for name in meant)
        advice = f"here it is {here}"
    elif places:
        here = arguments[places[0]].metavar or places[0].upper()
        advice = f"give {here} as an argument, without an option"
    elif elsewhere := _of_generate(error.ctx, word):
        advice = f"`cascadekit generate` has {' or '.join(elsewhere)}"
    else:
        return None
    return click.UsageError(f"No such option {error.option_name}: {advice}.", error.ctx)


def _of_generate(ctx: click.Context, word: str) -> list[str]:
    """The options by which `generate` means `word`; those that change an image are tried with other commands too."""
    if ctx.command.name == "generate":
        return []
    return [name for name in (_option(word), *_options(word)) if name in IMAGE_OPTIONS]


def _options(word: str) -> list[str]:
    """The options that mean `word`, which is one of another program."""
    from ..schemas.messages import NAMES_ELSEWHERE

    return [_option(name) for name in NAMES_ELSEWHERE.get(word, ())]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
