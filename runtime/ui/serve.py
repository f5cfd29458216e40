"""The page of one cascade, from its parts."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..cascade import Cascade
from .gallery import Gallery
from .pictures import Pictures
from .queue import Studio
from .routes import ROUTES, App
from .server import PageServer

KEPT = "pictures"  # beside the images, what they were made from


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
    say: Callable[[str], object] = lambda text: None,
) -> Iterator[PageServer]:
    """A server that listens on `host` and `port` (0: a free one) until the context ends; `serve_forever` answers.

    Images go to the folder `output`. `name` is what the page calls the bundle, `loras` are merged into its weights
    already, `batch` images are drawn together, `say` hears of each. Raises UsageError when it cannot listen there or
    `output` is no folder."""
    with tempfile.TemporaryDirectory(prefix="cascadekit-") as scratch:
        pictures = Pictures(Path(scratch), output / KEPT)
        gallery = Gallery(output, pictures)
        about = {
            "name": name,
            "engine": cascade.engine.name,
            "output": str(output),
            "loras": [f"{lora} {strength:g}" for lora, strength in loras],
        }
        studio = Studio(cascade, gallery, pictures, batch=batch, say=say)
        app = App(cascade.manifest, studio, gallery, pictures, loras, about)
        with PageServer(host, port, ROUTES, app) as server, studio:
            yield server
