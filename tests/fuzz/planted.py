"""Faults on purpose, one for each way to fail: the harness must find every one of them."""

import ctypes
import os
import threading
from pathlib import Path
from random import Random

from cascadekit.schemas.errors import CascadeError

from .calls import Call, Kind
from .corpus import Corpus

kept: list[bytearray] = []


def _raises() -> None:
    raise KeyError("planted")


def _refuses() -> None:
    raise CascadeError("in words")


def _hangs() -> None:
    threading.Event().wait()


def _hangs_in_native_code() -> None:
    ctypes.PyDLL(None).sleep(3600)  # holds the interpreter's lock


def _takes() -> None:
    kept.append(bytearray(b"x") * (300 << 20))
    kept.clear()


def _takes_all() -> None:
    kept.append(bytearray(1 << 40))


def _panics() -> None:
    raise BaseException("as a library in Rust does")


def _aborts() -> None:
    os.abort()


def _exits() -> None:
    os._exit(0)


def _kind(call: Call) -> Kind:
    def kind(rng: Random, corpus: Corpus, folder: Path) -> Call:
        (folder / "odd").write_bytes(rng.randbytes(8))
        return call

    return kind


KINDS: dict[str, Kind] = {
    "planted-success": _kind(lambda: None),
    "planted-refusal": _kind(_refuses),
    "planted-traceback": _kind(_raises),
    "planted-panic": _kind(_panics),
    "planted-hang": _kind(_hangs),
    "planted-native-hang": _kind(_hangs_in_native_code),
    "planted-abort": _kind(_aborts),
    "planted-exit": _kind(_exits),
    "planted-memory": _kind(_takes),
    "planted-address-space": _kind(_takes_all),
}
