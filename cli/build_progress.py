"""How `build` shows that a build goes on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

from .console import complain, err
from .escape import visible_line

if TYPE_CHECKING:
    from ..converters.tensorrt import BuildProgress

QUIET = 10.0  # seconds between two lines about one build in a pipe


@contextmanager
def build_progress() -> "Iterator[Callable[[BuildProgress], object]]":
    """Yield a function that shows progress: one changing line on a terminal, a line every 10 seconds in a pipe."""
    if err.is_terminal:
        from rich.text import Text

        with err.console.status("") as status:
            yield lambda progress: status.update(Text(visible_line(_line(progress))))
        return
    last: dict[str, float] = {}

    def print_some(progress: "BuildProgress") -> None:
        if progress.name not in last or monotonic() - last[progress.name] >= QUIET:
            last[progress.name] = monotonic()
            complain(_line(progress))

    yield print_some


def _line(progress: "BuildProgress") -> str:
    return (
        f"{progress.name}: {progress.elapsed:.0f} s of about {max(progress.estimate, 1):.0f}, {progress.phase}, "
        f"{progress.rss / 1e6:.0f} MB"
    )
