"""Options that people bring along from other programs, and what the same is called here."""

from collections.abc import Mapping

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
