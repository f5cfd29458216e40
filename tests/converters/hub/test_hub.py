"""Sources on the Hub, against a server on this machine that answers as the Hub and its content network do."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from cascadekit import convert, inspect
from cascadekit.cli import main
from cascadekit.converters import hub as hub_module
from cascadekit.converters.checkpoints.identify import identify_all
from cascadekit.converters.checkpoints.open_model import open_model
from cascadekit.converters.hub import fetch, remote_headers, transfer
from cascadekit.converters.hub import headers as headers_module
from cascadekit.converters.hub.select import select
from cascadekit.converters.hub.source import HubPath, HubSource, is_hub, parse
from cascadekit.schemas.errors import CheckpointError, UsageError
from cascadekit.schemas.stages import Stage
from cascadekit.storage.gguf_file import read_gguf
from cascadekit.storage.safetensors_reader import read_header

MAIN, OTHER = "1" * 40, "2" * 40  # commits
LARGE = 4096  # files from here on are stored as large files


def safetensors(values: int = 2000, name: str = "x") -> bytes:
    """A file of one U8 tensor; its content tells its length."""
    text = json.dumps({name: {"dtype": "U8", "shape": [values], "data_offsets": [0, values]}}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(n * n % 251 for n in range(values))


@dataclass
class Hub:
    """The files of the server, its faults, and the requests that it got."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)  # name, commit, file
    refs: dict[str, str] = field(default_factory=lambda: {"main": MAIN, "v2": OTHER, "a/b": OTHER})
    gated: set[str] = field(default_factory=set)
    status: int | None = None  # of every answer
    ranges: bool = True
    lies: dict[str, str] = field(default_factory=dict)  # headers of every body, instead of the right ones
    cut_after: list[int] = field(default_factory=list)  # bytes after which the next bodies break off
    reset: bool = False  # and whether roughly
    stall: threading.Event = field(default_factory=threading.Event)  # a body stops in the middle until this is set
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    sent: int = 0  # bytes of bodies of files
    url: str = ""
    cdn: str = ""

    def add(self, name: str, content: bytes, repo: str = "owner/repo", commit: str = MAIN) -> None:
        self.repos.setdefault(repo, {}).setdefault(commit, {})[name] = content

    def bodies(self, ending: str = "") -> list[dict[str, str]]:
        """The headers of the requests for bodies of files with that ending."""
        return [h for method, path, h in self.requests if method == "GET" and "/api/" not in path and ending in path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        if self.hub.status:
            self.answer(self.hub.status, b'{"error": "as it was told"}', {"Content-Type": "application/json"})
        elif path.startswith("/cdn/"):
            repo, commit, name = self.found(path.removeprefix("/cdn/"), "/at/")
            self.send_file(self.hub.repos[repo][commit][name], {})
        elif path.startswith("/api/models/"):
            self.describe(path.removeprefix("/api/models/"))
        else:
            self.resolve(path[1:])

    def found(self, path: str, divider: str) -> tuple[str, str, str]:
        repo, _, rest = path.partition(divider)
        revision, _, name = rest.partition("/")
        revision = unquote(revision)
        return repo, self.hub.refs.get(revision, revision), unquote(name)

    def refused(self, repo: str, commit: str) -> bool:
        if repo not in self.hub.repos:
            self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif repo in self.hub.gated:
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif commit not in self.hub.repos[repo]:
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return False
        return True

    def describe(self, path: str) -> None:
        kind = "/tree/" if "/tree/" in path else "/revision/"
        repo, commit, _ = self.found(path, kind)
        if self.refused(repo, commit):
            return
        files = self.hub.repos[repo][commit].items()
        listed: Any
        if kind == "/tree/":
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": etag(data)}
                | ({"lfs": {"oid": etag(data), "size": len(data), "pointerSize": 1}} if len(data) >= LARGE else {})
                for name, data in files
            ]
        else:
            siblings = [
                {"rfilename": name, "size": len(data), "blobId": etag(data)}
                | ({"lfs": {"sha256": etag(data), "size": len(data), "pointerSize": 1}} if len(data) >= LARGE else {})
                for name, data in files
            ]
            listed = {"_id": "1", "id": repo, "modelId": repo, "sha": commit, "private": False, "siblings": siblings}
            listed |= {"tags": [], "downloads": 0, "likes": 0}
        self.answer(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})

    def resolve(self, path: str) -> None:
        repo, commit, name = self.found(path, "/resolve/")
        if self.refused(repo, commit):
            return
        headers = {"X-Repo-Commit": commit}
        data = self.hub.repos[repo][commit].get(name)
        if data is None:
            self.answer(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        elif len(data) < LARGE:
            self.send_file(data, headers | {"ETag": f'"{etag(data)}"'})
        else:
            headers |= {"X-Linked-Etag": f'"{etag(data)}"', "X-Linked-Size": str(len(data))}
            self.answer(302, b"", headers | {"Location": f"{self.hub.cdn}/cdn/{repo}/at/{commit}/{name}"})

    def send_file(self, data: bytes, headers: dict[str, str]) -> None:
        start, stop = 0, len(data)
        if self.hub.ranges and "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or stop) + 1, stop)
            if start >= len(data):
                self.answer(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
                return
            headers = headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        self.answer(206 if "Content-Range" in headers else 200, data[start:stop], headers | self.hub.lies, count=True)

    def answer(self, status: int, body: bytes, headers: dict[str, str], count: bool = False) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        breaks = self.hub.cut_after.pop(0) if count and len(body) >= LARGE and self.hub.cut_after else None
        part = body[:breaks]
        self.hub.sent += len(part) if count else 0
        self.wfile.write(part)
        if breaks is not None:
            self.wfile.flush()
            if not self.hub.stall.is_set():
                self.hub.stall.wait(20)
            if self.hub.reset:  # nothing lingers: the other side sees a reset instead of an end
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True


def etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if len(data) >= LARGE else hashlib.sha1(data).hexdigest()


def serve(hub: Hub) -> tuple[ThreadingHTTPServer, str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # type: ignore[method-assign]  # connections break off on purpose here
    threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with nothing on it, and huggingface_hub turned to it, with an empty cache."""
    hub = Hub()
    hub.stall.set()
    (server, hub.url), (content, hub.cdn) = serve(hub), serve(hub)
    hub.cdn = hub.cdn.replace("127.0.0.1", "localhost")  # another host than the Hub's

    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
        "HF_TOKEN_PATH": str(tmp_path / "home" / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_XET_HIGH_PERFORMANCE": False,
        "HF_HUB_DISABLE_PROGRESS_BARS": None,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    yield hub
    huggingface_hub.close_session()
    for one in (server, content):
        one.shutdown()
        one.server_close()


@pytest.fixture
def unplug(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it to lose the connection."""

    def pull() -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")

    return pull


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# Spelling


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hf://a/b", HubSource("a/b")),
        ("hf://a/b/", HubSource("a/b")),
        ("hf://a/b@v1.0", HubSource("a/b", "v1.0")),
        ("hf://a/b/c/d.safetensors", HubSource("a/b", "main", "c/d.safetensors")),
        ("hf://a-1/b_2.3@main/c/", HubSource("a-1/b_2.3", "main", "c")),
        ("hf://a/b@refs/pr/5/prior", HubSource("a/b", "refs/pr/5", "prior")),
        ("hf://a/b@feature%2Fx/prior", HubSource("a/b", "feature/x", "prior")),
        (Path("hf://a/b@x/c"), HubSource("a/b", "x", "c")),
        (HubPath("hf://a/b/c"), HubSource("a/b", "main", "c")),
    ],
)
def test_parse(text: str | Path, source: HubSource) -> None:
    assert is_hub(text)
    assert parse(text) == source
    assert parse(str(source)) == source or "/" in source.revision


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf:a/b",
        "hf://a",
        "hf://a@main",
        "hf://a/b@",
        "hf://a/b@/c",
        "hf:///a/b",
        "hf://a/b//c",
        "hf://a/b/../c",
        "hf://a/b/c\\d",
        "hf://datasets/a/b",
        "hf://a b/c",
        "hf://a/b/model.ckpt",
        "hf://a/b/pytorch_model.BIN",
    ],
)
def test_malformed(text: str) -> None:
    assert is_hub(text)
    with pytest.raises(UsageError, match=r"expected hf://owner/repo|a pickle"):
        parse(text)


