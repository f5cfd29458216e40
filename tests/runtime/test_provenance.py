"""C2PA manifests, read by the library of the Content Authenticity Initiative."""

import io
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cascadekit import Cascade
from cascadekit.cli import main
from cascadekit.runtime.images.png import read_settings, save_png
from cascadekit.runtime.images.provenance import AI_GENERATED, open_signer, read_manifest
from cascadekit.schemas.errors import UsageError
from cascadekit.storage.install_hint import install_hint

c2pa = pytest.importorskip("c2pa")
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa  # noqa: E402

pytest.importorskip("starlette")
from cascadekit.runtime.serve.api_server import ServeOptions, api_server  # noqa: E402
from cascadekit.runtime.serve.images_api import GENERATIONS  # noqa: E402
from helpers import page  # noqa: E402
from helpers.certificates import chain, key_pem  # noqa: E402
from helpers.traffic import Traffic, completed, decoded, message  # noqa: E402

SETTINGS = {"prompt": "ein Fuchs, flächig", "seed": 1 << 60, "bundle": "0a" * 32, "engine": "onnxruntime"}
SUFFIXES = (".png", ".jpg", ".webp")


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A signer's PEM file, and its root."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificates, root = chain(key)
    path = tmp_path_factory.mktemp("c2pa") / "signer.pem"
    path.write_bytes(certificates + key_pem(key))
    return path, root


def noise(width: int = 61, height: int = 43) -> Image.Image:
    return Image.fromarray(np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8))


def read(content: bytes, suffix: str, root: bytes | None = None) -> Any:
    """The library's reader of an image, which trusts `root`."""
    trust = {"trust": {"user_anchors": root.decode()}, "verify": {"verify_trust": True}} if root else {}
    media = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}[suffix]
    return c2pa.Reader(media, io.BytesIO(content), context=c2pa.Context.from_dict(trust))


def failures(reader: Any) -> set[str]:
    return {each["code"] for each in reader.get_validation_results()["activeManifest"]["failure"]}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_signed_images_are_valid_and_keep_pixels_and_settings(
    tmp_path: Path, certified: tuple[Path, bytes], suffix: str
) -> None:
    signed, plain = tmp_path / f"signed{suffix}", tmp_path / f"plain{suffix}"
    save_png(plain, noise(), SETTINGS)
    save_png(signed, noise(), SETTINGS, sign=open_signer(certified[0]))
    assert np.array_equal(np.asarray(Image.open(signed)), np.asarray(Image.open(plain)))
    assert read_settings(signed) == read_settings(plain) == SETTINGS
    reader = read(signed.read_bytes(), suffix)
    assert (reader.get_validation_state(), failures(reader)) == ("Valid", {"signingCredential.untrusted"})
    trusting = read(signed.read_bytes(), suffix, certified[1])
    assert (trusting.get_validation_state(), failures(trusting)) == ("Trusted", set())
    manifest = reader.get_active_manifest()
    assert manifest["claim_generator_info"][0]["name"] == "cascadekit"
    (assertion,) = [each for each in manifest["assertions"] if each["label"].startswith("c2pa.actions")]
    (action,) = assertion["data"]["actions"]
    assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", AI_GENERATED)
    assert action["softwareAgent"]["name"] == "cascadekit"
    assert action["parameters"] == {"cascadekit.bundle": "0a" * 32, "cascadekit.engine": "onnxruntime"}
    with pytest.raises(c2pa.C2paError, match="ManifestNotFound"):
        read(plain.read_bytes(), suffix)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_changed_byte_shows(tmp_path: Path, certified: tuple[Path, bytes], suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    save_png(path, noise(), SETTINGS, sign=open_signer(certified[0]))
    found = read_manifest(path)
    assert found is not None
    assert (found.state, found.signer, found.problems) == ("Valid", "A signer, Tests", ("signingCredential.untrusted",))
    content = bytearray(path.read_bytes())
    content[content.rindex(b"IDAT") + 600 if suffix == ".png" else content.index(b"cascadekit {") + 20] ^= 1
    path.write_bytes(content)
    assert "assertion.dataHash.mismatch" in failures(read(path.read_bytes(), suffix))
    found = read_manifest(path)
    assert found is not None
    assert (found.state, "assertion.dataHash.mismatch" in found.problems) == ("Invalid", True)


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP521R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=lambda key: type(key).__name__,
)
def test_every_kind_of_key_signs(tmp_path: Path, key: Any) -> None:
    (tmp_path / "signer.pem").write_bytes(key_pem(key) + chain(key)[0])  # the order is free
    signed = open_signer(tmp_path / "signer.pem")(png(noise()), Path("a.png"), SETTINGS)
    assert read(signed, ".png").get_validation_state() == "Valid"


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_several_threads_sign(certified: tuple[Path, bytes]) -> None:
    signer = open_signer(certified[0])
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda side: signer(png(noise(side)), Path("a.png"), {}), range(8, 14)))
    assert {read(each, ".png").get_validation_state() for each in found} == {"Valid"}


