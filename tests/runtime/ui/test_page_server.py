"""The server of the page, without a browser: jobs, refusals, who may ask, and the command."""

import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cascadekit.cli import main
from cascadekit.runtime.cascade import Cascade
from cascadekit.runtime.images.png import read_settings
from cascadekit.runtime.sampling.controlnets import ControlPicture
from cascadekit.runtime.ui import routes
from cascadekit.runtime.ui.http_server import PageServer
from helpers.page import ID, QUICK, Gate, add_picture, call, events, serving
from helpers.whole import picture


def test_a_job_over_http(served: PageServer, cascade: Cascade, tmp_path: Path) -> None:
    """Two images with seeds that follow each other are those that the library generates one by one."""
    request = {
        "prompt": "a cat",
        "negative": "a dog",
        "seed": str(2**64 - 3),
        "images": 2,
        "previews": ["prior"],
        **QUICK,
    }
    submitted = call(served, "POST", "/api/jobs", request)
    assert submitted.status == 201
    assert submitted.json["steps"] == {"prior": 3, "decoder": 2}
    told = events(served, submitted.json["id"])
    assert told[-1][0] == "done"
    assert dict(told)["step"] | {"elapsed": 0} == {
        "stage": "decoder", "index": 2, "steps": 2, "first": 1, "last": 2, "of": 2, "elapsed": 0,
    }  # fmt: skip
    assert [image["settings"]["seed"] for image in told[-1][1]["images"]] == [str(2**64 - 3), str(2**64 - 2)]
    for number in range(2):
        generated = cascade.generate("a cat", negative="a dog", seed=2**64 - 3 + number, **QUICK).images[0]
        served_file = call(served, "GET", f"/images/{number:04d}.png")
        assert served_file.headers["Content-Type"] == "image/png"
        assert served_file.body == (tmp_path / "images" / f"{number:04d}.png").read_bytes()
        assert (
            np.abs(np.asarray(Image.open(tmp_path / "images" / f"{number:04d}.png"), int) - np.asarray(generated)).max()
            <= 1
        )
    newest = call(served, "GET", "/api/images?count=1").json
    assert (newest["images"][0]["name"], newest["more"]) == ("0001.png", True)
    assert [name for name, _ in events(served, submitted.json["id"], "999")] == []
    assert call(served, "GET", "/api/jobs").json == {"jobs": []}


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"width": 100}, "width 100: expected a multiple of 8"),
        ({"width": 16384, "height": 64}, "expected 1 to 8192"),
        ({"prior_steps": 0}, "prior_steps=0: expected 1 to 1000"),
        ({"decoder_steps": 10**9}, "decoder_steps"),
        ({"prior_guidance": "nan"}, "prior_guidance: Input should be a finite number"),
        ({"strength": 1e999}, "not a JSON object"),
        ({"width": 10**400}, "width a number of hundreds of digits: expected 1 to 8192"),
        ({"images": 10**400}, "images a number of hundreds of digits: expected 1 to 64"),
        ({"prior_guidance": 1e30}, "prior_guidance=1e+30: expected -1000 to 1000"),
        ({"prior_timesteps": ["1", "inf"]}, "prior_timesteps.1: Input should be a finite number"),
        ({"prior_timesteps": [0.5, 0.7]}, "timesteps 0.5, 0.7: expected two or more that fall"),
        ({"prior_shift": 2}, "shift and rescale: ddpm-wuerstchen has neither"),
        ({"prompt": "x" * 200_000}, "a prompt of 200000 characters"),
        ({"sampler": "euler"}, "sampler 'euler': expected ddpm-wuerstchen or gdf"),
        ({"speed": 2}, "speed: unknown"),
        ({"prompt": ["a"]}, "prompt: Input should be a valid string"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 2**64 - 1, "images": 2}, "too large for 2 images"),
        ({"images": 0}, "images 0: expected 1 to 64"),
        ({"images": 2, "index": 1, "batch": 4}, "leave them out"),
        ({"previews": ["vqgan"]}, "expected prior and decoder"),
        ({"previews": "prior"}, "expected a list"),
        ({"loras": [{"name": "x"}]}, "'x' is not offered here; expected one of none; name their folders in"),
        ({"loras": [{"name": "/etc/passwd"}]}, "is not offered here"),
        ({"loras": ["x"]}, "expected each as {name, strength}"),
        ({"loras": [{}] * 9}, "expected a list of at most 8"),
        ({"bundle": "../bundle"}, "bundle '../bundle': expected one of bundle"),
        ({"bundle": ["bundle"]}, "bundle a list of 1: expected one of bundle"),
        ({"engine": "tensorrt"}, "engine 'tensorrt': expected one of auto, onnxruntime"),
        ({"init_image": "/etc/passwd"}, "is not on this server"),
        ({"init_image": {"path": "/etc/passwd"}}, "is not on this server"),
        ({"init_image": ID}, "is not on this server"),
        ({"image_prompts": [ID]}, "is not on this server"),
        ({"controls": [{"name": "canny", "picture": ID}]}, "is not on this server"),
        ({"controls": [{"name": "canny", "picture": [ID]}]}, "is not on this server"),
        ({"init_image": [[ID]]}, "is not on this server"),
        ({"prior_timesteps": [1 - number / 2000 for number in range(1002)]}, "timesteps: expected at most 1001"),
        ({"controls": ["canny=/etc/passwd"]}, "expected each as"),
    ],
)
def test_requests_that_are_refused_in_words(served: PageServer, request_: dict[str, Any], words: str) -> None:
    answer = call(served, "POST", "/api/jobs", {"prompt": "x", **QUICK, **request_})
    assert answer.status == 400
    assert words in answer.json["error"]
    assert call(served, "GET", "/api/jobs").json == {"jobs": []}


