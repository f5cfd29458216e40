"""Batches into a bucket: a server of S3 over loopback (moto), which boto3 looks into."""

import io
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from cascadekit.cli import main
from cascadekit.storage import bucket as module
from cascadekit.storage.bucket import BucketPath, output_folder

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
server = pytest.importorskip("moto.server", reason="moto is not installed")
boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")

KEY, SECRET = "AKIAOFTESTS", "sEcReT/of/tests"
QUICK = "--size 64x64 --prior-steps 2 --decoder-steps 1 --engine onnxruntime --threads 1 --batch 1".split()
PROMPTS = ["a fox", "a bär", "a fox", "three"]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    one = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    one.start()
    yield "http://{}:{}".format(*one.get_host_and_port())
    one.stop()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, address: str) -> Iterator[pytest.MonkeyPatch]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
    }.items():
        monkeypatch.setenv(name, value)
    module._store.cache_clear()
    yield monkeypatch
    module._store.cache_clear()


@pytest.fixture
def store(environment: pytest.MonkeyPatch, address: str) -> Any:
    """A client that others wrote, and a bucket."""
    client = boto3.client("s3", endpoint_url=address, region_name="us-east-1")
    client.create_bucket(Bucket="images")
    yield client
    for each in client.list_objects_v2(Bucket="images").get("Contents", ()):
        client.delete_object(Bucket="images", Key=each["Key"])


def run(bundle: Path, prompts: Path, output: str, *more: str) -> Result:
    lines = ["generate", str(bundle), "--prompts", str(prompts), "-o", output, *QUICK, *more]
    return CliRunner().invoke(main, lines, catch_exceptions=False)


def content(store: Any, name: str) -> bytes:
    return bytes(store.get_object(Bucket="images", Key=name)["Body"].read())


def events(store: Any, name: str) -> list[tuple[str, int | None]]:
    lines = map(json.loads, content(store, name).decode().splitlines())
    return [(each["event"], each.get("number")) for each in lines]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return tmp_path / "p.txt"


def test_the_files_of_a_folder(tiny: Path, prompts: Path, store: Any, tmp_path: Path) -> None:
    """Also after a killed run, beside files of others, and with a damaged and a lost image."""
    assert run(tiny / "bundle", prompts, str(tmp_path / "here"), "--seed", "7").exit_code == 0
    store.put_object(Bucket="images", Key="a/b/notes.txt", Body=b"mine")
    first = run(tiny / "bundle", prompts, "s3://images/a/b", "--seed", "7")
    assert first.exit_code == 0, first.output
    assert "wrote s3://images/a/b/0003.png" in first.stdout
    images = [f"{number:04d}.png" for number in range(4)]
    there = [each["Key"] for each in store.list_objects_v2(Bucket="images")["Contents"]]
    assert there == [f"a/b/{name}" for name in (*images, "log.jsonl", "notes.txt")]
    for name in images:
        assert content(store, f"a/b/{name}") == (tmp_path / "here" / name).read_bytes(), name

    store.delete_object(Bucket="images", Key="a/b/0003.png")
    whole = content(store, "a/b/0001.png")
    store.put_object(Bucket="images", Key="a/b/0001.png", Body=whole[:-12] + bytes(12))
    again = run(tiny / "bundle", prompts, "s3://images/a/b", "--json")  # the seed is that of the log
    counts = json.loads(again.stdout)
    assert (counts["generated"], counts["skipped"], counts["failed"]) == (2, 2, 0)
    for name in images:
        assert content(store, f"a/b/{name}") == (tmp_path / "here" / name).read_bytes(), name
    kinds = [("started", None), *(("done", number) for number in range(4)), ("finished", None)]
    more = [("started", None), ("skipped", 0), ("skipped", 2), ("done", 1), ("done", 3), ("finished", None)]
    assert events(store, "a/b/log.jsonl") == kinds + more
    for said in (first.output, again.output, content(store, "a/b/log.jsonl").decode()):
        assert KEY not in said
        assert SECRET not in said


def test_files_of_others_stay(tiny: Path, prompts: Path, store: Any) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    store.put_object(Bucket="images", Key="x/0002.png", Body=file.getvalue())
    refused = run(tiny / "bundle", prompts, "s3://images/x", "--seed", "7")
    assert refused.exit_code == 2
    assert "s3://images/x/0002.png: not the image of line 3" in refused.stderr
    assert content(store, "x/0002.png") == file.getvalue()
    assert run(tiny / "bundle", prompts, "s3://images/x", "--seed", "7", "--force").exit_code == 0
    assert content(store, "x/0002.png") != file.getvalue()


