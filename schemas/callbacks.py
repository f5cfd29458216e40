"""Types of the functions that a caller passes in to follow the progress of the work."""

from collections.abc import Callable

Say = Callable[[str], object]
"""Called with one line of text for the user."""

Progress = Callable[[int], object]
"""Called with the number of bytes that were written since the last call."""

StartFile = Callable[[str, int], Progress]
"""Called with the name and size in bytes of a file before it is written; returns the `Progress` of that file."""


class _Ignored:
    """A callback that does nothing; as a default it has a short name in `help()`."""

    def __call__(self, *arguments: object) -> None: ...

    def __repr__(self) -> str:
        return "ignored"


ignored = _Ignored()
"""The default of callbacks, which does nothing."""
