"""Refuses graphs on which ONNX Runtime's loader may crash, by a scan of their bytes.

A node leaves an input out by an empty name. Version 1.32 dies of SIGSEGV where a LayerNormalization leaves out its bias
so. The scan therefore lets pass only what `OMITTED` lists, which is what the exporter writes. It reads the wire format
of protobuf, of which the base install has no reader, and skips tensors by their length.

Field numbers are those of onnx.proto.
"""

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...schemas.errors import EngineError
from ...storage.open_file import opened

Content = bytes | mmap.mmap

# By operator: the inputs, counted from 0, that a node may leave out.
OMITTED = {"MatMulNBits": (3, 4), "MultiHeadAttention": (3, 4), "Resize": (1, 2)}

GRAPH, FUNCTIONS = 7, 25  # of ModelProto
NODE = 1  # of GraphProto
INPUT, NAME, OPERATOR, ATTRIBUTE = 1, 3, 4, 5  # of NodeProto
SUBGRAPHS = (6, 11)  # of AttributeProto: one graph, and a list of graphs

VARINT, EIGHT_BYTES, DELIMITED, FOUR_BYTES = 0, 1, 2, 5  # wire types
FIXED = {EIGHT_BYTES: 8, FOUR_BYTES: 4}
NODE_TAG = NODE << 3 | DELIMITED
MAX_VARINT_BYTES = 10
SMALL = 4096  # bytes of a message in which a search costs less than reading its fields
EMPTY_NAME = re.compile(rb"(?:\x0a|\x8a\x80*\x00)\x80*\x00")  # the tag of an input and the length 0, in every encoding
MAX_SHOWN = 100  # characters of a name in a message


def require_inputs_named(path: Path) -> None:
    """Scan the ONNX graph in the file at `path`, mapped into memory.

    Raises EngineError for a node that leaves out an input which `OMITTED` does not list, for local functions (their
    nodes can leave out inputs, too) and for bytes that are no protobuf. Raises CheckpointError for a file that cannot
    be read."""
    with opened(path) as file:
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # nothing can be mapped of an empty file
            raise EngineError(f"{path}: no ONNX graph: the file is empty") from None
        with content:
            require_inputs_named_in(content, str(path))


def require_inputs_named_in(content: Content, where: str) -> None:
    """Scan the bytes of a ModelProto; `where` begins the messages. Raises EngineError as `require_inputs_named` does.

    Graphs that wait are in a list, so that nested graphs cannot exhaust Python's stack."""
    graphs = []
    try:
        for field, start, end in _delimited(content, 0, len(content)):
            if field == FUNCTIONS:
                raise EngineError(f"{where}: has local functions, which no graph of cascadekit has; export it again")
            if field == GRAPH:
                graphs.append((start, end))
        while graphs:
            for start, end in _suspects(content, *graphs.pop()):
                node = _read_node(content, start, end)
                _require_named(node, where)
                graphs += node.graphs
    except _DamagedError as error:
        raise EngineError(f"{where}: no ONNX graph: {error}") from None


@dataclass(frozen=True)
class _Node:
    """A node's name, its operator, which inputs have empty names, and the byte ranges of its subgraphs."""

    name: str
    operator: str
    empty: tuple[int, ...]
    graphs: tuple[tuple[int, int], ...]


class _DamagedError(Exception):
    """Bytes that are no protobuf; the message says where."""


def _suspects(content: Content, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The nodes of a graph that may have empty names.

    A graph has thousands of nodes and tensors. The usual ones, whose tag has one byte and their length one or two, are
    therefore read here without a call for each; others are read as everywhere."""
    at, find = start, content.find
    while at < end:
        tag, length, first = content[at], -1, 0
        if tag & 7 == DELIMITED and tag < 0x80 and at + 3 < end:
            low, high = content[at + 1], content[at + 2]
            if low < 0x80:
                length, first = low, at + 2
            elif high < 0x80:
                length, first = low & 0x7F | high << 7, at + 3
        if length < 0:
            field, begin, at = _field(content, at, end)
            if field == NODE and begin is not None and _may_have_empty_names(content, begin, at):
                yield begin, at
            continue
        at = first + length
        if at > end:
            raise _beyond(tag >> 3, first, end)
        if tag == NODE_TAG and find(b"\0", first, at) != -1 and _may_have_empty_names(content, first, at):
            yield first, at


def _may_have_empty_names(content: Content, start: int, end: int) -> bool:
    """False when the bytes of an empty name are nowhere in the message. A large one is not searched: its tensors may
    be large."""
    return end - start > SMALL or EMPTY_NAME.search(content, start, end) is not None


def _read_node(content: Content, start: int, end: int) -> _Node:
    name = operator = ""
    lengths: list[int] = []
    graphs: list[tuple[int, int]] = []
    for field, first, last in _delimited(content, start, end):
        if field == INPUT:
            lengths.append(last - first)
        elif field == NAME:
            name = _text(content, first, last)
        elif field == OPERATOR:
            operator = _text(content, first, last)
        elif field == ATTRIBUTE and _may_have_empty_names(content, first, last):
            graphs += ((a, b) for inner, a, b in _delimited(content, first, last) if inner in SUBGRAPHS)
    return _Node(name, operator, tuple(n for n, length in enumerate(lengths) if not length), tuple(graphs))


def _text(content: Content, start: int, end: int) -> str:
    return content[start : min(end, start + MAX_SHOWN)].decode(errors="replace")


def _require_named(node: _Node, where: str) -> None:
    for number in node.empty:
        if number not in OMITTED.get(node.operator, ()):
            raise EngineError(
                f"{where}: node {node.name!r} ({node.operator}) leaves out input {number} by an empty name, which no "
                "graph of cascadekit does and on which ONNX Runtime may crash; export the model again"
            )


def _delimited(content: Content, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message that have a length: the number of each, and the range of its bytes.

    Raises _DamagedError for a field that does not end within the message, and for the wire types of groups."""
    at = start
    while at < end:
        field, first, at = _field(content, at, end)
        if first is not None:
            yield field, first, at


def _field(content: Content, at: int, end: int) -> tuple[int, int | None, int]:
    """The number of the field at `at`, the place of its content if it has a length, and the place after it."""
    tag, after = _varint(content, at, end)
    field, kind, first = tag >> 3, tag & 7, None
    if kind == VARINT:
        _, after = _varint(content, after, end)
    elif kind == DELIMITED:
        length, first = _varint(content, after, end)
        after = first + length
    elif kind in FIXED:
        after += FIXED[kind]
    else:
        raise _DamagedError(f"wire type {kind} at byte {at}")
    if after > end:
        raise _beyond(field, at, end)
    return field, first, after


def _beyond(field: int, at: int, end: int) -> _DamagedError:
    return _DamagedError(f"field {field} at byte {at} ends after byte {end}, where its message ends")


def _varint(content: Content, start: int, end: int) -> tuple[int, int]:
    """The number at `start`, and the place after it."""
    if start < end and (first := content[start]) < 0x80:  # nearly all
        return first, start + 1
    value = 0
    for index, at in enumerate(range(start, min(end, start + MAX_VARINT_BYTES))):
        byte = content[at]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + 1
    raise _DamagedError(f"a number at byte {start} does not end")