@pytest.mark.parametrize("text", ["a/b", "hf/a/b", "/hf:/a", "https://huggingface.co/a/b", Path("hf")])
def test_not_on_the_hub(text: str | Path) -> None:
    assert not is_hub(text)


def test_hub_paths_keep_their_slashes() -> None:
    path = HubPath("hf://a/b/c.safetensors")
    assert str(path) == f"{path}" == "hf://a/b/c.safetensors"
    assert path.name == "c.safetensors"
    assert str(path.parent) == "hf://a/b"


def test_a_name_the_hub_would_not_take(hub: Hub) -> None:
    with pytest.raises(UsageError, match="not a repository's name"):
        fetch("hf://a/b--c")
    assert not hub.requests


# Which files


OFFICIAL = """
.gitattributes LICENSE README.md model_index.json comfyui_checkpoints/stable_cascade_stage_b.safetensors
comfyui_checkpoints/stable_cascade_stage_c.safetensors controlnet/canny.safetensors controlnet/README.md
decoder/config.json decoder/diffusion_pytorch_model.safetensors decoder/diffusion_pytorch_model.bf16.safetensors
decoder_lite/config.json decoder_lite/diffusion_pytorch_model.safetensors effnet_encoder.safetensors
scheduler/scheduler_config.json stage_a.safetensors stage_b.safetensors stage_b_bf16.safetensors
stage_c.safetensors stage_c_lite.safetensors text_encoder/config.json text_encoder/model.safetensors
text_encoder/model.bf16.safetensors text_encoder/model.onnx text_encoder/pytorch_model.bin tokenizer/merges.txt
tokenizer/vocab.json tokenizer/tokenizer_config.json vqgan/config.json
vqgan/diffusion_pytorch_model.safetensors figures/fig.png training/config.json
""".split()