def test_a_control_that_is_none_and_a_mask_of_no_picture(served: PageServer) -> None:
    found = add_picture(served, picture(8, 8))
    for request, words in (
        ({"controls": [{"name": "identity", "picture": found}]}, "control 'identity': expected one of canny"),
        ({"mask": found}, "the mask needs a picture"),
    ):
        answer = call(served, "POST", "/api/jobs", {"prompt": "x", **QUICK, **request})
        assert (answer.status, words in answer.json["error"]) == (400, True)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"\xff", b'{"seed": NaN}', b"[" * 200_000])
def test_what_is_no_json_object(served: PageServer, body: bytes) -> None:
    assert call(served, "POST", "/api/jobs", body).status == 400


def test_only_the_images_of_the_folder(served: PageServer, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    shutil.copy(tmp_path / "secret.png", folder / ".hidden.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "damaged.png").write_bytes(b"no png")
    names = "../secret.png ..%2fsecret.png %2e%2e/secret.png ..%5csecret.png .hidden.png link.png x%00.png none.png"
    for name in names.split():
        assert call(served, "GET", f"/images/{name}").status == 404, name
    assert call(served, "GET", "/api/images").json == {"images": [], "more": False}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404), ("GET", "//etc/passwd", 404), ("GET", "/api/jobs/0/events", 404),
        ("POST", "/api/jobs/0/cancel", 404), ("GET", f"/api/pictures/{ID}", 404), ("GET", "/api/images?count=-1", 400),
        ("POST", "/api/images", 405), ("DELETE", "/images/0000.png", 405), ("GET", "/api/pictures", 405),
        ("OPTIONS", "/api/jobs", 405), ("GET", "/page/none.js", 404), ("GET", "/page/..%2froutes.py", 404),
        ("GET", "/api/bundles/none", 404), ("GET", "/api/bundles/..", 404), ("POST", "/api/folder/open", 404),
        ("POST", "/images/none.png/delete", 404), ("POST", "/api/trash/0/restore", 404), ("BREW", "/", 501),
    ],
)  # fmt: skip
def test_routes_that_are_none(served: PageServer, method: str, path: str, status: int) -> None:
    assert call(served, method, path).status == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "evil.example:7860"}, 403),
        ({"Host": "[evil"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Length": "x"}, 400),
        ({"Content-Length": "", "Transfer-Encoding": "chunked"}, 411),
        ({"Host": "localhost:1234", "Origin": "http://localhost:1234"}, 400),  # through a tunnel; {} has no prompt
        ({"Host": "[::1]:1234"}, 400),
    ],
)
def test_who_may_ask(served: PageServer, headers: dict[str, str], status: int) -> None:
    assert call(served, "POST", "/api/jobs", {}, **headers).status == status


