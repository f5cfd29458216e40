"""Refuses graphs on which ONNX Runtime's loader may crash, by a scan of their bytes.

A node leaves an input out by an empty name. Version 1.32 dies of SIGSEGV where a LayerNormalization leaves out its bias
so. The scan therefore lets pass only what `OMITTED` lists, which is what the exporter writes. It reads the wire format
of protobuf, of which the base install has no reader, and skips tensors by their length.

Field numbers are those of onnx.proto.
"""

import mmap
import re
from collections.abc import Iterator
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
MAX_VARINT_BYTES = 10
SMALL = 4096  # bytes of a message in which a search costs less than reading its fields
EMPTY_NAME = re.compile(rb"(?:\x0a|\x8a\x80*\x00)\x80*\x00")  # the tag of an input and the length 0, in every encoding
MAX_SHOWN = 100  # characters of a name in a message


def require_inputs_named(path: Path) -> None:
    """Scan the ONNX graph in the file at `path`, mapped into memory.

    Raises EngineError for a node that leaves out an input which `OMITTED` does not list, and for bytes that are no
    protobuf. Local functions are refused as well, as their nodes can leave out inputs, too. Raises CheckpointError for
    a file that cannot be read."""
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
            for field, start, end in _delimited(content, *graphs.pop()):
                if field == NODE and _may_have_empty_names(content, start, end):
                    graphs += _subgraphs_of(content, start, end, where)
    except _DamagedError as error:
        raise EngineError(f"{where}: no ONNX graph: {error}") from None


class _DamagedError(Exception):
    """Bytes that are no protobuf; the message says where."""


def _may_have_empty_names(content: Content, start: int, end: int) -> bool:
    """False when the bytes of an empty name are nowhere in the message. A large one is not searched: its tensors may
    be large."""
    return end - start > SMALL or EMPTY_NAME.search(content, start, end) is not None


def _subgraphs_of(content: Content, start: int, end: int, where: str) -> list[tuple[int, int]]:
    """The byte ranges of a node's subgraphs. Raises EngineError if the node leaves out an input that it may not."""
    texts = {NAME: "", OPERATOR: ""}
    lengths: list[int] = []
    graphs: list[tuple[int, int]] = []
    for field, first, last in _delimited(content, start, end):
        if field == INPUT:
            lengths.append(last - first)
        elif field in texts:
            texts[field] = content[first : min(last, first + MAX_SHOWN)].decode(errors="replace")
        elif field == ATTRIBUTE and _may_have_empty_names(content, first, last):
            graphs += ((a, b) for inner, a, b in _delimited(content, first, last) if inner in SUBGRAPHS)
    name, operator = texts[NAME], texts[OPERATOR]
    for number, length in enumerate(lengths):
        if not length and number not in OMITTED.get(operator, ()):
            raise EngineError(
                f"{where}: node {name!r} ({operator}) leaves out input {number} by an empty name, which no graph of "
                "cascadekit does and on which ONNX Runtime may crash; export the model again"
            )
    return graphs


def _delimited(content: Content, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message that have a length: the number of each, and the range of its bytes.

    Raises _DamagedError for a field that does not end within the message, and for the wire types of groups."""
    after = start
    while after < end:
        at = after
        tag, first = _varint(content, at, end)
        kind = tag & 7
        if kind == DELIMITED:
            length, first = _varint(content, first, end)
            after = first + length
        elif kind == VARINT:
            _, after = _varint(content, first, end)
        elif kind in FIXED:
            after = first + FIXED[kind]
        else:
            raise _DamagedError(f"wire type {kind} at byte {at}")
        if after > end:
            raise _DamagedError(f"field {tag >> 3} at byte {at} ends after byte {end}, where its message ends")
        if kind == DELIMITED:
            yield tag >> 3, first, after


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