def chosen(path: str = "", files: list[str] = OFFICIAL, **options: Any) -> set[str]:
    return set(select(files, HubSource("owner/repo", "main", path), **options))


def test_a_pipelines_repository() -> None:
    config = {"model_index.json", "scheduler/scheduler_config.json", "LICENSE", "README.md"}
    tokenizer = {"tokenizer/merges.txt", "tokenizer/vocab.json", "tokenizer/tokenizer_config.json"}
    small = config | tokenizer | {"text_encoder/config.json", "vqgan/config.json"}
    rest = {"text_encoder/model.safetensors", "vqgan/diffusion_pytorch_model.safetensors"}
    assert chosen() == small | rest | {"decoder/config.json", "decoder/diffusion_pytorch_model.safetensors"}
    lite = {"decoder_lite/config.json", "decoder_lite/diffusion_pytorch_model.safetensors"}
    assert chosen(lite=True) == small | rest | lite
    assert {name for name in chosen(variant="bf16") if "bf16" in name or name.endswith("tensors")} == {
        "decoder/diffusion_pytorch_model.bf16.safetensors",
        "text_encoder/model.bf16.safetensors",
        "vqgan/diffusion_pytorch_model.safetensors",  # which has no such variant
    }
    with pytest.raises(UsageError, match="no weights of variant fp16"):
        chosen(variant="fp16")


def test_one_file() -> None:
    assert chosen("stage_a.safetensors") == {"stage_a.safetensors", "LICENSE", "README.md"}
    assert chosen("controlnet/canny.safetensors") == {
        "controlnet/canny.safetensors",
        "controlnet/README.md",
        "LICENSE",
        "README.md",
    }


def test_one_component() -> None:
    assert chosen("text_encoder") == {
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "LICENSE",
        "README.md",
    }


def test_a_folder_of_original_files() -> None:
    assert {name for name in chosen("comfyui_checkpoints") if "/" in name} == {
        "comfyui_checkpoints/stable_cascade_stage_b.safetensors",
        "comfyui_checkpoints/stable_cascade_stage_c.safetensors",
    }


def test_the_same_stage_in_several_files() -> None:
    with pytest.raises(UsageError, match=r"stage_b.safetensors, stage_b_bf16.safetensors are all .* name one"):
        chosen(files=[name for name in OFFICIAL if name != "model_index.json"])


def test_shards() -> None:
    shards = [f"model{infix}-0000{n}-of-00002.safetensors" for n in (1, 2) for infix in ("", ".bf16")]
    files = ["config.json", "model.safetensors.index.json", "model.safetensors.index.bf16.json", *shards]
    assert chosen(files=files) == {"config.json", "model.safetensors.index.json", shards[0], shards[2]}
    assert chosen(files=files, variant="bf16") == {
        "config.json",
        "model.safetensors.index.bf16.json",
        shards[1],
        shards[3],
    }


def test_names_that_lead_elsewhere() -> None:
    assert chosen(files=["stage_a.safetensors", "../stage_c.safetensors", "/README.md", "prior/../../x.json"]) == {
        "stage_a.safetensors"
    }


def test_no_weights() -> None:
    with pytest.raises(UsageError, match=r"repo/stage_d.safetensors: no such file; .* and 12 more"):
        chosen("stage_d.safetensors", [*OFFICIAL, *(f"{n}.safetensors" for n in range(5))])
    with pytest.raises(UsageError, match="repo/figures: no model's weights here; the repository has comfyui"):
        chosen("figures")
    with pytest.raises(UsageError, match="only pickled weights"):
        chosen(files=["model.ckpt", "config.json"])
    with pytest.raises(UsageError, match=r"the repository has no \.safetensors file"):
        chosen(files=[])


