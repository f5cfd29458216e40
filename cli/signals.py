"""SIGTERM and SIGHUP end a command as Ctrl-C does: what is half-written is removed, processes started are ended."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHELL_BASE = 128  # shells add it to the number of the signal that ended a program

_received: list[int] = []


class Stopped(KeyboardInterrupt):
    """One of the signals that end a command."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = SHELL_BASE + number


def received() -> Stopped | None:
    """The signal that came since `ending` was entered, however the code that it struck took it."""
    return Stopped(_received[0]) if _received else None


@contextmanager
def ending() -> Iterator[None]:
    """Inside, the signals raise Stopped. One that was ignored already, as by nohup, stays so."""

    def handle(number: int, frame: FrameType | None) -> None:
        # Init systems and closing terminals send several: cleaning up is cut short by Ctrl-C alone.
        if number == signal.SIGINT or not set(_received) - {signal.SIGINT}:
            _received.append(number)
            raise Stopped(number)

    _received.clear()
    with _handled(handle):
        yield


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """The signals take effect where the yielded function is called; a second one does at once."""
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
    """`handle` for the signals that nobody ignores. Python lets only the main thread choose."""
    before: Mapping[int, object] = {}
    if threading.current_thread() is threading.main_thread():
        chosen = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, handle) for number in chosen}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
