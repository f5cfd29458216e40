"""The calls that an input is given to, and the ends that they may have."""

from collections.abc import Callable
from pathlib import Path
from random import Random

from click.testing import CliRunner

from cascadekit.cli import main
from cascadekit.schemas.errors import CascadeError

from .corpus import Corpus

Call = Callable[[], object]  # what consumes an input
Kind = Callable[[Random, Corpus, Path], Call]  # writes an input into a folder

CODES = (0, 1, 2)


class RefusedError(CascadeError):
    """The command line said no, in words."""


class WrongError(Exception):
    """It said so in another way than users are to see."""


def command(*arguments: object) -> Call:
    """The command line in this process. Raises RefusedError where it exits with 1 or 2; all else comes as it is."""

    def call() -> None:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        said = " ".join(result.output.split())  # a terminal breaks lines
        if result.exit_code not in CODES or "Traceback" in said or "this is a bug of cascadekit" in said:
            raise WrongError(f"exit code {result.exit_code}: {said[-300:]}")
        if result.exit_code:
            if not result.output.strip():
                raise WrongError(f"exit code {result.exit_code} without a word")
            raise RefusedError(result.output)

    return call


def several(*calls: Call) -> Call:
    """One after the other, until one refuses."""

    def call() -> None:
        for each in calls:
            each()

    return call