# Fetching


@pytest.fixture
def repo(hub: Hub) -> Hub:
    """A component of 300 kB with config, card and things nobody needs."""
    hub.add("prior/diffusion_pytorch_model.safetensors", safetensors(300_000))
    hub.add("prior/diffusion_pytorch_model.bf16.safetensors", safetensors(150_000))
    hub.add("prior/config.json", b"{}")
    hub.add("prior/model.ckpt", b"pickle")
    hub.add("README.md", b"card")
    hub.add("stage_c.safetensors", safetensors(150_000), commit=OTHER)
    hub.add("model_index.json", b"{}")
    return hub


def test_fetch_a_folder(repo: Hub) -> None:
    told: list[str] = []
    folder = fetch("hf://owner/repo", told.append)
    assert files_below(folder) == {
        "prior/diffusion_pytorch_model.safetensors",
        "prior/config.json",
        "README.md",
        "model_index.json",
    }
    assert (folder / "prior/diffusion_pytorch_model.safetensors").read_bytes() == safetensors(300_000)
    assert told == ["fetching hf://owner/repo: 1 file, 0.3 MB"]
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


def test_fetch_again_transfers_nothing(repo: Hub) -> None:
    first = fetch("hf://owner/repo")
    sent, told = repo.sent, list[str]()
    assert fetch(Path("hf://owner/repo"), told.append) == first
    assert repo.sent == sent
    assert not told


def test_huggingface_hub_finds_what_was_fetched(repo: Hub) -> None:
    folder = fetch("hf://owner/repo")
    sent = repo.sent
    name = "prior/diffusion_pytorch_model.safetensors"
    assert huggingface_hub.hf_hub_download("owner/repo", name) == str(folder / name)
    assert repo.sent == sent


def test_fetch_a_subfolder_and_a_file(repo: Hub) -> None:
    folder = fetch("hf://owner/repo/prior")
    assert files_below(folder) == {"diffusion_pytorch_model.safetensors", "config.json"}
    file = fetch("hf://owner/repo/prior/diffusion_pytorch_model.bf16.safetensors")
    assert file == folder / "diffusion_pytorch_model.bf16.safetensors"
    assert file.read_bytes() == safetensors(150_000)
    assert (folder.parent / "README.md").read_bytes() == b"card"


@pytest.mark.parametrize("revision", ["v2", "a%2Fb", OTHER])
def test_fetch_a_revision(repo: Hub, revision: str) -> None:
    path = fetch(f"hf://owner/repo@{revision}/stage_c.safetensors")
    assert OTHER in path.parts
    assert path.read_bytes() == safetensors(150_000)


def test_the_token_stays_on_the_hub(repo: Hub) -> None:
    fetch("hf://owner/repo")
    remote_headers("hf://owner/repo")
    sent = {path.startswith("/cdn/"): headers.get("authorization") for _, path, headers in repo.requests}
    assert sent == {False: "Bearer hf_secret", True: None}


def test_what_a_model_is_read_from(hub: Hub, original: Path) -> None:
    for path in original.rglob("*"):
        if path.is_file():
            hub.add(str(path.relative_to(original)), path.read_bytes())
    model = open_model([fetch("hf://owner/repo")])
    assert model.components.keys() == open_model([original]).components.keys()
    sent = hub.sent
    found = {identify_all(header).components[0].stage for header in remote_headers("hf://owner/repo")}
    assert found == model.components.keys()
    assert hub.sent - sent < sum(path.stat().st_size for path in original.rglob("*.safetensors")) / 20


# Cut connections


WEIGHTS = "hf://owner/repo/prior/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_download_goes_on(repo: Hub, reset: bool) -> None:
    repo.cut_after, repo.reset = [100_000, 50_000], reset
    path = fetch(WEIGHTS)
    assert path.read_bytes() == safetensors(300_000)
    starts = [int(h["range"].removeprefix("bytes=").split("-")[0]) for h in repo.bodies("model.safetensors")[::2]]
    assert len(starts) == 3
    assert starts == sorted(starts)
    if not reset:  # a reset may take along what was not read yet
        assert starts == [0, 100_000, 150_000]
        assert repo.sent == len(safetensors(300_000)) + len(b"card")


