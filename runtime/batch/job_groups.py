"""Finds the jobs whose images are computed together. The same jobs make the same groups, wherever they are computed."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from ...schemas.request import Request
from ..text.prompts import CACHED_ROWS
from .generate_requests import request_groups
from .image_jobs import ImageJob

TOKENS = 75  # of a chunk, without its start and end tokens


def job_groups(
    jobs: Sequence[ImageJob], together: int | None, length: Callable[[Request], int]
) -> Iterator[list[ImageJob]]:
    """Yield the groups of a window, in the order of their first jobs; the arguments are those of `request_groups`."""
    order = {group: place for place, group in reversed(list(enumerate(job.request.group for job in jobs)))}
    ordered = sorted(jobs, key=lambda job: (order[job.request.group], length(job.request)))
    left = iter(ordered)
    for group in request_groups([job.request for job in ordered], together, length):
        yield [next(left) for _ in group]


def windows(jobs: Iterable[ImageJob], rows: int = CACHED_ROWS - 1) -> Iterator[list[ImageJob]]:
    """Yield successive jobs whose prompts have at most `rows` rows of tokens together, at least one job at a time.

    The text cache has one row more, for the empty prompt."""
    window: list[ImageJob] = []
    texts: dict[tuple[str, bool], int] = {}
    for job in jobs:
        settings = job.request.settings
        new = {
            (text, settings.weighted): 1 + len(text.encode()) // TOKENS if settings.long_prompts else 1
            for text in (job.request.prompt, job.request.negative)
        }
        if window and sum((texts | new).values()) > rows:
            yield window
            window, texts = [], {}
        window.append(job)
        texts |= new
    if window:
        yield window
