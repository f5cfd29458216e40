"""The entry point of `cascadekit` and `python -m cascadekit`. Ctrl-C works from the first import on."""

import os
import sys


def main() -> None:
    """Run the command line. Importing it takes a moment, in which Ctrl-C would otherwise end in a traceback."""
    # pydantic would look through all installed packages for plugins of its own, which takes 0.05 s.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        from .cli import main as program
    except BaseException as error:
        if not _interrupted(error):
            raise
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    program()


def _interrupted(error: BaseException) -> bool:
    """True when Ctrl-C caused the error. Extension modules turn it into an ImportError."""
    from .schemas.errors import reraise_interrupt

    try:
        reraise_interrupt(error)
    except KeyboardInterrupt:
        return True
    return False


if __name__ == "__main__":
    main()
