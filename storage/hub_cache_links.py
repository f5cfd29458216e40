"""Gathers a graph and its weights in one folder when they are links, as in the Hub's cache.

A snapshot of the cache consists of links into a store of blobs. Some versions of ONNX Runtime and OpenVINO refuse
weights outside the graph's folder.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir


@contextmanager
def without_links(graph: Path) -> Iterator[Path]:
    """A path of the same graph where neither the graph nor a file beside it is a link.

    The path is in a temporary folder of hard links to the linked files. It is `graph` itself where there are no links.
    The same goes where no such folder can be made, because every writable folder is on another file system."""
    beside = [path for path in graph.parent.iterdir() if path.is_file()]
    with ExitStack() as stack:
        yield next((path for home in _homes(beside) if (path := _gathered(beside, graph, home, stack))), graph)


def can_do_without(graph: Path) -> bool:
    """True when `without_links` gives a path without links, and for a missing graph, which fails on loading."""
    if not graph.is_file():
        return True
    with without_links(graph) as path:
        return path != graph or not any(beside.is_symlink() for beside in graph.parent.iterdir())


def _homes(files: list[Path]) -> dict[Path, None]:
    """The places for the folder, if one is needed: the folder of temporary files, else beside the store."""
    stores = {path.resolve().parent.parent: None for path in files if path.is_symlink()}
    return {Path(gettempdir()): None, **stores} if stores else {}


def _gathered(files: list[Path], graph: Path, home: Path, stack: ExitStack) -> Path | None:
    """Return the graph in a new folder in `home`, which `stack` removes: a copy of the graph, hard links of the rest.

    None where `home` is on another file system or cannot be written."""
    with ExitStack() as made:
        try:
            folder = Path(made.enter_context(TemporaryDirectory(prefix=".cascadekit-", dir=home)))
            shutil.copyfile(graph, folder / graph.name)
            for path in files:
                if path.suffix != graph.suffix:
                    os.link(path.resolve(), folder / path.name)
        except OSError:
            return None
        stack.push(made.pop_all())
        return folder / graph.name
