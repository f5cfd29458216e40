"""Clusters of two nodes that ask for a token: who is refused, and many commands while a node dies."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cascadekit import inspect

pytest.importorskip("ray", reason="ray is not installed")
pytestmark = pytest.mark.slow

PATIENCE = 600.0  # seconds for all commands


def node() -> dict[str, Any]:
    return {"num_cpus": 1, "memory": 1 << 30, "object_store_memory": 100 << 20, "include_dashboard": False}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    for name, value in {**given, "RAY_worker_niceness": "0"}.items():
        monkeypatch.setenv(name, value)
    reads_environment()
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args=node())
    yield made
    made.shutdown()
    monkeypatch.undo()
    reads_environment()


def reads_environment() -> None:
    """Ray keeps the mode and the token that it found when it was imported."""
    from ray._raylet import AuthenticationTokenLoader, Config

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def users(home: Path, **more: str) -> Mapping[str, str]:
    """The environment of a user, who sets no mode."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    return {**plain, "HOME": str(home), **more}


def silent() -> socket.socket:
    """Listens, and says nothing."""
    one = socket.socket()
    one.bind(("127.0.0.1", 0))
    one.listen()
    return one


def test_who_is_refused(cluster: Any, tmp_path: Path) -> None:
    """Each in one line, within a minute or so; and who has the token gets further."""
    (tmp_path / "c.txt").write_text(f"convert {tmp_path}/none -o {tmp_path}/x --to diffusers\n")
    token = os.environ["RAY_AUTH_TOKEN"]
    (tmp_path / ".ray").mkdir()
    with silent() as other:
        at_other = f"127.0.0.1:{other.getsockname()[1]}"
        for address, env, said in (
            (cluster.address, users(tmp_path), "put its token into $RAY_AUTH_TOKEN"),
            (cluster.address, users(tmp_path, RAY_AUTH_TOKEN=secrets.token_hex(32)), "into $RAY_AUTH_TOKEN"),
            (at_other, users(tmp_path, RAY_AUTH_TOKEN=token), "something answers there, but no cluster"),
            ("127.0.0.1:1", users(tmp_path, RAY_AUTH_TOKEN=token), "no cluster answers there"),
            (cluster.address, users(tmp_path, RAY_AUTH_TOKEN=token), "1 failed; log: "),
        ):
            began = time.monotonic()
            words = [sys.executable, "-m", "cascadekit", "many", str(tmp_path / "c.txt"), "--ray", address]
            ended = subprocess.run(words, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
            output = ended.stderr + ended.stdout
            assert said in output, (address, output)
            assert time.monotonic() - began < 120
            assert token not in output
            if "1 failed" not in said:
                assert (ended.returncode, len(ended.stderr.splitlines()), ended.stdout) == (2, 1, ""), output


def commands_on(node: Any) -> list[Any]:
    """The processes of the commands that run on a node."""
    import psutil

    (raylet,) = (each.process.pid for each in node.all_processes["raylet"])
    found = []
    for process in psutil.Process(raylet).children(recursive=True):
        try:
            if "cascadekit" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_many_commands_while_a_node_dies(cluster: Any, original: Path, tmp_path: Path) -> None:
    """Conversions and exports of several checkpoints on two nodes, one of which dies with its command."""
    second = cluster.add_node(**node())
    cluster.wait_for_nodes()
    models = [shutil.copytree(original, tmp_path / f"source{number}") for number in range(3)]
    large = tmp_path / "large"
    large.mkdir()
    with (large / "weights").open("wb") as file:
        file.truncate(2 << 30)  # a hole
    lines = [f"convert {each} -o {each}-model --to diffusers" for each in models]
    lines += [f"export {each} -o {each}-bundle" for each in models]
    lines += [f"export {tmp_path}/none -o {tmp_path}/x", f"build {large} --backend tensorrt-rtx"]
    (tmp_path / "c.txt").write_text("\n".join(lines))
    words = [sys.executable, "-m", "cascadekit", "many", str(tmp_path / "c.txt"), "--ray", cluster.address, "--json"]
    env = users(tmp_path, RAY_AUTH_TOKEN=os.environ["RAY_AUTH_TOKEN"])
    with (tmp_path / "report").open("w") as report:
        many = subprocess.Popen(words, env=env, stdout=report, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + PATIENCE
    while not (running := commands_on(second)):
        assert many.poll() is None, many.stderr and many.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)
    cluster.remove_node(second, allow_graceful=False)
    _, said = many.communicate(timeout=PATIENCE)
    assert many.returncode == 1, said
    facts = json.loads((tmp_path / "report").read_text())
    ended = {each["line"]: each for each in facts["commands"]}
    assert (facts["done"], facts["failed"], sorted(ended)) == (6, 2, list(range(1, 9))), facts
    assert "none" in ended[7]["error"]
    assert "no node has more than 1.1 GB" in ended[8]["error"]
    for each in models:
        assert inspect(f"{each}-model")
        assert inspect(f"{each}-bundle")
    for process in running:
        process.wait(30)  # its command ended with it, so that the second one had the output to itself

    again = subprocess.run(words, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    facts = json.loads(again.stdout)
    assert (facts["skipped"], facts["failed"]) == (6, 2)
