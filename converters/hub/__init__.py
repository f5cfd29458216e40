"""Models on the Hugging Face Hub: downloaded into huggingface_hub's cache, or read by their headers alone."""

import glob
from pathlib import Path

from ...schemas.callbacks import Say, ignored
from .headers import remote_headers
from .hub_errors import explaining, reason, unreachable
from .repository import from_cache, list_files
from .select import select
from .source import is_hub, is_weights, parse
from .transfer import fetch_weights, progress_bars

__all__ = ["fetch", "local_path", "remote_headers"]


def local_path(source: str | Path, say: Say | None = None, *, variant: str | None = None, lite: bool = False) -> Path:
    """Return the path of `source` on this machine; a source on the Hub (hf://) is downloaded first, as `fetch` does."""
    return fetch(source, say, variant=variant, lite=lite) if is_hub(source) else Path(source)


def fetch(source: str | Path, say: Say | None = None, *, variant: str | None = None, lite: bool = False) -> Path:
    """Download a source on the Hub into huggingface_hub's cache and return its path there.

    Files in the cache are not downloaded again. From a folder, only the files of a model are downloaded: configs,
    tokenizer, licence, model card, and one set of weights for each component (see `variant` and `lite`). A download
    that was cut off continues where it ended. Without a connection, the files in the cache are used. `say` is called
    with a line for each download; progress bars are shown on a terminal.

    Raises UsageError when there is no such repository, revision or file, CheckpointError when the download fails."""
    wanted, say = parse(source), say or ignored
    with explaining(wanted):
        from huggingface_hub import constants, snapshot_download

        try:
            files = list_files(wanted)
        except unreachable() as error:
            path = from_cache(wanted, error, variant, lite)
            say(f"{wanted}: {reason(error)}; taken from the cache")
            return path
        names = select(files, wanted, variant, lite)
        fetch_weights(wanted, [files[name] for name in names if is_weights(name)], say)
        snapshot = snapshot_download(
            wanted.repo,
            revision=wanted.revision,
            allow_patterns=[glob.escape(name) for name in names],
            tqdm_class=progress_bars(shown=constants.HF_XET_HIGH_PERFORMANCE),  # otherwise only small files remain
        )
    return Path(snapshot, wanted.path)