def test_the_folder_is_shown_where_it_can_be(cascade: Cascade, tmp_path: Path) -> None:
    shown: list[str] = []
    with serving(cascade, tmp_path / "images", open_folder=lambda: shown.append("it")) as server:
        assert call(server, "GET", "/api/info").json["opens_folder"] is True
        assert call(server, "POST", "/api/folder/open", {}, Origin="http://evil.example").status == 403
        assert shown == []
        assert call(server, "POST", "/api/folder/open", {}).status == 200
    assert shown == ["it"]


def test_bodies_have_limits(served: PageServer) -> None:
    assert call(served, "POST", "/api/jobs", b" " * (256 << 10) + b"{}").status == 413
    picture = {"Content-Type": "application/octet-stream"}
    answer = call(served, "POST", "/api/pictures", bytes((32 << 20) + 1), **picture)
    assert (answer.status, answer.json["error"]) == (413, "too large: expected at most 32 MB")
    assert (
        call(
            served, "POST", "/api/pictures", b"", Content_Type=picture["Content-Type"], Content_Length=str(10**17)
        ).status
        == 413
    )
    assert "not a picture" in call(served, "POST", "/api/pictures", b"<svg/>", **picture).json["error"]


def test_the_page_allows_nothing_from_elsewhere(served: PageServer) -> None:
    answer = call(served, "GET", "/")
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'self'; script-src 'self'; ")
    assert "unsafe" not in policy
    names = {path.name for path in (Path(routes.__file__).parent / "page").iterdir()} - {"index.html"}
    texts = [answer.body, *(call(served, "GET", f"/page/{name}").body for name in sorted(names))]
    assert len(texts) > 15
    assert not [text for text in texts if re.search(rb"https?://(?!www\.w3\.org/2000/svg)", text)]
    assert not re.search(rb'<script(?! type="module" src=)|<style| on[a-z]+=| style=', answer.body)


def test_what_should_not_happen_is_told_without_its_traceback(
    served: PageServer, cascade: Cascade, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any, **more: Any) -> None:
        raise KeyError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(cascade, "encode_prompt", broken)
        job = call(served, "POST", "/api/jobs", {"prompt": "x", **QUICK}).json["id"]
        name, data = events(served, job)[-1]
        assert (name, data["message"]) == (
            "error",
            "an unexpected error (KeyError); see the terminal",
        )
        patch.setattr("cascadekit.runtime.ui.routes.describe", broken)
        answer = call(served, "GET", "/api/bundles/bundle")
        assert (answer.status, "secret" in answer.json["error"]) == (500, False)
    assert capfd.readouterr().err.count("KeyError: 'secret'") == 2
    job = call(served, "POST", "/api/jobs", {"prompt": "x", **QUICK}).json["id"]  # and it goes on
    assert events(served, job)[-1][0] == "done"


