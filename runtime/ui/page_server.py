"""Assembles the page of one cascade: queue, gallery, uploads and server."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...schemas.callbacks import Say
from ..cascade import Cascade
from .gallery import Gallery
from .http_server import PageServer
from .queue import JobQueue
from .routes import ROUTES, App
from .uploads import Uploads

KEPT = "pictures"  # folder beside the images, for the pictures that images were made from


@contextmanager
def page_server(
    cascade: Cascade,
    output: Path,
    *,
    name: str,
    host: str = "127.0.0.1",
    port: int = 7860,
    batch: int | None = None,
    loras: Sequence[tuple[str, float]] = (),
    say: Say = lambda text: None,
) -> Iterator[PageServer]:
    """A server that listens on `host` and `port` (0: a free one) until the context ends; `serve_forever` answers.

    Images go to the folder `output`. `name` is the name of the bundle on the page. `loras` are already merged into the
    weights of `cascade`, and the page shows them. `batch` images are computed together. `say` is called with a line
    for each image. Raises UsageError when the server cannot listen there or `output` is no folder.

    Example: `with page_server(cascade, Path("images"), name="bundle") as server: server.serve_forever()`"""
    with tempfile.TemporaryDirectory(prefix="cascadekit-") as scratch:
        pictures = Uploads(Path(scratch), output / KEPT)
        gallery = Gallery(output, pictures)
        about = {
            "name": name,
            "engine": cascade.engine.name,
            "output": str(output),
            "loras": [f"{lora} {strength:g}" for lora, strength in loras],
        }
        queue = JobQueue(cascade, gallery, pictures, batch=batch, say=say)
        app = App(manifest=cascade.manifest, queue=queue, gallery=gallery, pictures=pictures, loras=loras, about=about)
        with PageServer(host, port, ROUTES, app) as server, queue:
            yield server
