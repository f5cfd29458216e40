"""The process that runs the calls: reads "KIND SEED" lines, answers each with a line of JSON.

A hang ends it with the stack of every thread on standard error, native code included; so does an abort.
"""

import faulthandler
import json
import os
import resource
import sys
import traceback
import warnings
import zlib
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from cascadekit.schemas.errors import CascadeError

from . import kinds_bundle, kinds_request, kinds_weights, planted
from .calls import Kind
from .corpus import Corpus

ALL: dict[str, Kind] = {**kinds_weights.KINDS, **kinds_bundle.KINDS, **kinds_request.KINDS, **planted.KINDS}

MOST_BYTES = 256 << 20  # resident memory that one input may take at its peak, beyond what was taken before it
ADDRESS_SPACE = 4 << 30  # beyond what is mapped already: a runaway meets MemoryError, not the machine
SHOWN = 5  # frames of a traceback


def main() -> None:
    root, seconds = Path(sys.argv[1]), float(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what native code prints is no answer
    faulthandler.enable()
    warnings.simplefilter("ignore")
    with TemporaryDirectory(prefix="fuzz-") as scratch:
        corpus = Corpus(root, Path(scratch) / "corpus")
        corpus.scratch.mkdir()
        _ = corpus.bundle, corpus.sharded  # made, and what makes them imported, before anything is measured
        answers.write("ready\n")
        for line in sys.stdin:
            kind, seed = line.split()
            answers.write(json.dumps(run(kind, int(seed), corpus, Path(scratch), seconds)) + "\n")


def run(kind: str, seed: int, corpus: Corpus, scratch: Path, seconds: float) -> dict[str, Any]:
    """Make an input and run its call, within `seconds` and the bounds above."""
    here = os.getcwd()
    with TemporaryDirectory(prefix="input-", dir=scratch, ignore_cleanup_errors=True) as name:
        os.chdir(name)
        try:
            call = made(kind, seed, corpus, Path(name))
            before = _reset_peak()
            limits = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ADDRESS_SPACE, limits[1]))
            faulthandler.dump_traceback_later(seconds, exit=True)
            try:
                outcome = _outcome(call)
            finally:
                faulthandler.cancel_dump_traceback_later()
                resource.setrlimit(resource.RLIMIT_AS, limits)
        finally:
            os.chdir(here)
    grown = _status("VmHWM") - before
    if grown > MOST_BYTES and outcome["what"] in ("done", "refused"):
        outcome = {
            "what": "memory",
            "error": f"took {grown >> 20} MB, of {MOST_BYTES >> 20} MB that it may",
            "where": "",
        }
    return {"kind": kind, "seed": seed, "grown": grown, **outcome}


def made(kind: str, seed: int, corpus: Corpus, folder: Path) -> Any:
    """The call of an input whose files lie in `folder`; the same for the same kind and seed, in any process."""
    rng = Random(zlib.crc32(kind.encode()) << 32 | seed)
    return ALL[kind](rng, corpus, folder)


def _outcome(call: Any) -> dict[str, str]:
    try:
        call()
    except CascadeError as error:
        return {"what": "refused", "error": str(error)[:2000], "where": ""}
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of Rust code is no Exception
        what = "memory" if isinstance(error, MemoryError) else "traceback"
        return {"what": what, "error": f"{type(error).__name__}: {error!s:.300}", "where": _where(error)}
    return {"what": "done", "error": "", "where": ""}


def _where(error: BaseException) -> str:
    """The last frames, innermost last."""
    frames = traceback.extract_tb(error.__traceback__)
    return " > ".join(f"{'/'.join(Path(f.filename).parts[-3:])}:{f.lineno}" for f in frames[-SHOWN:])


def _reset_peak() -> int:
    """Forget the peak of this process; the memory that it has now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise KeyError(name)


if __name__ == "__main__":
    main()
