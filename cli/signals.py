"""SIGTERM and SIGHUP end a command as Ctrl-C does: half-written files are removed, started processes are ended."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHELL_BASE = 128  # shells add this to the number of the signal that ended a program

_received: list[int] = []


class Stopped(KeyboardInterrupt):
    """One of the signals that end a command."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = SHELL_BASE + number


def received() -> Stopped | None:
    """The signal that arrived since `ending` was entered, even if the interrupted code hid its exception."""
    return Stopped(_received[0]) if _received else None


@contextmanager
def ending() -> Iterator[None]:
    """Inside, the signals raise Stopped. A signal that was ignored before, as by nohup, stays ignored."""

    def handle(number: int, frame: FrameType | None) -> None:
        # Init systems and closing terminals send several signals; only Ctrl-C cuts the cleaning up short.
        if number == signal.SIGINT or not set(_received) - {signal.SIGINT}:
            _received.append(number)
            raise Stopped(number)

    _received.clear()
    with _handled(handle):
        yield


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Inside, a signal takes effect when the yielded function is called; a second signal takes effect at once."""
    waiting: list[int] = []

    def stop() -> None:
        if waiting:
            raise Stopped(waiting[0])

    def handle(number: int, frame: FrameType | None) -> None:
        waiting.append(number)
        if len(waiting) > 1:
            stop()

    with _handled(handle):
        yield stop


@contextmanager
def _handled(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, `handle` handles the signals that are not ignored. Python allows this in the main thread only."""
    before: Mapping[int, object] = {}
    if threading.current_thread() is threading.main_thread():
        chosen = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, handle) for number in chosen}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