def test_a_download_that_stops_goes_on_in_the_next_run(repo: Hub) -> None:
    repo.cut_after = [100_000] + [0] * 10
    with pytest.raises(CheckpointError, match=r"stopped at 100000 of 300\d+ bytes; try again"):
        fetch(WEIGHTS)
    repo.cut_after, repo.sent, told = [], 0, list[str]()
    assert fetch(WEIGHTS, told.append).read_bytes() == safetensors(300_000)
    assert repo.sent == len(safetensors(300_000)) - 100_000 + len(b"card")
    assert any("continuing after" in line for line in told)


def test_two_at_once_fetch_once(repo: Hub) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(fetch, [WEIGHTS] * 4))
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == safetensors(300_000)
    assert len(repo.bodies("model.safetensors")) == 2  # the Hub, then its content network


def test_a_server_without_ranges_starts_over(repo: Hub) -> None:
    repo.cut_after, repo.ranges = [100_000], False
    assert fetch(WEIGHTS).read_bytes() == safetensors(300_000)


def test_bytes_that_changed_on_the_way(repo: Hub) -> None:
    repo.cut_after = [100_000] + [0] * 10
    with pytest.raises(CheckpointError):
        fetch(WEIGHTS)
    (partial,) = Path(constants.HF_HUB_CACHE).rglob("*.incomplete")
    partial.write_bytes(b"!" + partial.read_bytes()[1:])
    repo.cut_after = []
    with pytest.raises(CheckpointError, match="the bytes differ from those the Hub lists"):
        fetch(WEIGHTS)
    assert fetch(WEIGHTS).read_bytes() == safetensors(300_000)


def test_a_partial_file_that_is_too_long(repo: Hub) -> None:
    repo.cut_after = [100_000] + [0] * 10
    with pytest.raises(CheckpointError):
        fetch(WEIGHTS)
    (partial,) = Path(constants.HF_HUB_CACHE).rglob("*.incomplete")
    os.truncate(partial, 10**6)
    repo.cut_after = []
    assert fetch(WEIGHTS).read_bytes() == safetensors(300_000)


