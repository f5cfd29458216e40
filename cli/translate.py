"""Turn the Python arguments that a message names into the options of the running command.

Code below `cli/` speaks of arguments: ``add force=True``. On the command line the same advice reads ``add --force``.
"""

import ast
import re
from typing import Any

import click

# A name, "=", and a literal. What stands around it must not be part of a path, a longer name or a larger expression.
_ARGUMENT = re.compile(
    r"""(?<![^\s(`'"])(?P<name>[a-z][a-z0-9_]*)=
    (?P<value>True|False|None|\.\.\.|"[^"\n]*"|-?\d+(?:\.\d+)?|\([^()\n]*\)|\[[^\[\]\n]*\]|\{[^{}\n]*\})
    (?=[,;:.!?)`'"]*(?:\s|$))""",
    re.VERBOSE,
)
_RUNNING = "cascadekit.command"  # the key of `click.Context.meta` for the command that runs


def remember_command(ctx: click.Context, command: click.Command) -> None:
    """Store `command` as the one that runs. A nested group calls this again with the command inside it."""
    ctx.meta[_RUNNING] = command


def in_options(text: str, ctx: click.Context | None = None) -> str:
    """Return `text` with each argument of the running command written as its option.

    `ctx` is any context of the run; the current one when left out. Without a running command the text stays."""
    ctx = ctx or click.get_current_context(silent=True)
    command = ctx.meta.get(_RUNNING) if ctx else None
    return as_options(text, command) if command else text


def as_options(text: str, command: click.Command) -> str:
    """Return `text` with every ``name=literal`` whose name is an option of `command` written as that option.

    | in the message            | in the result                     |
    |---------------------------|-----------------------------------|
    | ``force=True``            | ``--force``                       |
    | ``verdict=False``         | ``--no-verdict``                  |
    | ``variant=None``          | ``no --variant``                  |
    | ``weights="copy"``        | ``--weights copy``                |
    | ``size=(1024, 768)``      | ``--size 1024x768``               |
    | ``stages=["prior"]``      | ``--stage prior``                 |
    | ``precision={"prior": "fp32"}`` | ``--precision prior=fp32``  |
    | ``mask=...``              | ``--mask``                        |

    Text in any other form stays as it is, as do names that are no option of `command`."""
    options = _options_by_name(command)

    def replace(found: re.Match[str]) -> str:
        try:
            return _spelled(options, found["name"], ast.literal_eval(found["value"])) or found[0]
        except (ValueError, SyntaxError):
            return found[0]

    return _ARGUMENT.sub(replace, text)


def _options_by_name(command: click.Command) -> dict[str, click.Option]:
    """The options of `command` by the names of their arguments, and by their own long names."""
    options = [param for param in command.params if isinstance(param, click.Option)]
    named = {_argument_name(name): option for option in options for name in option.opts if name.startswith("--")}
    return {**named, **{option.name: option for option in options if option.name}}


def _argument_name(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _spelled(options: dict[str, click.Option], name: str, value: Any) -> str | None:
    """``name=value`` as an option; None when the command has no option that says so."""
    if value is False and (negative := _negative(options, name)):
        return negative
    option = options.get(name)
    if option is None:
        return None
    flag = _long(option.opts)
    if value is False or value is None:
        return f"no {flag}"
    if option.is_flag or value is ...:
        return flag if value is True or value is ... else None
    if value is True:
        return None
    if isinstance(value, dict):
        return _repeated(flag, [f"{key}={each}" for key, each in value.items()])
    if isinstance(value, tuple) and all(isinstance(each, int | float) for each in value) and not option.multiple:
        return _repeated(flag, ["x".join(map(str, value))])
    return _repeated(flag, value if isinstance(value, list | tuple) else [value])


def _negative(options: dict[str, click.Option], name: str) -> str | None:
    """The option that switches `name` off: the second name of a pair, or a flag of its own."""
    if name in options and options[name].secondary_opts:
        return _long(options[name].secondary_opts)
    if f"no_{name}" in options:
        return _long(options[f"no_{name}"].opts)
    return None


def _long(names: list[str]) -> str:
    return max(names, key=len)


def _repeated(flag: str, values: list[Any] | tuple[Any, ...]) -> str:
    import shlex

    return " ".join(f"{flag} {shlex.quote(str(value))}" for value in values)
