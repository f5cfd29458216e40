"""Models on the Hugging Face Hub, fetched whole into huggingface_hub's cache, or their headers alone."""

import glob
from pathlib import Path

from .errors import explaining, reason, unreachable
from .headers import remote_header, remote_headers
from .repository import from_cache, list_files
from .select import select
from .source import HubPath, HubSource, is_hub, is_weights, parse
from .transfer import Tell, bars, fetch_weights

__all__ = ["HubPath", "HubSource", "fetch", "is_hub", "parse", "remote_header", "remote_headers", "select"]


def fetch(source: str | Path, progress: Tell | None = None, *, variant: str | None = None, lite: bool = False) -> Path:
    """The local path of a source on the Hub, in huggingface_hub's cache; what is there already is not fetched again.

    Of a folder, only what a model is read from is fetched: each component's weights once (`variant` and `lite` say
    which), configs, tokenizer, licence and model card. A download that was cut off goes on where it ended. Without a
    connection the cache stands in. `progress` is told in a line what is done; bars are shown on a terminal.
    Raises UsageError when there is no such repository, revision or file, CheckpointError when it cannot be had."""
    wanted, tell = parse(source), progress or (lambda line: None)
    with explaining(wanted):
        from huggingface_hub import constants, snapshot_download

        try:
            files = list_files(wanted)
        except unreachable() as error:
            path = from_cache(wanted, error, variant, lite)
            tell(f"{wanted}: {reason(error)}; taken from the cache")
            return path
        names = select(files, wanted, variant, lite)
        fetch_weights(wanted, [files[name] for name in names if is_weights(name)], tell)
        snapshot = snapshot_download(
            wanted.repo,
            revision=wanted.revision,
            allow_patterns=[glob.escape(name) for name in names],
            tqdm_class=bars(shown=constants.HF_XET_HIGH_PERFORMANCE),  # else but small files are left to fetch
        )
    return Path(snapshot, wanted.path)
