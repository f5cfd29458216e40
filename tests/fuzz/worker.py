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
from helpers.peak_memory import reset_peak, status

from . import planted
from .calls import Kind
from .corpus import Corpus

MOST_BYTES = 256 << 20  # resident memory that one input may take at its peak, beyond what was taken before it
ADDRESS_SPACE = 4 << 30  # beyond what is mapped already: a runaway meets MemoryError, not the machine
SHOWN = 5  # frames of a traceback
PLANTED = "planted"  # the third argument, of a worker that gets planted faults alone


def main() -> None:
    root, seconds, kinds = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what native code prints is no answer
    faulthandler.enable()
    warnings.simplefilter("ignore")
    with TemporaryDirectory(prefix="fuzz-") as scratch:
        corpus = Corpus(root, Path(scratch) / "corpus")
        corpus.scratch.mkdir()
        if kinds != PLANTED:
            all_kinds()
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
            before = reset_peak()
            limits = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + ADDRESS_SPACE, limits[1]))
            faulthandler.dump_traceback_later(seconds, exit=True)
            try:
                outcome = _outcome(call)
            finally:
                faulthandler.cancel_dump_traceback_later()
                resource.setrlimit(resource.RLIMIT_AS, limits)
        finally:
            os.chdir(here)
    grown = status("VmHWM") - before
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
    make = planted.KINDS.get(kind) or all_kinds()[kind]
    return make(rng, corpus, folder)


def all_kinds() -> dict[str, Kind]:
    """All but the planted ones. They import onnx and much of the package, which takes seconds."""
    from . import kinds_bundle, kinds_request, kinds_weights

    return {**kinds_weights.KINDS, **kinds_bundle.KINDS, **kinds_request.KINDS}


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


if __name__ == "__main__":
    main()