def test_image_prompts_controls_and_loras(cascade: Cascade, tmp_path: Path) -> None:
    """Pictures and LoRAs are in the metadata as the command line would have put them there, LoRAs as they were merged
    when the page was started; and the image is the library's."""
    pictures = [picture(60, 40), picture(40, 60, seed=1)]
    with serving(cascade, tmp_path / "images", first_loras=[("style.safetensors", 0.8)]) as server:
        ids = []
        for number, each in enumerate(pictures):
            each.save(tmp_path / f"{number}.png")
            content = (tmp_path / f"{number}.png").read_bytes()
            ids.append(
                call(server, "POST", "/api/pictures", content, Content_Type="application/octet-stream").json["id"]
            )
            assert ids[-1] == sha256(content).hexdigest()
        control = {"name": "edges", "picture": ids[0], "strength": "0.5"}
        request = {"prompt": "x", "seed": 5, "image_prompts": ids, "controls": [control], **QUICK}
        told = events(server, call(server, "POST", "/api/jobs", request).json["id"])
    assert told[-1][0] == "done", told
    kept = [{"path": str(tmp_path / "images" / "pictures" / each), "sha256": each} for each in ids]
    settings = read_settings(tmp_path / "images" / "0000.png")
    assert settings is not None
    assert settings["image_prompts"] == kept
    assert settings["controls"] == [{**kept[0], "name": "edges", "strength": 0.5}]
    assert settings["loras"] == [{"name": "style.safetensors", "strength": 0.8}]
    shown = told[-1][1]["images"][0]["settings"]
    assert shown["controls"] == [{"name": "edges", "strength": 0.5, "picture": ids[0], "file": ids[0]}]
    generated = cascade.generate(
        "x", seed=5, image_prompts=pictures, controls=[ControlPicture("edges", pictures[0], 0.5)], **QUICK
    )
    assert Image.open(tmp_path / "images" / "0000.png").tobytes() == generated.images[0].tobytes()


def test_cancelling_a_job_that_runs_and_one_that_waits(served: PageServer, gate: Gate, tmp_path: Path) -> None:
    first, second, third = (
        call(served, "POST", "/api/jobs", {"prompt": name, "previews": ["prior"], **QUICK}).json["id"] for name in "abc"
    )
    assert gate.reached.wait(30)
    assert [job["id"] for job in call(served, "GET", "/api/jobs").json["jobs"]] == [first, second, third]
    assert call(served, "POST", f"/api/jobs/{second}/cancel", {}).status == 200
    assert events(served, second) == [("queued", {"ahead": 1}), ("cancelled", {"images": []})]
    call(served, "POST", f"/api/jobs/{first}/cancel", {})
    gate.opened.set()
    told = events(served, first)
    assert told[-1] == ("cancelled", {"images": []})
    assert dict(told)["step"]["index"] == 1
    assert events(served, third)[-1][0] == "done"
    assert len(list((tmp_path / "images").glob("*.png"))) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--port", "{taken}"], "give another --port"), (["-o", "{file}", "--port", "0"], "expected a folder")],
)
def test_the_command_refuses(served: PageServer, tiny: Path, tmp_path: Path, options: list[str], words: str) -> None:
    (tmp_path / "file").touch()
    known = {"taken": str(served.server_address[1]), "file": str(tmp_path / "file")}
    arguments = ["ui", str(tiny / "bundle"), *(option.format(**known) for option in options)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 2
    assert words in result.output


def test_the_command_without_torch_and_onnx_ends_on_a_signal(tiny: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnx', 'diffusers', 'transformers']));"
        "from cascadekit.cli import main; main()"
    )
    arguments = ["ui", str(tiny / "bundle"), "--port", "0", "-o", str(tmp_path), "--engine", "onnxruntime"]
    program = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    with program:
        url = program.stdout.readline().split()[0]
        info = json.load(urllib.request.urlopen(f"{url}/api/bundles/bundle"))
        program.send_signal(signal.SIGTERM)
        assert program.wait(30) == 0
    assert info["features"] == {
        "image_prompts": False, "init_image": False, "mask": False, "controls": [], "previews": ["decoder"],
    }  # fmt: skip
