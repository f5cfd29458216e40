"""The page in headless Chromium on onnxruntime-web: the same numbers as torch, the tokenizer and the runtime."""

import base64
import io
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPTokenizer

from cascadekit import Cascade, export
from cascadekit.converters.checkpoints.example_model import EXAMPLE_MODEL
from cascadekit.converters.site.write_site import write_site
from cascadekit.parity.image_metrics import psnr
from cascadekit.runtime.sampling.samplers import ddpm_step, guided, timesteps
from cascadekit.runtime.text.tokenizer_file import save_tokenizer_folder
from helpers.format_pictures import PROMPTS as JUDGED
from helpers.format_pictures import SEED, one_by_one, pixels, record_pictures
from helpers.matrix import Matrix

PACKAGES = sorted((Path(sys.prefix) / "oracles").glob("onnxruntime-web-*.tgz"))
pytestmark = pytest.mark.skipif(not PACKAGES, reason="onnxruntime-web is not installed: there was no npm")

PROMPTS = [
    "",
    "  a Fox,\tglossy\u00a0 style!! ",
    "it's 1234 o'clock, they'll  say 'SHE'D'",
    "naïve café cafe\u0301 ΟΔΥΣΣΕΥΣ İstanbul ſ ﬁ ｆｕｌｌ",
    "日本語 emoji 🦊🏽‍💻 <|endoftext|>x<|STARTOFTEXT|> &amp; a\u0085b\ufeffc",
    "a long prompt, " * 40,
]