def test_a_server_that_sends_no_end(repo: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is cut to the size that was listed, and then its digest does not fit."""
    monkeypatch.setattr(Handler, "send_file", lambda self, data, headers: self.answer(200, bytes(10**6), headers))
    with pytest.raises(CheckpointError, match="the bytes differ from those the Hub lists"):
        fetch(WEIGHTS)


def test_who_wants_speed_gets_it(repo: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_XET_HIGH_PERFORMANCE", True)
    monkeypatch.setattr(transfer, "_download", None)
    assert fetch(WEIGHTS).read_bytes() == safetensors(300_000)


RUN = "import sys; from cascadekit.converters.hub import fetch; print(fetch(sys.argv[1]))"


def environment(hub: Hub, home: Path) -> dict[str, str]:
    names = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return names | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}


def test_a_killed_process_loses_nothing(repo: Hub, tmp_path: Path) -> None:
    repo.stall.clear()
    repo.cut_after = [100_000]
    command, env = [sys.executable, "-c", RUN, WEIGHTS], environment(repo, tmp_path / "other")
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        partial: list[Path] = []
        deadline = time.monotonic() + 15
        while not (partial and partial[0].stat().st_size == 100_000) and time.monotonic() < deadline:
            partial = list((tmp_path / "other").rglob("*.incomplete"))
            threading.Event().wait(0.02)
        os.kill(process.pid, signal.SIGKILL)
    repo.stall.set()
    repo.sent = 0
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=True)
    assert Path(done.stdout.strip()).read_bytes() == safetensors(300_000)
    assert done.stderr == ""  # silent in a pipe
    assert repo.sent == len(safetensors(300_000)) - 100_000 + len(b"card")
    offline = subprocess.run(
        command, env=env | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=30, check=True
    )
    assert offline.stdout == done.stdout


# Refusals


@pytest.mark.parametrize("call", [fetch, remote_headers])
def test_refusals(repo: Hub, call: Any) -> None:
    with pytest.raises(UsageError, match=r"hf://no/body: no such repository, or a private one; .*hf auth login"):
        call("hf://no/body")
    with pytest.raises(UsageError, match="no revision v9"):
        call("hf://owner/repo@v9")
    with pytest.raises(UsageError, match="no such file"):
        call("hf://owner/repo/none.safetensors")
    with pytest.raises(UsageError, match="no model's weights here"):
        call("hf://owner/repo/nothing")
    repo.gated.add("owner/repo")
    with pytest.raises(
        CheckpointError, match=rf"accept a licence first: do so at {repo.url}/owner/repo, then `hf auth"
    ):
        call("hf://owner/repo")
    with pytest.raises(CheckpointError, match="accept a licence first"):
        call(WEIGHTS)


@pytest.mark.parametrize(
    ("status", "advice"), [(401, "hf auth login"), (403, "hf auth login"), (429, "try again later"), (503, "try again")]
)
def test_other_answers(repo: Hub, status: int, advice: str) -> None:
    repo.status = status
    with pytest.raises(CheckpointError, match=rf"the Hub answers with status {status}.*{advice}") as raised:
        fetch("hf://owner/repo")
    assert "\n" not in str(raised.value)


def test_refused_in_the_middle(repo: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "send_file", lambda self, data, headers: self.answer(403, b"", headers))
    with pytest.raises(CheckpointError, match="status 403"):
        fetch(WEIGHTS)


def test_lost_in_the_middle(repo: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch_and_lose(*args: Any) -> None:
        fetch_weights(*args)
        repo.status = 503

    fetch_weights = transfer.fetch_weights
    monkeypatch.setattr(hub_module, "fetch_weights", fetch_and_lose)
    with pytest.raises(CheckpointError, match=r"connection to .* was lost; .* the download continues"):
        fetch(WEIGHTS)


def test_a_branch_that_moves(repo: Hub) -> None:
    """The rest of a file comes from the commit that its beginning came from."""
    repo.cut_after = [100_000]
    repo.stall.clear()
    new = safetensors(310_000)[::-1]

    def move() -> None:
        while repo.sent < 100_000:
            threading.Event().wait(0.01)
        repo.add("prior/diffusion_pytorch_model.safetensors", new, commit="3" * 40)
        repo.refs["main"] = "3" * 40
        repo.stall.set()

    threading.Thread(target=move).start()
    told: list[str] = []
    assert fetch(WEIGHTS, told.append).read_bytes() == new
    old = etag(safetensors(300_000))
    assert [path.stat().st_size for path in Path(constants.HF_HUB_CACHE).rglob(old)] == [len(safetensors(300_000))]


def test_a_page_instead_of_the_hub(repo: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for page in (b"<html>please log in</html>", b"[]", b"{}"):
        monkeypatch.setattr(Handler, "describe", lambda self, path, page=page: self.answer(200, page, {}))
        with pytest.raises(CheckpointError, match="does not answer as a Hub does"):
            fetch("hf://owner/repo")


def test_a_page_instead_of_a_file(repo: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "resolve", lambda self, path: self.answer(200, b"<html>", {}))
    with pytest.raises(CheckpointError, match="does not answer as a Hub does"):
        fetch("hf://owner/repo")


def test_no_room(repo: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"0.0 MB are free at .*; make room, or set HF_HOME"):
        fetch("hf://owner/repo")
    assert not repo.bodies()


def test_the_disk_fills_up(repo: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transfer, "_append", full)
    with pytest.raises(CheckpointError, match="cannot be stored in the cache: No space left on device; make room"):
        fetch("hf://owner/repo")


def test_a_cache_that_cannot_be_written(repo: Hub) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    cache.parent.mkdir()
    cache.write_text("a file")
    with pytest.raises(CheckpointError, match="cannot be stored in the cache"):
        fetch("hf://owner/repo")


def test_huggingface_hub_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="pip install huggingface_hub"):
        fetch("hf://owner/repo")


def test_imported_only_when_needed() -> None:
    code = "import sys, cascadekit.converters.hub; sys.exit('huggingface_hub' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


# Without a connection


@pytest.fixture(params=["unplugged", "forbidden", "status 500"])
def lose(request: pytest.FixtureRequest, repo: Hub, unplug: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it to lose the Hub, in one of three ways; returns what is said of that."""

    def go() -> str:
        huggingface_hub.close_session()
        if request.param == "unplugged":
            unplug()
            return "the connection to .* failed"
        if request.param == "forbidden":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
            return "HF_HUB_OFFLINE"
        repo.status = 500
        return "the Hub answers with status 500"

    return go


def test_the_cache_stands_in(lose: Any, repo: Hub) -> None:
    folder, headers = fetch("hf://owner/repo"), remote_headers(WEIGHTS)
    why, told = lose(), list[str]()
    assert fetch("hf://owner/repo", told.append) == folder
    assert fetch(WEIGHTS, told.append).is_file()
    assert len(told) == 2
    assert all(re.search(why, line) and line.endswith("taken from the cache") for line in told)
    assert remote_headers(WEIGHTS)[0].shapes == headers[0].shapes
    assert [header.shapes for header in remote_headers("hf://owner/repo")] == [headers[0].shapes]


def test_nothing_in_the_cache(lose: Any) -> None:
    why = lose()
    for call in (fetch, remote_headers):
        for source in ("hf://owner/repo", WEIGHTS):
            with pytest.raises(CheckpointError, match=why) as raised:
                call(source)
            assert "\n" not in str(raised.value)


def test_something_else_in_the_cache(lose: Any, repo: Hub) -> None:
    fetch("hf://owner/repo/prior/diffusion_pytorch_model.bf16.safetensors")
    why = lose()
    with pytest.raises(CheckpointError, match=why):
        fetch(WEIGHTS)


@pytest.mark.skipif(not hasattr(huggingface_hub, "get_cached_repo_tree"), reason="nothing keeps the listing")
def test_half_of_it_in_the_cache(lose: Any, repo: Hub) -> None:
    repo.add("decoder/diffusion_pytorch_model.safetensors", safetensors(5000))
    fetch("hf://owner/repo/prior")
    why = lose()
    with pytest.raises(CheckpointError, match=why):
        fetch("hf://owner/repo")
    assert fetch("hf://owner/repo/prior").is_dir()


# Headers alone


def test_only_the_header_is_transferred(hub: Hub) -> None:
    hub.add("large.safetensors", safetensors(1_000_000))
    header = remote_headers("hf://owner/repo/large.safetensors")[0]
    assert header.shapes == {"x": (1_000_000,)}
    assert str(header.path) == str(header.tensors["x"].path) == "hf://owner/repo/large.safetensors"
    assert header.tensors["x"].offset == len(safetensors(1_000_000)) - 1_000_000
    assert hub.sent < 200
    assert not Path(constants.HF_HUB_CACHE).exists()


def test_a_server_that_knows_no_ranges(hub: Hub) -> None:
    hub.add("large.safetensors", safetensors(1_000_000))
    hub.ranges = False
    assert remote_headers("hf://owner/repo/large.safetensors")[0].shapes == {"x": (1_000_000,)}


def test_a_small_file_without_redirect(hub: Hub) -> None:
    hub.add("a.safetensors", b"\x02\0\0\0\0\0\0\0{}")
    assert remote_headers("hf://owner/repo@main/a.safetensors")[0].shapes == {}


def test_headers_of_a_repository(repo: Hub) -> None:
    headers = remote_headers("hf://owner/repo")
    assert [str(header.path).removeprefix("hf://owner/repo/prior/") for header in headers] == [
        "diffusion_pytorch_model.bf16.safetensors",
        "diffusion_pytorch_model.safetensors",
    ]
    (header,) = remote_headers("hf://owner/repo@v2")
    assert str(header.path) == "hf://owner/repo@v2/stage_c.safetensors"


def test_too_many_headers(hub: Hub) -> None:
    for number in range(100):
        hub.add(f"{number}.safetensors", safetensors(1))
    with pytest.raises(UsageError, match=r"100 .safetensors files, too many"):
        remote_headers("hf://owner/repo")


GOOD = safetensors(10_000)
LYING = b'{"x":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"short", "not a safetensors file"),
        (struct.pack("<Q", 10**8 + 1) + bytes(10_000), "announce a header of 100000001 bytes"),
        (b"\xff" * 10_000, "announce a header of 18446744073709551615 bytes"),
        (struct.pack("<Q", 50_000) + b"{" * 10_000, "truncated: the header alone ends at byte 50008"),
        (struct.pack("<Q", 9_000) + b"[" * 10_000, "damaged safetensors header"),
        (GOOD[:-1], r"truncated: .*\(1 missing"),
        (GOOD + b"x", "1 bytes follow the last tensor"),
        (struct.pack("<Q", len(LYING)) + LYING + bytes(10_000), "follow the last tensor"),
        (b"PK\x03\x04" + bytes(10_000), "a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
    ],
)
def test_hostile_headers(hub: Hub, tmp_path: Path, content: bytes, message: str) -> None:
    """The same words as for the same file on disk."""
    hub.add("bad.safetensors", content)
    source = "hf://owner/repo/bad.safetensors"
    with pytest.raises(CheckpointError, match=f"^{source}: .*{message}") as remote:
        remote_headers(source)
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as local:
        read_header(tmp_path / "bad.safetensors")
    assert str(remote.value).removeprefix(source) == str(local.value).removeprefix(str(tmp_path / "bad.safetensors"))
    assert hub.sent < 10_000


