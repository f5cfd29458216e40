"""Many commands: what is read, what a command gives, and what a second run leaves out. The cluster is a stand-in."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cascadekit.runtime.batch.batch_log import BatchLog
from cascadekit.runtime.cluster.command_tasks import (
    CommandOutcome,
    CommandTask,
    read_commands,
    run_command,
    run_commands,
)
from cascadekit.schemas.errors import UsageError

MIB = 1 << 20


class RayHere:
    """Runs tasks at once, on one node of 1 GB."""

    exceptions = SimpleNamespace(RayError=ConnectionError)

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"memory": 1e9}}, {"Alive": False, "Resources": {"memory": 1e12}}]

    def remote(self, function: Callable[[CommandTask], CommandOutcome]) -> Any:
        def options(**asked: Any) -> Any:
            self.asked.append(asked)
            return SimpleNamespace(remote=lambda task: lambda: function(task))

        return SimpleNamespace(options=options)

    def wait(self, waiting: list[Any], num_returns: int) -> Any:
        return waiting[-num_returns:], waiting[:-num_returns]

    def get(self, ready: Callable[[], Any]) -> Any:
        return ready()


def commands(folder: Path, text: str) -> list[CommandTask]:
    (folder / "c.txt").write_text(text)
    return read_commands(folder / "c.txt")


def test_a_file_of_commands(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"0" * 100 * MIB)
    tasks = commands(
        tmp_path,
        f"# all\ncascadekit convert 'a b' -o c --to diffusers\n\nbuild {tmp_path}/model\nexport {tmp_path}/model",
    )
    assert [(task.line, task.words[:2]) for task in tasks] == [
        (2, ("convert", "a b")),
        (4, ("build", f"{tmp_path}/model")),
        (5, ("export", f"{tmp_path}/model")),
    ]
    assert [task.memory // MIB for task in tasks] == [256, 512 + 133, 256]


def test_a_file_as_other_editors_write_it(tmp_path: Path) -> None:
    """With a byte order mark, and with names that are no UTF-8 or hold a line separator of Unicode."""
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfconvert a -o b\r\nconvert 'a\xe2\x80\xa8b' -o \xff\r\n")
    first, second = read_commands(tmp_path / "c.txt")
    assert (first.words, second.line, second.words) == (
        ("convert", "a", "-o", "b"),
        2,
        ("convert", "a\u2028b", "-o", os.fsdecode(b"\xff")),
    )
    assert first.key != second.key


def test_lines_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        commands(tmp_path, "rm -rf x\nconvert 'a\nexport a -o b\ncascadekit\n")
    for said in (
        "c.txt:1: expected convert, export, build, found rm",
        "c.txt:2: No closing",
        "c.txt:4: ",
        "wrong lines in the file of commands: 3",
    ):
        assert said in str(error.value)
    with pytest.raises(UsageError, match="holds no commands"):
        commands(tmp_path, "# none\n")
    with pytest.raises(UsageError, match="cannot be read"):
        read_commands(tmp_path)


def test_commands_run_and_a_second_run_leaves_out_what_is_done(original: Path, tmp_path: Path) -> None:
    wanted = {"model": original, "x": tmp_path / "none"}
    text = "\n".join(f"convert {source} -o {tmp_path / name} --to diffusers" for name, source in wanted.items())
    tasks = commands(tmp_path, text)
    ray = RayHere()
    with BatchLog(tmp_path / "log") as log:
        kinds = {each.task.line: each for each in run_commands(ray, tasks, log)}
    assert (tmp_path / "model" / "prior").is_dir()
    assert {line: each.kind for line, each in kinds.items()} == {1: "done", 2: "failed"}
    assert "none" in (kinds[2].error or "")
    assert ray.asked == [{"memory": 256 * MIB, "num_cpus": 1, "max_retries": 3}] * 2
    with BatchLog(tmp_path / "log") as log:
        again = [each.kind for each in run_commands(RayHere(), tasks[:1], log)]
    assert again == ["skipped"]
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(event["event"] for event in events) == ["done", "failed", "skipped"]


def test_what_no_node_can_take(tmp_path: Path) -> None:
    task = CommandTask(1, ("build", "x"), 2 * 10**9)
    with BatchLog(tmp_path / "log") as log:
        (outcome,) = run_commands(RayHere(), [task], log)
    assert outcome.error == "the command needs about 2.0 GB, and no node has more than 1.0 GB"


def test_wrong_usage_is_kept_in_words(tmp_path: Path) -> None:
    outcome = run_command(CommandTask(1, ("export",), 0))
    assert outcome.kind == "failed"
    assert "Missing argument" in (outcome.error or "")
