"""Clusters that cannot be had are refused at once, in words."""

import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from cascadekit.cli import main
from cascadekit.runtime.cluster.cluster_groups import _reason
from cascadekit.runtime.cluster.connect import _pass_on_messages, connected, store_bytes
from cascadekit.schemas.errors import MissingPackageError, UsageError


class OfRay:
    """Stands for the package, which may not be installed."""

    def is_initialized(self) -> bool:
        return False


def refusal(monkeypatch: pytest.MonkeyPatch, address: str) -> str:
    monkeypatch.setattr("cascadekit.runtime.cluster.connect.import_ray", OfRay)
    with pytest.raises(UsageError) as error, connected(address):
        pass
    return str(error.value)


@pytest.mark.parametrize("address", ["head", ":6379", "head:0", "head:x", "ray://head:10001", "http://head:8265"])
def test_addresses_that_are_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "expected local, or HOST:PORT" in refusal(monkeypatch, address)


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        assert f"ray {address}: no cluster answers there: Connection refused" in refusal(monkeypatch, address)


def test_the_object_store_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, expected in ((None, 1 << 30), (1 << 40, 1 << 30), (1 << 30, 1 << 28), (1, 80 << 20)):
        monkeypatch.setattr("cascadekit.runtime.cluster.connect.free_memory", lambda free=free: free)
        assert store_bytes() == expected


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r"ray is not installed: pip install .*\[ray\]"), connected("local"):
        pass


def test_messages_of_ray_are_said_once_and_shortly(capsys: pytest.CaptureFixture[str]) -> None:
    """Ray would print them to standard output, where `--json` has its report."""
    worker = SimpleNamespace(print_to_stdstream=print)
    said: list[str] = []
    _pass_on_messages(SimpleNamespace(_private=SimpleNamespace(worker=worker)), said.append)
    for lease in range(3):
        worker.print_to_stdstream(
            {"pid": "raylet", "is_err": False, "lines": [f"A worker died. Lease ID: {lease}", ""]}, ignore_prefix=False
        )
    assert said == ["Ray: A worker died"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["a", "--ray", "local"], "are for --prompts"),
        (["--prompts", "p.txt", "--actors", "prior=1"], "are for --ray"),
        (["--prompts", "p.txt", "--ray", "local", "--actors", "vqgan=1"], "expected one of the stages text_encoder"),
        (["--prompts", "p.txt", "--ray", "local", "--preview-every", "1"], "no previewer"),
        (["a", "-o", "s3://bucket/x"], "is for --prompts"),
        (["--prompts", "p.txt", "-o", "gs://bucket/x"], "expected a folder, or s3://BUCKET/FOLDER"),
        (["--prompts", "p.txt", "-o", "s3://KEY:SECRET@bucket/x"], "without keys and options"),
    ],
)
def test_options_that_do_not_fit(
    tiny: Path, tmp_path: Path, more: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a\n")
    result = CliRunner().invoke(main, ["generate", str(tiny / "bundle"), *more])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]


def test_the_error_of_an_actor_is_that_of_the_batch() -> None:
    class TheirError(Exception):
        cause: Exception | None = None

    theirs = TheirError("ray::MapWorker() (pid=1)\n  File ...\nno more memory")
    assert str(_reason(theirs)) == "Ray gave up: no more memory; finished images are kept"
    theirs.cause = UsageError("node a: bundle: not a bundle")
    assert _reason(theirs) is theirs.cause