KEY = ec.generate_private_key(ec.SECP256R1())
CHAIN, ROOT = chain(KEY)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"", "no certificates"),
        (CHAIN, "no private key"),
        (key_pem(KEY), "no certificates"),
        (CHAIN + key_pem(ec.generate_private_key(ec.SECP256R1())), "not that of its first certificate"),
        (ROOT + CHAIN + key_pem(KEY), "not that of its first certificate"),
        (CHAIN + key_pem(KEY, b"secret"), "password"),
        (CHAIN.replace(b"MII", b"MIJ", 1) + key_pem(KEY), "no certificates"),
    ],
)
def test_files_that_cannot_sign_are_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "signer.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=words) as caught:
        open_signer(path)
    assert "signer.pem" in str(caught.value)


def test_certificates_outside_the_rules_of_c2pa_are_refused_before_an_image_is_generated(tmp_path: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-subj", "/CN=me", "-days", "1", "-keyout", "key", "-out", "certificate"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    path = tmp_path / "signer.pem"  # self-signed, and a root: no certificate for signatures
    path.write_bytes((tmp_path / "certificate").read_bytes() + (tmp_path / "key").read_bytes())
    with pytest.raises(UsageError, match=r"signer\.pem: c2pa: the image cannot be signed"):
        open_signer(path)


@pytest.fixture
def quick() -> list[str]:
    return ["--size", "64x64", "--prior-steps", "1", "--decoder-steps", "1", "--seed", "3", "--engine", "onnxruntime"]


def test_the_commands_sign_and_inspect_says_so(
    tmp_path: Path, example: Path, certified: tuple[Path, bytes], quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, one, many = tmp_path / "plain.png", tmp_path / "one.jpg", tmp_path / "many"
    (tmp_path / "prompts.txt").write_text("a star\n")
    run = ["generate", str(example), *quick]
    assert CliRunner().invoke(main, [*run, "a star", "-o", str(plain)]).exit_code == 0
    assert CliRunner().invoke(main, [*run, "a star", "-o", str(one), "--c2pa", str(certified[0])]).exit_code == 0
    monkeypatch.setenv("CASCADEKIT_C2PA", str(certified[0]))
    batch = [*run, "--prompts", str(tmp_path / "prompts.txt"), "-o", str(many)]
    assert CliRunner().invoke(main, batch).exit_code == 0
    (image,) = many.glob("*.png")
    assert np.array_equal(np.asarray(Image.open(image)), np.asarray(Image.open(plain)))
    assert read(one.read_bytes(), ".jpg").get_validation_state() == "Valid"
    made = read(image.read_bytes(), ".png").get_active_manifest()["assertions"][0]["data"]["actions"][0]
    assert made["parameters"]["cascadekit.bundle"] == read_settings(plain)["bundle"]  # type: ignore[index]
    assert "generated 1" not in CliRunner().invoke(main, batch).output  # a signed image is finished, too
    shown = CliRunner().invoke(main, ["inspect", str(image)]).output
    assert "C2PA manifest: Valid, signed by A signer, Tests; signingCredential.untrusted" in shown
    assert "C2PA" not in CliRunner().invoke(main, ["inspect", str(plain)]).output
    facts = json.loads(CliRunner().invoke(main, ["inspect", str(image), "--json"]).output)
    assert facts["c2pa"]["state"] == "Valid"
    monkeypatch.setitem(sys.modules, "c2pa", None)
    assert "C2PA manifest: present, not checked" in CliRunner().invoke(main, ["inspect", str(image)]).output
    refused = CliRunner().invoke(main, batch)
    assert (refused.exit_code, install_hint("c2pa") in refused.output) == (1, True)


def test_the_page_and_the_server_sign(example: Path, tmp_path: Path, certified: tuple[Path, bytes]) -> None:
    sign, quick = open_signer(certified[0]), {"prompt": "a star", "prior_steps": 1, "decoder_steps": 1}
    with Cascade.open(example, threads=1) as cascade:
        with page.serving(cascade, tmp_path, sign=sign) as server:
            job = page.call(server, "POST", "/api/jobs", {**quick, "width": 64, "height": 64}).json["id"]
            page.events(server, job)
            file = page.call(server, "GET", "/images/0000.png").body
        assert read(file, ".png").get_validation_state() == "Valid"
        with api_server(cascade, "example", ServeOptions(port=0, sign=sign)) as api:
            thread = threading.Thread(target=api.serve_forever)
            thread.start()
            calls = Traffic(int(api.url.rpartition(":")[2]), None)  # type: ignore[arg-type]
            found = []
            for more in ({}, {"stream": True}):
                body = json.dumps({**quick, "size": "64x64", "output_format": "jpeg", **more}).encode()
                reply = calls.ask(message(GENERATIONS, body))
                found += completed(reply.body) if more else decoded(reply)
            api.should_exit = True
            thread.join()
    assert [read(each, ".jpg").get_validation_state() for each in found] == ["Valid", "Valid"]
