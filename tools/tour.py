"""python -m tools.tour [FOLDER]: runs the tasks of docs/tour.md, and writes their pictures into docs/images or FOLDER.

Each command runs on a terminal of 80 columns, and is named when a line is so long that the terminal breaks it. The
commands of cascadekit run in this process: libraries are imported once, not twenty times.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cascadekit.cli import main as cascadekit
from cascadekit.converters.checkpoints.example_model import copy_example_model
from cascadekit.runtime.engines import cpu_flags

from .terminal import Screen, picture, terminal

ROOT = Path(__file__).parents[1]
PAGE, IMAGES = ROOT / "docs" / "tour.md", ROOT / "docs" / "images"
COLUMNS = 80
NOT_HERE = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "XDG_DATA_HOME", "CI")


@dataclass(frozen=True)
class Task:
    """A section of the page. `image` is the file name of its picture, if it has one."""

    number: int
    title: str
    commands: tuple[str, ...]
    image: str | None


def tasks(page: str) -> list[Task]:
    """The tasks of the page, in its order."""
    found = []
    for number, title, body in re.findall(r"^## (\d+)\. ([^\n]*)\n(.*?)(?=^## |\Z)", page, re.M | re.S):
        commands = [line for block in re.findall(r"^```\n(.*?)^```", body, re.M | re.S) for line in block.splitlines()]
        image = re.search(r"\]\(images/([\w-]+\.svg)\)", body)
        found.append(Task(int(number), title, tuple(commands), image and image[1]))
    return found


def prepare(folder: Path) -> None:
    """Make in `folder` what the tour begins with: the model of `make demo`, and the checkout's examples."""
    copy_example_model(folder / "demo" / "original", folder / "demo" / "lora")
    (folder / "examples").symlink_to(ROOT / "examples")


def run(command: str) -> Screen:
    """Run `command` on a terminal, in the current folder. Raises SystemExit with what it printed when it fails."""
    code: int | str | None = 0
    with terminal(COLUMNS) as screen:
        if command.startswith("cascadekit "):
            try:
                cascadekit(shlex.split(command)[1:], prog_name="cascadekit")
            except SystemExit as ended:
                code = ended.code
        else:
            code = subprocess.run(command, shell=True).returncode
    if code:
        raise SystemExit("\n".join([f"$ {command}", *screen.lines(), f"exit code {code}"]))
    return screen


def main(images: Path = IMAGES) -> None:
    """Run all tasks in a folder of their own, and write their pictures into `images`."""
    images = images.absolute()
    for name in NOT_HERE:
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="tour-") as folder:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        os.environ.update(HOME=folder, TERM="xterm-256color", COLORTERM="truecolor", PATH=path)
        cpu_flags.BF16 = cpu_flags.BF16_CONVERTED = frozenset()  # every CPU's pictures show the engine that all have
        prepare(Path(folder))
        os.chdir(folder)
        for task in tasks(PAGE.read_text(encoding="utf-8")):
            screens = [(command, run(command)) for command in task.commands]
            print(f"{task.number}. {task.title}")
            for command, screen in screens:
                if screen.broken:
                    print(f"a line is broken: {command}")
            if task.image:
                (images / task.image).write_text(picture(screens, f"cascadekit: {task.title}"), encoding="utf-8")
        os.chdir(ROOT)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