@pytest.fixture(scope="module")
def address(site_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The website, served."""
    site = tmp_path_factory.mktemp("served") / "site"
    write_site(site_bundle, site, PACKAGES[-1])
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def page(address: str, browser: Any) -> Iterator[Any]:
    """The page, opened; at the end nothing was complained of, nor asked of any other server."""
    complaints: list[str] = []
    hosts: set[str] = set()
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.goto(f"{address}?prompt=a+turtle")
    yield page
    page.close()
    assert complaints == []
    assert hosts - {""} == {urlsplit(address).netloc}  # "": data URLs


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize(("seed", "counts"), [(0, (144, 4096)), (2**32 - 1, (16, 333, 16 * 1030 + 5))])
def test_the_noise_is_that_of_torch(page: Any, seed: int, counts: tuple[int, ...]) -> None:
    found = page.evaluate(
        """async ([seed, counts]) => {
          const generator = new (await import("./noise.js")).Generator(seed);
          return counts.map(count => [...generator.normal(count)]);
        }""",
        [seed, counts],
    )
    generator = torch.Generator().manual_seed(seed)
    for values, count in zip(found, counts, strict=True):
        expected = torch.randn(count, generator=generator).numpy()
        np.testing.assert_array_equal(np.array(values, np.float32), expected)


def test_the_tokens_are_those_of_transformers(page: Any, tmp_path: Path) -> None:
    found = page.evaluate(
        """async prompts => {
          const tokens = await (await fetch("tokenizer/tokenizer.json")).json();
          const tokenizer = new (await import("./tokenizer.js")).Tokenizer(tokens);
          return prompts.map(prompt => {
            const {input_ids, attention_mask, left} = tokenizer.encode(prompt);
            return {input_ids: [...input_ids].map(Number), attention_mask: [...attention_mask].map(Number), left};
          });
        }""",
        PROMPTS,
    )
    save_tokenizer_folder(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    expected = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77)
    lengths = [len(ids) for ids in tokenizer(PROMPTS)["input_ids"]]
    for row, (one, length) in enumerate(zip(found, lengths, strict=True)):
        assert one["input_ids"] == expected["input_ids"][row], PROMPTS[row]
        assert one["left"] == max(0, length - 77)
        assert one["attention_mask"] == expected["attention_mask"][row]


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_a_step_is_that_of_the_runtime(page: Any, steps: int) -> None:
    """The runtime's step is compared with diffusers' scheduler elsewhere."""
    rng = np.random.default_rng(steps)
    x, fresh = rng.standard_normal((2, 100)).astype(np.float32)
    both = rng.standard_normal(200).astype(np.float32)
    ratios, stepped = page.evaluate(
        """async ([steps, x, both, fresh]) => {
          const {guided, step, timesteps} = await import("./sampler.js");
          const ratios = timesteps(steps), predicted = guided(Float32Array.from(both), 3.7);
          const found = [...ratios].slice(0, -1).map((t, i) =>
            [...step(Float32Array.from(x), predicted, Float32Array.from(fresh), t, ratios[i + 1])]);
          return [[...ratios], found];
        }""",
        [steps, x.tolist(), both.tolist(), fresh.tolist()],
    )
    expected = timesteps(steps)
    np.testing.assert_array_equal(np.array(ratios, np.float32), expected)
    predicted = guided(both.reshape(2, 100), 3.7)[0]
    for index, found in enumerate(stepped):
        after = ddpm_step(x, predicted, fresh, expected[index], expected[index + 1])
        np.testing.assert_allclose(found, after, rtol=2e-6, atol=2e-6)


def generated(page: Any, fields: Mapping[str, object]) -> NDArray[np.uint8]:
    """The image that the page makes with `fields` of its form."""
    page.wait_for_selector("#generate:enabled")
    if not page.is_visible("[name=width]"):
        page.click("summary")
    for name, value in fields.items():
        page.fill(f"[name={name}]", str(value))
    before = page.get_attribute("#download", "href")
    page.click("#generate")
    page.wait_for_function("before => document.querySelector('#download').getAttribute('href') !== before", arg=before)
    content = page.get_attribute("#download", "href").removeprefix("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


def test_the_image_is_that_of_the_runtime(page: Any, site_bundle: Path) -> None:
    fields = {"negative": "flat style", "seed": 7, "width": 136, "height": 120}
    fields |= {"prior_steps": 6, "prior_guidance": 3.5, "decoder_steps": 3, "decoder_guidance": 1.5}
    found = generated(page, fields)
    assert page.input_value("[name=prompt]") == "a turtle"
    assert page.get_attribute("#download", "download") == "a-turtle-7.png"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    with Cascade.open(site_bundle, engine="onnxruntime", threads=1) as cascade:
        expected = np.asarray(cascade.generate("a turtle", **fields).images[0])  # type: ignore[arg-type]
    assert found.shape == expected.shape == (120, 136, 3)
    assert psnr(found / 255, expected / 255) >= 50


@pytest.mark.slow
def test_the_judge_sees_what_was_asked_for(page: Any, site_bundle: Path, tmp_path: Path, matrix: Matrix) -> None:
    fields = {"negative": "", "seed": SEED, "width": 128, "height": 128}
    fields |= {"prior_steps": 20, "prior_guidance": 4, "decoder_steps": 10, "decoder_guidance": 1}
    theirs = [generated(page, {"prompt": prompt, **fields}) for prompt in JUDGED]
    export(EXAMPLE_MODEL, tmp_path / "plain")
    ours, plain = (one_by_one(bundle, fields) for bundle in (site_bundle, tmp_path / "plain"))
    program, version = "onnxruntime-web in Chromium", PACKAGES[-1].stem.removeprefix("onnxruntime-web-")
    record_pictures(matrix, "website", program, pixels(theirs), ours, unquantised=plain, version=version)


@pytest.mark.slow
def test_networks_that_are_loaded_one_at_a_time_give_the_same_image(
    address: str, browser: Any, site_bundle: Path
) -> None:
    """As those of a large model are; the page is told that nothing may stay in memory."""
    fields = {"prompt": "a fox", "seed": 1, "width": 64, "height": 64, "prior_steps": 2, "decoder_steps": 1}
    page = browser.new_page()
    page.set_default_timeout(60_000)
    changed = (files("cascadekit.converters.site") / "page" / "networks.js").read_text().replace("600e6", "1")
    asked: list[str] = []

    def answer(route: Any) -> None:
        asked.append(route.request.url)
        route.fulfill(body=changed, content_type="text/javascript")

    page.route("**/networks.js", answer)
    page.goto(address)
    found = generated(page, fields)
    page.close()
    assert asked
    with Cascade.open(site_bundle, engine="onnxruntime", threads=1) as cascade:
        expected = np.asarray(cascade.generate(**fields).images[0])  # type: ignore[arg-type]
    assert psnr(found / 255, expected / 255) >= 50


def test_stop_ends_an_image_and_the_next_one_begins(page: Any) -> None:
    page.wait_for_selector("#generate:enabled")
    page.fill("[name=prior_steps]", "1000")
    page.click("#generate")
    page.locator("#status", has_text="Composing").wait_for()
    page.click("#stop")
    page.locator("#status", has_text="Stopped.").wait_for()
    assert page.is_visible("#generate")
    assert not page.is_visible("#stop")
