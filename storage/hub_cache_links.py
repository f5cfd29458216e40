"""Graphs behind links, as the Hub's cache keeps them: brought side by side for engines that follow no links.

A snapshot of the cache holds links into a store of blobs. ONNX Runtime and OpenVINO refuse weights that turn out to lie
outside the graph's folder, each in some of its versions.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir


@contextmanager
def without_links(graph: Path) -> Iterator[Path]:
    """A path of the same graph where neither it nor a file beside it is a link: for the time of loading, a folder of
    hard links to what the links lead to. `graph` itself where there are no links, and where no such folder can be made,
    because all folders that may be written are on other file systems."""
    beside = [path for path in graph.parent.iterdir() if path.is_file()]
    with ExitStack() as stack:
        yield next((path for home in _homes(beside) if (path := _gathered(beside, graph, home, stack))), graph)


def can_do_without(graph: Path) -> bool:
    """Whether `without_links` gives a path without links; whoever loads a graph that is missing says so."""
    if not graph.is_file():
        return True
    with without_links(graph) as path:
        return path != graph or not any(beside.is_symlink() for beside in graph.parent.iterdir())


def _homes(files: list[Path]) -> dict[Path, None]:
    """Where the folder may be, if one is needed: where nobody looks, else beside the store."""
    stores = {path.resolve().parent.parent: None for path in files if path.is_symlink()}
    return {Path(gettempdir()): None, **stores} if stores else {}


def _gathered(files: list[Path], graph: Path, home: Path, stack: ExitStack) -> Path | None:
    """The graph in a new folder in `home`, of hard links and a copy of the graph, which is small; it goes with `stack`.
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
