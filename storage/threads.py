"""Runs tasks in a few worker threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

CAST_THREADS = 2

Subject = TypeVar("Subject")
Result = TypeVar("Result")


def run_in_order(
    pool: ThreadPoolExecutor, tasks: Iterable[tuple[Subject, Callable[[], Result]]]
) -> Iterator[tuple[Subject, Result]]:
    """Run the tasks in worker threads and yield their results in order, each with the subject that came with its task.

    Each task reads, computes and writes at its own place, so no block waits for another. Only as many tasks are
    submitted as keep the workers busy."""
    waiting: deque[tuple[Subject, Future[Result]]] = deque()
    for subject, task in tasks:
        waiting.append((subject, pool.submit(task)))
        if len(waiting) > 2 * CAST_THREADS:
            first, future = waiting.popleft()
            yield first, future.result()
    for subject, future in waiting:
        yield subject, future.result()