@pytest.mark.slow
def test_on_a_cluster(
    tiny: Path,
    prompts: Path,
    store: Any,
    environment: pytest.MonkeyPatch,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Four images are fewer than the tasks that may write; Ray's warning of that is no news for a user."""
    pytest.importorskip("ray", reason="ray is not installed")
    environment.setenv("RAY_worker_niceness", "0")  # Ray gives its workers little of a busy machine
    assert run(tiny / "bundle", prompts, str(tmp_path / "here"), "--seed", "7").exit_code == 0
    result = run(tiny / "bundle", prompts, "s3://images/ray", "--seed", "7", "--ray", "local", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["on_stages"]["decoder"]["images"] == 4
    for name in ("0000.png", "0001.png", "0002.png", "0003.png"):
        assert content(store, f"ray/{name}") == (tmp_path / "here" / name).read_bytes(), name
    last = json.loads(content(store, "ray/log.jsonl").splitlines()[-1])
    assert last["event"] == "finished"
    assert last["on_stages"]["prior"]["images"] == 4
    assert not [each for each in recwarn if "concurrent" in str(each.message)]


def closed() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


@pytest.mark.parametrize(
    ("output", "given", "said"),
    [
        ("s3://no-such-bucket/a", {}, "s3://no-such-bucket/a: there is no such bucket; make it first"),
        ("s3://images/a", {"AWS_ACCESS_KEY_ID": None}, "$AWS_ACCESS_KEY_ID not set"),
        ("s3://images/a", {"AWS_SECRET_ACCESS_KEY": ""}, "$AWS_SECRET_ACCESS_KEY not set"),
        ("s3://images/a", {"AWS_ENDPOINT_URL_S3": closed()}, "s3://images/a: the store does not answer"),
        ("s3://images/a", {"AWS_ENDPOINT_URL_S3": "http://no-such-host.invalid"}, "the store does not answer"),
    ],
)
def test_what_cannot_be_reached(
    tiny: Path,
    prompts: Path,
    store: Any,
    environment: pytest.MonkeyPatch,
    output: str,
    given: dict[str, str | None],
    said: str,
) -> None:
    for name, value in given.items():
        environment.delenv(name) if value is None else environment.setenv(name, value)
    module._store.cache_clear()
    began = time.monotonic()
    refused = run(tiny / "bundle", prompts, output)
    assert time.monotonic() - began < 20
    assert refused.exit_code in (1, 2)
    message = " ".join(refused.stderr.split())
    assert said in message
    assert message.count("error") <= 1
    assert SECRET not in refused.output


def test_a_bucket_that_is_lost_in_the_middle(
    tiny: Path, prompts: Path, store: Any, environment: pytest.MonkeyPatch
) -> None:
    """Files that were put are kept; the message is the store's, once."""
    put = BucketPath.put

    def until_two(path: BucketPath, content: bytes) -> None:
        if path.name == "0001.png":
            environment.setenv("AWS_ENDPOINT_URL", closed())
            module._store.cache_clear()
        put(path, content)

    environment.setattr(BucketPath, "put", until_two)
    stopped = run(tiny / "bundle", prompts, "s3://images/lost", "--seed", "7")
    assert stopped.exit_code == 1
    assert "stopped: s3://images/lost/0001.png: the store does not answer" in " ".join(stopped.stderr.split())
    there = [each["Key"] for each in store.list_objects_v2(Bucket="images")["Contents"]]
    assert there == ["lost/0000.png", "lost/log.jsonl"]


@pytest.mark.parametrize("given", ["s3://KEY:SECRET@images/a", "s3://images/a?secret_key=SECRET", "gs://images/a"])
def test_other_addresses(given: str, tiny: Path, prompts: Path) -> None:
    refused = run(tiny / "bundle", prompts, given)
    assert refused.exit_code == 2
    assert "expected a folder, or s3://BUCKET/FOLDER" in " ".join(refused.stderr.split())
    assert "SECRET" not in refused.output


def test_paths() -> None:
    path = output_folder(Path("s3://images/a"))
    assert isinstance(path, BucketPath)
    assert str(path / "b" / "c.png") == "s3://images/a/b/c.png"
    assert (path / "c.png").suffix == ".png"
    assert str(path.parent) == "s3://images"
    assert output_folder(Path("s3/a")) == Path("s3/a")
