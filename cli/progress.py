"""Progress of the command line: bars on a terminal, plain lines in a pipe."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

from .console import complain, err, out, say
from .escape import visible_line

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from ..converters.tensorrt import BuildProgress
    from ..runtime.sampling.loop import OnStep

HOUR = 3600.0  # seconds; images may take minutes each, and an estimate needs several
QUIET = 10.0  # seconds between two lines about one build in a pipe

Steps = Callable[[str, int, int], object]  # called with a name, the steps done and their total


def _bars(*columns: "ProgressColumn", **how: Any) -> "Progress":
    """Bars on standard error: a description, the bar, `columns`, and the time that remains."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    description = TextColumn("{task.description}", markup=False)
    return Progress(description, BarColumn(), *columns, TimeRemainingColumn(), console=err.console, **how)


@contextmanager
def byte_progress() -> Iterator[Callable[[str, int], Callable[[int], object]]]:
    """Progress over bytes. Call the yielded function with a file's name and size; call the function that it returns
    with each number of bytes done."""
    if not err.is_terminal:

        def announce(name: str, total: int) -> Callable[[int], object]:
            complain(f"{name}: {total / 1e6:.1f} MB")
            return lambda done: None

        yield announce
        return
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _bars(DownloadColumn(), TransferSpeedColumn()) as bars:

        def start(name: str, total: int) -> Callable[[int], object]:
            task = bars.add_task(visible_line(name), total=total)
            return lambda done: bars.advance(task, done)

        yield start


@contextmanager
def step_progress() -> Iterator[Steps]:
    """Progress over steps: call the yielded function with a name, the steps done and their total."""
    if not err.is_terminal:
        yield lambda name, done, total: complain(f"{name}: {total} steps") if done == total else None
        return
    from rich.progress import MofNCompleteColumn

    with _bars(MofNCompleteColumn()) as bars:
        tasks: dict[str, Any] = {}

        def update(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(visible_line(name), total=total)
            bars.update(tasks[name], completed=done)

        yield update


@dataclass(frozen=True)
class BatchBars:
    """`image` is called with the number of images done, `step` as what `step_progress` yields, `say` with a line."""

    image: Callable[[int], object]
    step: Steps
    say: Callable[[str], object]


@contextmanager
def batch_progress(total: int) -> Iterator[BatchBars]:
    """Progress over `total` images, and over the steps of the images in work.

    In a pipe there are no bars: a line is printed for each image."""
    if not err.is_terminal:
        yield BatchBars(lambda done: None, lambda name, done, steps: None, say)
        return
    from rich.progress import MofNCompleteColumn, TimeElapsedColumn

    with _bars(MofNCompleteColumn(), TimeElapsedColumn(), speed_estimate_period=HOUR) as bars:
        images = bars.add_task("images", total=total)
        tasks: dict[str, Any] = {}

        def step(name: str, done: int, steps: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(visible_line(name), total=steps)
            elif done == 1:  # the next images
                bars.reset(tasks[name], total=steps)
            bars.update(tasks[name], completed=done)

        # A line on the bars' own terminal goes through their console, which makes room for it.
        lines = err if out.is_terminal else out
        yield BatchBars(lambda done: bars.update(images, completed=done), step, lambda text: say(text, lines))


def step_bars(steps: Steps) -> "OnStep":
    """A function that is called after each step of sampling, and moves the bars of `steps`."""
    return lambda stage, step: steps(stage, step.index + 1, step.steps)


@contextmanager
def build_progress() -> "Iterator[Callable[[BuildProgress], object]]":
    """Yield a function that shows progress: one changing line on a terminal, a line every 10 seconds in a pipe."""
    if err.is_terminal:
        from rich.text import Text

        with err.console.status("") as status:
            yield lambda progress: status.update(Text(visible_line(_build_line(progress))))
        return
    last: dict[str, float] = {}

    def print_some(progress: "BuildProgress") -> None:
        if progress.name not in last or monotonic() - last[progress.name] >= QUIET:
            last[progress.name] = monotonic()
            complain(_build_line(progress))

    yield print_some


def _build_line(progress: "BuildProgress") -> str:
    return (
        f"{progress.name}: {progress.elapsed:.0f} s of about {max(progress.estimate, 1):.0f}, {progress.phase}, "
        f"{progress.rss / 1e6:.0f} MB"
    )
