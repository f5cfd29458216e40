"""Makes the passports of outputs out of their sources. A conversion back to a source gives the source's own header."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..schemas.callbacks import Say
from ..schemas.errors import CheckpointError
from ..schemas.passport import Passport, PassportSource, of_generations, parse_passport, passport_text
from ..schemas.passport_keys import KEY, without_passport
from ..storage.file_hashes import fingerprint, header_sha256
from ..storage.safetensors_plan import TensorPlan
from ..storage.safetensors_writer import encode_header
from ..storage.weights_file import is_pickle, read_weights


def made_of(paths: Iterable[Path], say: Say) -> dict[Path, PassportSource]:
    """Describe the weights files at `paths` as sources. `say` is called with a line on a passport that is damaged."""
    return {path: _source(path, say) for path in paths}


def in_order(sources: Iterable[PassportSource]) -> tuple[PassportSource, ...]:
    """Sort sources by what is the same on every machine."""
    return tuple(sorted(sources, key=lambda source: (source.name, source.fingerprint)))


def stamped(
    tensors: Mapping[str, TensorPlan], metadata: Mapping[str, str], passport: Passport
) -> tuple[dict[str, str], bool]:
    """Return the metadata of a safetensors file with its passport, and whether it is an earlier file's.

    A file that is copied back into what a source of its sources was gets that file's metadata: its passport, or none.
    Then it has the same bytes again."""
    bare = without_passport(metadata)
    if passport.values == "copied":
        earlier = [older for source in passport.sources for older in _copied_from(source)]
        headers = {older.header for older in earlier}
        for older in [None, *earlier]:
            found = bare if older is None or older.passport is None else {**bare, KEY: passport_text(older.passport)}
            if hashlib.sha256(encode_header(tensors, found)).hexdigest() in headers:
                return found, True
    return {**bare, KEY: passport_text(of_generations(passport))}, False


def _copied_from(source: PassportSource) -> Sequence[PassportSource]:
    return source.passport.sources if source.passport and source.passport.values == "copied" else ()


def _source(path: Path, say: Say) -> PassportSource:
    return PassportSource(
        name=path.name,
        bytes=path.stat().st_size,
        fingerprint=fingerprint(path),
        header=header_sha256(path),
        passport=_passport_in(path, say),
    )


def _passport_in(path: Path, say: Say) -> Passport | None:
    text = None if is_pickle(path) else read_weights(path).metadata.get(KEY)
    try:
        return None if text is None else parse_passport(text, str(path))
    except CheckpointError as error:
        say(f"{error}; it is left out")
        return None
