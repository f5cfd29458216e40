"""Where the program starts: `cascadekit`, and `python -m cascadekit`. Ctrl-C counts from the first import on."""

import sys


def main() -> None:
    """The command line. Importing it takes a moment, in which Ctrl-C would otherwise end in a traceback."""
    try:
        from .cli import main as program
    except BaseException as error:
        if not _interrupted(error):
            raise
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    program()


def _interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C is behind the error: extension modules turn it into an ImportError."""
    from .schemas.errors import reraise_interrupt

    try:
        reraise_interrupt(error)
    except KeyboardInterrupt:
        return True
    return False


if __name__ == "__main__":
    main()
