"""C2PA manifests in image files: a signed statement that the image is AI-generated, and by which program and model.

The signature shows that the file has not changed since, and who signed it. It is worth as much as its certificate: only
one from a C2PA trust list names somebody that others know. A manifest can be removed from a file without a trace.
"""

import io
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...schemas.errors import MissingPackageError, UsageError, reraise_interrupt
from ...storage.install_hint import install_hint

AI_GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
# Begins the description box of a manifest store: its type as ISO 19566-5 has it.
STORE = b"jumdc2pa\x00\x11\x00\x10\x80\x00\x00\xaa\x00\x38\x9b\x71"
MEDIA: Mapping[str, str] = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
}
ALGORITHMS = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}  # by the curve of the key
FOUND = ("engine", "bundle", "loras")  # what a manifest repeats of an image's settings
MOST_PEM = 1 << 20  # bytes
OFFLINE = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}
BARE = {"builder": {"thumbnail": {"enabled": False}}}


@dataclass(frozen=True)
class ManifestSigner:
    """Signs image files with a certificate chain and its key, both as PEM. `algorithm` is the name that C2PA gives it.

    Calls may come from any thread."""

    certificates: bytes
    key: bytes
    algorithm: str

    def __call__(self, content: bytes, path: Path, settings: Mapping[str, Any]) -> bytes:
        """The image file `content` with a manifest; `path` names its format. The pixels and settings stay as they are.

        Raises UsageError when it cannot be signed."""
        import c2pa

        signed = io.BytesIO()
        try:
            info = c2pa.C2paSignerInfo(self.algorithm, self.certificates, self.key, None)
            with (
                c2pa.Signer.from_info(info) as signer,
                c2pa.Context.from_dict({**BARE, **OFFLINE}) as context,
                c2pa.Builder(_manifest(settings), context) as builder,
            ):
                builder.sign(signer, MEDIA[path.suffix.lower()], io.BytesIO(content), signed)
        except c2pa.C2paError as error:
            raise UsageError(f"c2pa: the image cannot be signed: {error}; give another certificate and key") from error
        return signed.getvalue()


@dataclass(frozen=True)
class ManifestFacts:
    """The facts of the manifest in an image.

    `state` is "Valid", "Trusted" or "Invalid", as C2PA's own library says, or "not checked" without it."""

    state: str
    signer: str | None = None
    problems: tuple[str, ...] = ()


def open_signer(path: Path) -> ManifestSigner:
    """A signer with the certificate chain and the private key in the PEM file at `path`.

    An image is signed for a trial. Raises UsageError for a file that does not hold both or cannot sign, and
    MissingPackageError without c2pa-python."""
    try:
        import c2pa  # noqa: F401
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
        from PIL import Image
    except ImportError as error:
        reraise_interrupt(error)
        raise MissingPackageError(f"c2pa: {error.name} is not installed: {install_hint('c2pa')}") from error
    try:
        with path.open("rb") as file:
            text = file.read(MOST_PEM)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; give a PEM file with c2pa=...") from error
    certificates, key = _certificates(path, text), _key(path, text)
    if certificates[0].public_key() != key.public_key():
        raise UsageError(f"{path}: the key is not that of its first certificate; put the signer's certificate first")
    chain = b"".join(each.public_bytes(Encoding.PEM) for each in certificates)
    private = bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    signer = ManifestSigner(chain, private, _algorithm(path, key))
    trial = io.BytesIO()
    Image.new("RGB", (8, 8)).save(trial, "PNG")
    try:
        signer(trial.getvalue(), Path("trial.png"), {})
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return signer


def read_manifest(path: Path) -> ManifestFacts | None:
    """The facts of the manifest in the image at `path`, which is not empty; None without one.

    Nothing is asked for over a network."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(STORE) < 0:
            return None
    try:
        import c2pa
    except ImportError as error:
        reraise_interrupt(error)
        return ManifestFacts("not checked")
    try:
        with c2pa.Context.from_dict(OFFLINE) as context, c2pa.Reader(path, context=context) as reader:
            active = reader.get_active_manifest() or {}
            found = (reader.get_validation_results() or {}).get("activeManifest", {}).get("failure", [])
            signed = active.get("signature_info", {})
            names = [signed[name] for name in ("common_name", "issuer") if signed.get(name)]
            return ManifestFacts(
                str(reader.get_validation_state()), ", ".join(names) or None, tuple(each["code"] for each in found)
            )
    except c2pa.C2paError as error:
        return ManifestFacts("Invalid", None, (str(error),))


def _manifest(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The statement: this program created the image with a trained model."""
    from importlib.metadata import version

    program = {"name": "cascadekit", "version": version("cascadekit")}
    model = {f"cascadekit.{name}": settings[name] for name in FOUND if settings.get(name)}
    created = {"action": "c2pa.created", "digitalSourceType": AI_GENERATED, "softwareAgent": program}
    return {
        "claim_generator_info": [program],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [{**created, "parameters": model}]}}],
    }


def _certificates(path: Path, text: bytes) -> list[Any]:
    from cryptography import x509

    try:
        return list(x509.load_pem_x509_certificates(text))
    except ValueError as error:
        raise UsageError(
            f"{path}: no certificates in PEM form: {error}; expected the signer's and its chain"
        ) from error


def _key(path: Path, text: bytes) -> Any:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    begins = text.find(b"-----BEGIN", max(0, text.find(b"PRIVATE KEY-----") - 40))
    try:
        return load_pem_private_key(text[begins:], None)
    except TypeError as error:
        raise UsageError(f"{path}: its key has a password; give a file whose key has none") from error
    except ValueError as error:
        raise UsageError(f"{path}: no private key in PEM form: {error}; expected it after the certificates") from error


def _algorithm(path: Path, key: Any) -> str:
    """The name that C2PA gives the algorithm of a key. Raises UsageError for one that it does not have."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    match key:
        case ec.EllipticCurvePrivateKey() if key.curve.name in ALGORITHMS:
            return ALGORITHMS[key.curve.name]
        case ed25519.Ed25519PrivateKey():
            return "ed25519"
        case rsa.RSAPrivateKey():
            return "ps256"
    raise UsageError(f"{path}: a key that C2PA cannot sign with; expected P-256, P-384, P-521, Ed25519 or RSA")
