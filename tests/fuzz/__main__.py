"""Runs inputs by kind and seed: `python -m tests.fuzz KIND SEED [--keep FOLDER]`, or COUNT of them from a seed on."""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # whose files the kinds share with the tests

from fuzz.corpus import Corpus, write_cascade
from fuzz.harness import KINDS, Fuzzer
from fuzz.worker import made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kind", choices=[*KINDS, "all"])
    parser.add_argument("seed", type=int)
    parser.add_argument("--count", type=int, default=1, help="so many seeds, from this one on")
    parser.add_argument("--keep", type=Path, help="also write the input's files into this folder")
    given = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch, Fuzzer(Path(scratch)) as fuzzer:
        write_cascade(Path(scratch))
        if given.keep:
            given.keep.mkdir(parents=True)
            made(given.kind, given.seed, Corpus(Path(scratch), given.keep.resolve()), given.keep.resolve())
        for kind in KINDS if given.kind == "all" else [given.kind]:
            if given.count == 1:
                print(fuzzer.run(kind, given.seed), flush=True)
                continue
            for finding in fuzzer.findings(kind, range(given.seed, given.seed + given.count)):
                failed = True
                print(finding, flush=True)
            print(kind, fuzzer.counts, f"peak {fuzzer.peak >> 20} MB", flush=True)
            fuzzer.counts, fuzzer.peak = {}, 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
