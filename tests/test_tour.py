"""The tour of docs/tour.md: every task runs, and its pictures show what the page says."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

from tools.terminal import Screen
from tools.tour import IMAGES, PAGE, tasks

ROOT = Path(__file__).parents[1]
TASKS = tasks(PAGE.read_text(encoding="utf-8"))
# With ONNX Runtime, as all tests (see conftest.py): OpenVINO would compile the cascade anew for each image.
TOUR = """
import sys
from pathlib import Path
from cascadekit.runtime.engines import engine_table
engine_table.CHOICES = tuple(choice for choice in engine_table.CHOICES if choice.device != "cpu")
from tools.tour import main
main(Path(sys.argv[1]))
"""


def test_there_are_twenty_tasks() -> None:
    assert [task.number for task in TASKS] == list(range(1, 21))
    assert all(task.commands for task in TASKS)
    assert len({task.title for task in TASKS}) == 20


def test_pictures_show_the_commands_of_the_page() -> None:
    """They are made by hand, so a command that was changed on the page would be forgotten."""
    for task in TASKS:
        if task.image:
            drawn = squeezed(html.unescape(re.sub(r"<[^>]+>", "", (IMAGES / task.image).read_text(encoding="utf-8"))))
            assert all(squeezed(f"$ {command}") in drawn for command in task.commands), task.image
    assert {path.name for path in IMAGES.glob("tour-*")} == {task.image for task in TASKS if task.image}


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


def test_pictures_load_nothing() -> None:
    for path in IMAGES.glob("*.svg"):
        text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?://(?!www\.textualize\.io)|@import|url\((?!#)", text), path


def test_the_screen_of_a_terminal() -> None:
    """Rows by hand: a bar that is overwritten, a step up, an erased row, colours, and a row that is too long."""
    screen = Screen(columns=6)
    screen.write("10%\r\n\x1b[1A\x1b[2K20%\rab\x1b[31mc\x1b[0m\r\n1234567\r\n")
    assert screen.lines() == ["abc", "123456", "7", ""]
    assert screen.broken == {1}
    assert screen.coloured()[0] == "\x1b[0;ma\x1b[0;mb\x1b[0;31mc"


def test_every_task_runs(tmp_path: Path) -> None:
    """In a process of its own, because a terminal takes the place of standard output."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TOUR, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.findall(r"^(\d+)\. ", ended.stdout, re.M) == [str(n) for n in range(1, 21)]
    assert {path.name for path in tmp_path.iterdir()} == {task.image for task in TASKS if task.image}
    assert "a line is broken" not in ended.stdout
