"""The help of a command: options in groups, examples on lines of their own, nothing wider than the terminal."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from inspect import cleandoc
from typing import Any

import click

WIDEST_CHOICE = 24  # columns of "[a|b]"; longer ones are listed in the text
NARROW = {"INTEGER RANGE": "N", "INTEGER": "N", "FLOAT RANGE": "X", "FLOAT": "X"}
EXAMPLE = re.compile(r"^(?:(?P<title>[^:]*): )?(?P<command>(?:cascadekit |eval ).*)$")
# click's own words: the range of a number, and a default in brackets within brackets.
_RANGE = r"(?:-?[\d.e+]+<=?x<=?-?[\d.e+]+|x[<>]=?-?[\d.e+]+)"
RANGE = re.compile(rf";\s*{_RANGE}(?=\])|\s*\[{_RANGE}\]")
BRACKETS = re.compile(r"\[default: \((.*?)\)(?=[\];])")
OTHERS = "Options"

OptionRows = list[tuple[str, str]]


class HelpfulCommand(click.Command):
    """A command whose help has a section for each of `groups`, from titles to the names of their parameters.

    The docstring ends with its examples: a paragraph of lines such as "Example: cascadekit ..."."""

    def __init__(self, *arguments: Any, groups: Mapping[str, Sequence[str]] | None = None, **extra: Any) -> None:
        super().__init__(*arguments, **extra)
        self.groups = dict(groups or {})

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the text without its examples, which follow the options."""
        text, _ = _parted(self.help or "")
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(text)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in their groups; those of no group come last."""
        rows: dict[str, OptionRows] = {title: [] for title in (*self.groups, OTHERS)}
        of = {name: title for title, names in self.groups.items() for name in names}
        for param in self.get_params(ctx):
            if record := _record(param, ctx):
                rows[of.get(param.name or "", OTHERS)].append(record)
        for title, found in rows.items():
            if found:
                with formatter.section(title):
                    formatter.write_dl(found)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, each command on lines of its own."""
        super().format_epilog(ctx, formatter)
        _, examples = _parted(self.help or "")
        if examples:
            formatter.write_paragraph()
            formatter.write("Examples:\n" if len(examples) > 1 else "Example:\n")
            for title, command in examples:
                formatter.write(f"  # {title}\n" if title not in ("Example", "") else "")
                formatter.write(_broken(command, formatter.width))


def _parted(help_text: str) -> tuple[str, list[tuple[str, str]]]:
    """The text, and the examples as (title, command); a command may go on in further lines."""
    text, mark, rest = cleandoc(help_text).partition("\n\nExample: ")
    examples: list[tuple[str, str]] = []
    for line in f"Example: {rest}".splitlines() if mark else ():
        if match := EXAMPLE.match(line.strip()):
            examples.append((match["title"] or "", match["command"]))
        elif line.strip():
            examples[-1] = (examples[-1][0], f"{examples[-1][1]} {line.strip()}")
    return text, examples


def _broken(command: str, width: int) -> str:
    r"""A command in lines; those that go on end with a backslash, so that they can be pasted."""
    lines = textwrap.wrap(command, width - 4, break_long_words=False, break_on_hyphens=False, subsequent_indent="  ")
    return " \\\n".join(f"  {line}" for line in lines) + "\n"


def _record(param: click.Parameter, ctx: click.Context) -> tuple[str, str] | None:
    """An option's names and text. Long lists of choices move from the names to the text."""
    record = param.get_help_record(ctx)
    if record is None or not isinstance(param, click.Option):
        return None
    names, text = record
    metavar = param.make_metavar(ctx)
    text = BRACKETS.sub(r"[default: \1", RANGE.sub("", text))
    if metavar in NARROW:
        names = names.replace(metavar, NARROW[metavar])
    elif isinstance(param.type, click.Choice) and len(metavar) > WIDEST_CHOICE and metavar.startswith("["):
        names = names.replace(metavar, "NAME")
        text = f"{', '.join(map(str, param.type.choices))}.  {text}".strip()
    return names, text
