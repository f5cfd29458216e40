"""500 prompts on a Ray cluster of two nodes, of which one dies, after an actor was killed.

The images are compared with those of one process, byte for byte.
"""

import json
import os
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="ray is not installed")
pytestmark = pytest.mark.slow

PROMPTS = 500
MAKING = "--size 64x64 --prior-steps 2 --decoder-steps 1 --engine onnxruntime --threads 1 --seed 7 --batch 1".split()
# More than a node of one CPU holds: both nodes have actors.
ACTORS = ("text_encoder=1,cpus=0.1", "prior=2,cpus=0.4", "decoder=2,cpus=0.4")
PATIENCE = 1800.0  # seconds for the whole batch


def command(bundle: Path, prompts: Path, output: Path, *more: str) -> list[str]:
    start = [sys.executable, "-m", "cascadekit", "generate", str(bundle), "--prompts", str(prompts)]
    return [*start, "-o", str(output), *MAKING, *more]


def waits_for(ready: Callable[[], Any]) -> Any:
    """The answer of `ready`, once there is one."""
    end = time.monotonic() + PATIENCE
    while not (found := ready()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head node that computes, and a token of its own."""
    for name, value in {
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args=node())
    yield made
    made.shutdown()


def node() -> dict[str, Any]:
    return {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}


def actors_of(node: Any, name: str) -> list[Any]:
    """The processes of a node's actors with `name` in their title."""
    import psutil

    (raylet,) = (each.process.pid for each in node.all_processes["raylet"])
    found = []
    for process in psutil.Process(raylet).children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_an_actor_and_a_node_die(tiny: Path, tmp_path: Path, cluster: Any) -> None:
    prompts, bundle = tmp_path / "p.txt", Path(os.environ.get("CASCADEKIT_TEST_BUNDLE", tiny / "bundle"))
    prompts.write_text("\n".join(f"picture {number}" for number in range(PROMPTS)))
    subprocess.run(command(bundle, prompts, tmp_path / "one"), check=True, capture_output=True)
    second = cluster.add_node(**node())
    cluster.wait_for_nodes()
    output = tmp_path / "many"
    arguments = command(bundle, prompts, output, "--json", "--ray", cluster.address)
    for each in ACTORS:
        arguments += ["--actors", each]
    with (tmp_path / "report").open("w") as report:
        batch = subprocess.Popen(arguments, stdout=report, stderr=subprocess.PIPE, text=True)

    def working(images: int, actor: str) -> list[Any]:
        """The second node's actors, once there are `images`."""
        assert batch.poll() is None, batch.stderr and batch.stderr.read()
        return actors_of(second, actor) if len(list(output.glob("*.png"))) >= images else []

    waits_for(lambda: working(20, "MapWorker"))[0].kill()
    waits_for(lambda: working(60, "MapWorker"))
    cluster.remove_node(second, allow_graceful=False)
    cluster.add_node(**node())  # in its place, as the first node is full
    died_at = len(list(output.glob("*.png")))
    _, said = batch.communicate(timeout=PATIENCE)
    assert batch.returncode == 0, said
    assert died_at < PROMPTS

    images = sorted(path.name for path in output.iterdir())
    assert images == [*(f"{number:04d}.png" for number in range(PROMPTS)), "log.jsonl"]
    for name in images[:-1]:
        assert (output / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    events = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    done = Counter(event["number"] for event in events if event["event"] == "done")
    assert set(done.values()) == {1}
    assert len(done) == PROMPTS
    facts = json.loads((tmp_path / "report").read_text())
    assert (facts["generated"], facts["failed"]) == (PROMPTS, 0)
    assert facts["on_stages"]["prior"]["images"] == PROMPTS
    print(json.dumps(facts["on_stages"]), f"node killed at {died_at}")
