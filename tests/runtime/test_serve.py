"""The images API, asked by OpenAI's own client and by clients that misbehave."""

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import ExifTags, Image, ImageOps

from cascadekit import Cascade
from cascadekit.cli import main

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
from cascadekit.runtime.serve.guard import MOST_JSON  # noqa: E402
from cascadekit.runtime.serve.image_call import edited_pictures  # noqa: E402
from cascadekit.storage.install_hint import install_hint  # noqa: E402
from helpers.page import Gate  # noqa: E402
from helpers.serve import Served, serving, wait_for  # noqa: E402

QUICK = {"prior_steps": 3, "decoder_steps": 2}
PROMPTS = ("a red circle", "a fox, flat style", "a blue star", "a rocket, glossy style")


@pytest.fixture(scope="module")
def cascade(example: Path) -> Iterator[Cascade]:
    with Cascade.open(example, threads=1, rows=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def served(cascade: Cascade) -> Iterator[Served]:
    with serving(cascade) as found:
        yield found


@pytest.fixture
def gate(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Holds every batch before it is generated until the gate is opened."""
    gate, generate = Gate(), cascade.generate

    def gated(*arguments: Any, **options: Any) -> Any:
        gate.reached.set()
        assert gate.opened.wait(30)
        return generate(*arguments, **options)

    monkeypatch.setattr(cascade, "generate", gated)
    yield gate
    gate.opened.set()


def generate(served: Served, prompt: str = PROMPTS[0], *, extra: dict[str, Any] | None = None, **more: Any) -> Any:
    given = {"model": "example", "size": "64x64", **more}
    return served.client().images.generate(prompt=prompt, extra_body={**QUICK, "seed": 5, **(extra or {})}, **given)


def content(entry: Any) -> bytes:
    return base64.b64decode(entry.b64_json)


def opened(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


def test_images_are_those_of_the_library(cascade: Cascade, served: Served) -> None:
    answer = generate(served, n=2, extra={"negative": "blur", "prior_guidance": 3.0})
    expected = cascade.generate(
        [PROMPTS[0]] * 2, negative="blur", seed=[5, 6], width=64, height=64, prior_guidance=3.0, **QUICK
    )
    assert [entry.seed for entry in answer.data] == [5, 6]
    for entry, image in zip(answer.data, expected.images, strict=True):
        assert np.array_equal(np.asarray(opened(content(entry))), np.asarray(image))
    assert json.loads(opened(content(answer.data[0])).info["cascadekit"])["prompt"] == PROMPTS[0]
    assert (answer.size, answer.output_format) == ("64x64", "png")


def test_callers_are_batched_and_get_the_bytes_that_they_get_alone(served: Served, gate: Gate) -> None:
    gate.opened.set()
    alone = [content(generate(served, prompt, extra={"seed": seed}).data[0]) for seed, prompt in enumerate(PROMPTS)]
    gate.opened.clear()
    gate.reached.clear()
    before = served.metrics()
    with ThreadPoolExecutor(5) as callers:
        first = callers.submit(generate, served)  # occupies the queue's thread
        assert gate.reached.wait(30)
        asked = [callers.submit(generate, served, prompt, extra={"seed": n}) for n, prompt in enumerate(PROMPTS)]
        wait_for(lambda: "cascadekit_waiting_images 4.0" in served.metrics())
        gate.opened.set()
        together = [content(each.result().data[0]) for each in asked]
        assert first.result().data
    assert together == alone
    assert count(served.metrics(), "batch_images_count") == count(before, "batch_images_count") + 2


def count(metrics: str, name: str) -> float:
    return float(re.search(rf"^cascadekit_{name} (\S+)$", metrics, re.M)[1])  # type: ignore[index]


@pytest.mark.parametrize(("format", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_url_and_formats(served: Served, format: str, kind: str) -> None:
    (entry,) = generate(served, response_format="url", output_format=format).data
    status, data, headers = served.ask("GET", entry.url.partition(str(served.port))[2])
    assert (status, headers["content-type"]) == (200, f"image/{format}")
    assert opened(data).format == kind


def test_streams_send_partial_images_first(served: Served) -> None:
    events = list(generate(served, stream=True, partial_images=2))
    kinds = [event.type.partition(".")[2] for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    pictures = [opened(content(event)) for event in events]
    assert pictures[2].size == (64, 64)
    assert content(events[2]) == content(generate(served).data[0])  # previews change nothing


def test_edits_vary_a_picture_and_keep_it_outside_the_mask(cascade: Cascade, served: Served) -> None:
    picture, mask = Image.new("RGB", (64, 64), "green"), Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))  # the left half is transparent: it is edited
    files = {"image": ("a.png", png(picture)), "mask": ("m.png", png(mask))}
    given: dict[str, Any] = {"prompt": PROMPTS[1], "size": "64x64", "extra_body": {**QUICK, "seed": "5"}}
    found = np.asarray(opened(content(served.client().images.edit(**files, **given).data[0])))
    white = Image.new("L", (64, 64), 0)
    white.paste(255, (0, 0, 32, 64))
    call = {"init_image": picture, "mask": white, "width": 64, "height": 64, **QUICK}
    assert np.array_equal(found, np.asarray(cascade.generate(PROMPTS[1], seed=[5], **call).images[0]))
    assert (found[:, 56:] == (0, 128, 0)).all()  # the edge of a mask is soft
    assert (found[:, :32] != (0, 128, 0)).any()
    streamed = list(served.client().images.edit(**files, **given, stream=True))
    assert [event.type for event in streamed] == ["image_edit.completed"]
    assert np.array_equal(found, np.asarray(opened(content(streamed[0]))))
    assert not str(opened(content(streamed[0])).info).count("/tmp")
    if sys.platform == "linux":  # uploads are closed, or a server would run out of files
        assert not [link for link in Path("/proc/self/fd").iterdir() if "picture-" in os.path.realpath(link)]


def test_a_mask_that_its_exif_data_turn_is_turned_with_its_picture(tmp_path: Path) -> None:
    mask, exif = Image.new("RGBA", (60, 40), (0, 0, 0, 255)), Image.Exif()
    mask.paste((0, 0, 0, 0), (0, 0, 20, 10))
    exif[ExifTags.Base.Orientation] = 6
    mask.save(tmp_path / "mask.png", exif=exif)
    with Image.open(tmp_path / "mask.png") as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))[..., 3] == 0
    with Image.open(edited_pictures([tmp_path / "mask.png"], tmp_path / "mask.png")["mask"]) as white:
        assert np.array_equal(np.asarray(white) == 255, expected)


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_models_and_health(served: Served) -> None:
    assert [model.id for model in served.client().models.list()] == ["example"]
    assert served.client().models.retrieve("example").owned_by == "cascadekit"
    with pytest.raises(openai.NotFoundError):
        served.client().models.retrieve("other")
    assert json.loads(served.ask("GET", "/health", Host="pod.example")[1])["status"] == "ok"


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        (b"{", 400, "not a JSON object"),
        (b'{"prompt": "a", "seed": NaN}', 400, "not a JSON object"),
        ({}, 400, "prompt"),
        ({"prompt": "a", "n": 11}, 400, "n: 11: expected 1 to 10"),
        ({"prompt": "a", "size": "65x64"}, 400, "65"),
        ({"prompt": "a", "size": "8192x8192"}, 400, "pixels"),
        ({"prompt": "a", "prior_steps": 1000}, 400, "at most 100"),
        ({"prompt": "a", "model": "dall-e-3"}, 404, "expected 'example'"),
        ({"prompt": "a", "background": "transparent"}, 400, "background"),
        ({"prompt": "a", "stream": "yes"}, 400, "stream: 'yes': expected false or 0 or true or 1"),
        ({"prompt": "a", "quality": "best"}, 400, "expected auto or low or standard or medium or hd or high"),
        ({"prompt": "a", "prior_step": 3}, 400, "prior_steps"),
        ({"prompt": "a", "init_image": "/etc/passwd"}, 400, "cannot be given here"),
        ({"prompt": "\ud800"}, 400, "surrogate"),
    ],
)
def test_malformed_calls_are_refused_in_openais_form(served: Served, given: Any, status: int, words: str) -> None:
    body = given if isinstance(given, bytes) else json.dumps(given).encode()
    found, text, _ = served.ask("POST", "/v1/images/generations", body)
    error = json.loads(text)["error"]
    assert (found, error["type"]) == (status, "invalid_request_error")
    assert words in error["message"]


def test_pictures_that_are_none_are_refused(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.client().images.edit(image=("a.png", b"no picture"), prompt="a")
    assert "image 1: not a picture of a known format" in str(caught.value)  # no name of the server's own
    assert "/tmp" not in str(caught.value)
    assert served.ask("POST", "/v1/images/edits", b"prompt=a")[0] == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Content-Length": str(MOST_JSON + 1)}, 413),
        ({"Host": "localhost:1"}, 400),
    ],
)
def test_requests_of_other_sites_and_too_large_ones_are_refused(
    served: Served, headers: dict[str, str], status: int
) -> None:
    names = {name.replace("-", "_"): value for name, value in headers.items()}
    assert served.ask("POST", "/v1/images/generations", b"{}", **names)[0] == status


def test_the_key_is_required_and_makes_names_of_hosts_free(cascade: Cascade) -> None:
    with serving(cascade, key="right") as served:
        with pytest.raises(openai.AuthenticationError):
            served.client("wrong").models.list()
        assert served.client("right").models.list().data
        assert served.ask("GET", "/v1/models", Host="images.example", Authorization="Bearer right")[0] == 200
        assert served.ask("GET", "/metrics")[0] == 401
        assert served.ask("GET", "/health")[0] == 200


def test_a_full_queue_names_the_time_to_come_back(cascade: Cascade, gate: Gate) -> None:
    with serving(cascade, queue=2) as served, ThreadPoolExecutor(2) as callers:
        running = callers.submit(generate, served)
        assert gate.reached.wait(30)
        waiting = callers.submit(generate, served, n=2)
        wait_for(lambda: "cascadekit_waiting_images 2.0" in served.metrics())
        for how in ({}, {"stream": True}):
            with pytest.raises(openai.RateLimitError) as refused:
                generate(served, **how)
            assert int(refused.value.response.headers["retry-after"]) >= 1
        gate.opened.set()
        assert running.result().data
        assert len(waiting.result().data) == 2


def test_what_nobody_waits_for_is_not_generated(served: Served, gate: Gate) -> None:
    before = served.metrics()
    body = json.dumps({"prompt": "a", "size": "64x64", "prior_steps": 90})
    for stream in (False, True):
        gate.opened.clear()
        gate.reached.clear()
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        connection.request("POST", "/v1/images/generations", body.replace("}", f', "stream": {str(stream).lower()}}}'))
        assert gate.reached.wait(30)
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        time.sleep(0.5)  # until the server has seen it
        gate.opened.set()
        wanted = cancelled(before) + 1 + stream
        wait_for(lambda wanted=wanted: cancelled(served.metrics()) == wanted)  # type: ignore[misc]
    assert count(served.metrics(), "batch_images_count") == count(before, "batch_images_count")


def cancelled(metrics: str) -> float:
    found = re.search(r'^cascadekit_images_total{result="cancelled"} (\S+)$', metrics, re.M)
    return float(found[1]) if found else 0.0


def test_the_log_has_prompts_only_when_asked(cascade: Cascade, served: Served) -> None:
    generate(served, "a secret")
    wait_for(lambda: served.log[-1].endswith("seed=5"))  # a line is written after its answer
    assert not any("secret" in line for line in served.log)
    assert re.fullmatch(r"POST /v1/images/generations 200 \d+\.\d\ds n=1 64x64 seed=5", served.log[-1])
    with serving(cascade, log_prompts=True) as telling:
        generate(telling, "a secret")
        wait_for(lambda: bool(telling.log))
        assert telling.log[-1].endswith('"a secret"')


def test_the_command_finishes_what_runs_when_it_is_ended(example: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "cascadekit", "serve", str(example), "--port", str(port)]
    command += ["--engine", "onnxruntime", "--threads", "1"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
        ExitStack() as held,
    ):
        held.callback(process.kill)  # a failure of the test would wait for it for ever
        assert process.stdout is not None
        assert f":{port}/v1  serves example" in process.stdout.readline()
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=3, timeout=60)
        stream = client.images.generate(prompt="a", size="64x64", stream=True, partial_images=1, extra_body=QUICK)
        events = iter(stream)
        next(events)  # a preview: it is being generated
        os.kill(process.pid, signal.SIGTERM)
        assert next(events).type == "image_generation.completed"
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("options", "missing", "words"),
    [(["--host", "0.0.0.0"], None, "--api-key"), ([], "starlette", install_hint("serve"))],
)
def test_the_command_refuses(
    example: Path, options: list[str], missing: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CASCADEKIT_API_KEY", raising=False)
    if missing:
        for name in [name for name in sys.modules if "runtime.serve" in name]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, f"{missing}.datastructures", None)
        monkeypatch.setitem(sys.modules, missing, None)
    found = CliRunner().invoke(main, ["serve", str(example), *options])
    assert found.exit_code in (1, 2)
    assert words in found.output
