"""Progress of the command line: bars on a terminal, plain lines in a pipe, nothing with --quiet.

Bars disappear when their work is done; what stays are the lines that were written beside them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from ..schemas.callbacks import Progress, StartFile, ignored
from ..schemas.passes import Passes
from ..schemas.stages import Stage
from .console import Volume, err, inform, volume
from .escape import visible_line
from .remaining import Remaining

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import ProgressColumn

    from ..converters.tensorrt import BuildProgress
    from ..runtime.sampling.loop import Step

HOUR = 3600.0  # seconds; images may take minutes each, and an estimate needs several
BETWEEN = 10.0  # seconds between two lines about one build in a pipe
RESTING = 4.0  # times a second that bars are drawn

Shown = TypeVar("Shown", bound=AbstractContextManager[Any])


@contextmanager
def _shown(bars: Shown) -> Iterator[Shown]:
    """Show `bars` on standard error. Lines written meanwhile stay above them."""
    with bars:
        err.has_bars = True
        try:
            yield bars
        finally:
            err.has_bars = False


def _bars(*columns: "ProgressColumn", **how: Any) -> "AbstractContextManager[Bars]":
    """Bars on standard error: a description, the bar, and `columns`."""
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    description = TextColumn("{task.description}", markup=False)
    how |= {"console": err.console, "transient": True, "refresh_per_second": RESTING}
    return _shown(Bars(description, BarColumn(24), *columns, **how))


def _has_bars() -> bool:
    return err.is_terminal and volume() is not Volume.QUIET


@contextmanager
def byte_progress() -> Iterator[StartFile]:
    """Progress over the bytes of files, which the yielded function begins."""
    if not _has_bars():

        def announce(name: str, total: int) -> Progress:
            inform(f"{name}: {total / 1e6:.1f} MB")
            return ignored

        yield announce
        return
    from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    with _bars(DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as bars:

        def start(name: str, total: int) -> Progress:
            task = bars.add_task(visible_line(name), total=total)

            def advance(done: int) -> None:
                bars.advance(task, done)
                if bars.tasks[bars.task_ids.index(task)].finished:
                    bars.remove_task(task)
                    inform(f"{name}: {total / 1e6:.1f} MB")

            return advance

        yield start


@dataclass(frozen=True)
class RunProgress:
    """The functions that follow a run of `generate`.

    `loading` is called with each stage that is loaded and its bytes, `step` after each step of sampling. `image` is
    called with the number of images that are done."""

    loading: Callable[[Stage, int], object]
    step: "Callable[[Stage, Step], object]"
    image: Callable[[int], object]


@contextmanager
def run_progress(groups: Sequence[Passes], images: int) -> Iterator[RunProgress]:
    """Progress over `images` images, generated in `groups`: one bar with the time that the whole run still takes.

    Each stage that is loaded is named once. In a pipe a line is printed at the end of each stage."""
    named: set[Stage] = set()

    def loading(stage: Stage, nbytes: int) -> None:
        if stage not in named:
            named.add(stage)
            inform(f"loading {stage} ({nbytes / 1e6:.1f} MB)")

    if not _has_bars():

        def print_end(stage: Stage, step: "Step") -> None:
            if step.index + 1 == step.steps:
                inform(f"{stage}: {step.steps} steps")

        yield RunProgress(loading, print_end, ignored)
        return
    from rich.progress import TimeElapsedColumn

    remaining, start = Remaining(groups), monotonic()
    with _bars(_left_column(remaining.seconds), TimeElapsedColumn()) as bars:
        task = bars.add_task("starting", total=1.0)
        counted = f"{{}} of {images} images, " if images > 1 else ""
        finished = 0

        def show(what: str) -> None:
            elapsed, left = monotonic() - start, remaining.seconds()
            share = 0.0 if left is None else elapsed / max(elapsed + left, 1e-9)
            bars.update(task, description=counted.format(finished) + what, completed=share)

        def show_loading(stage: Stage, nbytes: int) -> None:
            loading(stage, nbytes)
            show(str(stage))

        def step(stage: Stage, step: "Step") -> None:
            remaining.step(stage, step.index + 1)
            show(f"{stage} {step.index + 1}/{step.steps}")

        def image(done: int) -> None:
            nonlocal finished
            finished = done
            remaining.decoded()
            show(str(Stage.VQGAN))

        yield RunProgress(show_loading, step, image)


def _left_column(seconds: Callable[[], float | None]) -> "ProgressColumn":
    """A column with the time that is left, by `seconds`."""
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Left(ProgressColumn):
        def render(self, task: Any) -> Text:
            left = seconds()
            return Text("" if left is None or left < 1 else f"about {in_words(left)} left")

    return Left()


def in_words(seconds: float) -> str:
    """A duration for people: 12 s, 3 min, 2 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


@contextmanager
def batch_progress(total: int) -> Iterator[RunProgress]:
    """Progress over `total` images, with the time that they still take, and over the steps of the images in work.

    Loading is not shown. In a pipe there are no bars: a line is printed for each image."""
    if not _has_bars():
        yield RunProgress(ignored, ignored, ignored)
        return
    from rich.progress import MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with _bars(*columns, speed_estimate_period=HOUR) as bars:
        images = bars.add_task("images", total=total)

        def step(stage: Stage, step: "Step") -> None:
            bars.update(images, description=f"images, {stage} {step.index + 1}/{step.steps}")

        yield RunProgress(ignored, step, lambda done: bars.update(images, completed=done))


@contextmanager
def build_progress() -> "Iterator[Callable[[BuildProgress], object]]":
    """Yield a function that shows progress: one changing line on a terminal, a line every 10 seconds in a pipe."""
    if _has_bars():
        from rich.text import Text

        with _shown(err.console.status("")) as status:
            yield lambda progress: status.update(Text(visible_line(_build_line(progress))))
        return
    last: dict[str, float] = {}

    def print_some(progress: "BuildProgress") -> None:
        if progress.name not in last or monotonic() - last[progress.name] >= BETWEEN:
            last[progress.name] = monotonic()
            inform(_build_line(progress))

    yield print_some


def _build_line(progress: "BuildProgress") -> str:
    return (
        f"{progress.name}: {progress.elapsed:.0f} s of about {max(progress.estimate, 1):.0f}, {progress.phase}, "
        f"{progress.rss / 1e6:.0f} MB"
    )