@pytest.mark.parametrize(
    ("lies", "message"),
    [
        ({"Content-Range": "bytes 0-63/99999999999999999999999"}, "states a size of 99999999999999999999999 bytes"),
        ({"Content-Range": "bytes 0-63/*"}, "does not state the size"),
        ({"Content-Range": "bytes 0-63/20000"}, "9924 bytes follow"),
        ({"Content-Length": "", "Connection": "close"}, None),
    ],
)
def test_lying_servers(hub: Hub, lies: dict[str, str], message: str | None) -> None:
    hub.add("a.safetensors", GOOD)
    hub.lies = lies
    if message is None:
        assert remote_headers("hf://owner/repo/a.safetensors")[0].shapes == {"x": (10_000,)}
    else:
        with pytest.raises(CheckpointError, match=message):
            remote_headers("hf://owner/repo/a.safetensors")


def test_a_header_cut_off(hub: Hub) -> None:
    text = json.dumps(
        {f"tensor{n}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(200)}
    ).encode()
    hub.add("a.safetensors", struct.pack("<Q", len(text)) + text)
    hub.cut_after = [5000]
    with pytest.raises(CheckpointError, match=r"the connection to .* failed"):
        remote_headers("hf://owner/repo/a.safetensors")
    assert len(remote_headers("hf://owner/repo/a.safetensors")[0].tensors) == 200


# The command line


def test_commands_take_hub_sources(hub: Hub, original: Path, tmp_path: Path) -> None:
    for path in (original / "stage_c.safetensors", original / "stage_a.safetensors"):
        hub.add(path.name, path.read_bytes())
    hub.add("LICENSE", b"non-commercial")
    hub.add("README.md", b"a card")
    result = CliRunner().invoke(main, ["inspect", "hf://owner/repo", "--json"])
    assert result.exit_code == 0, result.output
    assert {entry["component"] for entry in json.loads(result.stdout)} == {"prior", "vqgan"}
    assert hub.sent < 200_000  # headers alone
    output = tmp_path / "model"
    result = CliRunner().invoke(main, ["convert", "hf://owner/repo", "-o", str(output), "--to", "diffusers"])
    assert result.exit_code == 0, result.output
    assert (output / "prior" / "diffusion_pytorch_model.safetensors").is_file()
    assert (output / "LICENSE").read_text() == "non-commercial"
    result = CliRunner().invoke(main, ["inspect", "hf://owner/none"])
    assert result.exit_code in (1, 2)
    assert "hf://owner/none" in result.stderr


def test_gguf_files_are_read_by_their_headers(hub: Hub, original: Path, tmp_path: Path, unplug: Any) -> None:
    """A header does not state its length: it is read in parts. Then the file is downloaded, and read from the cache."""
    for quantize in ("q8_0", "q4_k"):
        convert(original / "stage_c.safetensors", tmp_path / f"{quantize}.gguf", "gguf", quantize=quantize)
        hub.add(f"stage_c-{quantize}.gguf", (tmp_path / f"{quantize}.gguf").read_bytes())
    source = "hf://owner/repo/stage_c-q8_0.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(headers_module, "GGUF_BYTES", 1000)
        header = remote_headers(source)[0]
    local = read_gguf(tmp_path / "q8_0.gguf")
    assert header.gguf
    assert (header.shapes, header.metadata) == (local.shapes, local.metadata)
    assert [t.offset for t in header.tensors.values()] == [t.offset for t in local.tensors.values()]
    assert len(remote_headers("hf://owner/repo")) == 2
    assert hub.sent < 3 * (headers_module.GGUF_BYTES + 1000)
    first = {tensor.dtype for tensor in inspect("hf://owner/repo").components[Stage.PRIOR].tensors.values()}
    assert "Q4_K" in first or "Q5_0" in first
    done = convert(source, tmp_path / "c.safetensors", "split", dtype="bf16")
    assert done.output.is_file()
    with pytest.raises(UsageError, match=r"stage_c-q4_k.gguf, stage_c-q8_0.gguf are all the same stage"):
        convert("hf://owner/repo", tmp_path / "x", "split", dtype="bf16")
    unplug()
    assert remote_headers(source)[0].shapes == local.shapes


def test_a_truncated_gguf_file_on_the_hub(hub: Hub, original: Path, tmp_path: Path) -> None:
    convert(original / "stage_c.safetensors", tmp_path / "c.gguf", "gguf")
    hub.add("c.gguf", (tmp_path / "c.gguf").read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"hf://owner/repo/c.gguf: damaged GGUF file: truncated"):
        remote_headers("hf://owner/repo/c.gguf")
