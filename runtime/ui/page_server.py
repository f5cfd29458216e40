"""Assembles the page: queue, gallery, uploads, trash and server."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...schemas.callbacks import Say, ignored
from ..images.png import Sign
from .gallery import Gallery
from .http_server import PageServer
from .models import Models
from .queue import JobQueue
from .routes import ROUTES, App
from .trash import Trash
from .uploads import Uploads

KEPT = "pictures"  # folder beside the images, for the pictures that images were made from


@contextmanager
def page_server(
    models: Models,
    output: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    batch: int | None = None,
    open_folder: Callable[[], None] | None = None,
    sign: Sign | None = None,
    say: Say = ignored,
) -> Iterator[PageServer]:
    """A server that listens on `host` and `port` (0: a free one) until the context ends; `serve_forever` answers.

    `models` opens the bundle that a job chooses. Images go to the folder `output`; `open_folder` shows it on this
    machine's screen, None where that is not possible. `batch` images are computed together. `sign` signs each
    file. `say` is called with a line for each image. Raises UsageError when the server cannot listen there or `output`
    is no folder.

    Example: `with page_server(models, Path("images")) as server: server.serve_forever()`"""
    with tempfile.TemporaryDirectory(prefix="cascadekit-") as scratch:
        pictures = Uploads(Path(scratch), output / KEPT)
        gallery = Gallery(output, pictures)
        queue = JobQueue(models, gallery, pictures, batch=batch, sign=sign, say=say)
        app = App(
            models=models,
            queue=queue,
            gallery=gallery,
            pictures=pictures,
            trash=Trash(gallery),
            open_folder=open_folder,
        )
        with PageServer(host, port, ROUTES, app) as server, queue:
            yield server
