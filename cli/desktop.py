"""Shows pages and folders on the screen of this machine, where somebody sits in front of it."""

import os
import sys
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from threading import Thread

import click

DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY")  # one of them is set where Linux has a screen


def has_screen(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> bool:
    """True if a window opened now would be seen: there is a display, and nobody came through ssh."""
    if any(environment.get(name) for name in ("SSH_CONNECTION", "SSH_TTY")):
        return False
    return platform in ("win32", "darwin") or any(environment.get(name) for name in DISPLAYS)


def is_terminal() -> bool:
    """True if standard output is a terminal, so that somebody reads it now."""
    return sys.stdout is not None and sys.stdout.isatty()


def show_page(url: str) -> None:
    """Open `url` in the browser. A browser that takes its time, or that writes to the terminal, delays nothing."""
    Thread(target=webbrowser.open, args=(url,), daemon=True).start()


def show_folder(folder: Path) -> None:
    """Open `folder` in the file manager; it is made if it is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    click.launch(str(folder))
