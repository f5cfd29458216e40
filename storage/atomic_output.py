"""Outputs appear whole or not at all: written beside their place, flushed to disk, then renamed into it.

``output_rules`` and ``replaceable_folders`` decide the places of outputs and the files they may replace.
"""

import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..schemas.callbacks import Say, ignored
from ..schemas.errors import CascadeError, ConversionError, UsageError
from ..schemas.folders import MANIFEST_NAME, MODEL_INDEXES
from ..schemas.messages import listed, reason
from .atomic_file import hidden_name, room_advice
from .atomic_moves import JOURNAL, REPLACED, exchange, finish, flush, flush_all, merge, rename_new, undo
from .bundle_lock import is_bundle, locked_bundle
from .locks import holder_of, locked
from .output_rules import locate, require_apart, require_free, require_writable
from .replaceable_folders import files_in, has_component, owned, stale_weights

NOTE = "fingerprint"  # a file in the scratch folder that identifies the work in it
RESERVED = (NOTE, REPLACED, JOURNAL, f"{JOURNAL}.new")
INSIDE = ".cascadekit.partial"  # the scratch folder where it must be inside the output itself
BUILDING = ".building"  # the scratch folder in a bundle while GPU engines are built for it


@contextmanager
def staged_output(
    target: Path,
    *,
    force: bool = False,
    fingerprint: str = "",
    sources: Iterable[str | Path] = (),
    files: Collection[str] | None = None,
    complete: bool = False,
    say: Say = ignored,
) -> Iterator[Path]:
    """A path to write a file or folder at. It becomes `target` when the block ends; files of a folder there stay.

    When the block raises, nothing is left behind and an old `target` is as it was. A killed process leaves a folder
    `.NAME.partial` beside the target. The next run finds its files at the yielded path if it has the same
    `fingerprint`, which stands for the same work; otherwise it removes them.

    Args:
        force: Replace files of the same names, or a whole output of cascadekit. The lock of a bundle that is there is
            held, after waiting for it.
        sources: Files and folders that the output must not touch.
        files: Paths below the folder that will be written, checked before the block runs; None for one file.
        complete: The new folder has every file of the old one that is to stay; the caller holds a bundle's lock.
        say: Called with a line about replaced files.

    Raises UsageError when `target` overlaps `sources`, and when another process is writing it. The same goes for an
    output that would replace something without `force`, or something that cascadekit did not make. Raises
    ConversionError when its folder cannot be written."""
    place = locate(target)
    require_apart(place, sources)
    scratch = _scratch_for(place)
    with _locked_bundle_at(place, target, force=force and not complete), _locked(scratch, target):
        staged = scratch / (place.name if place.name not in ("", *RESERVED) else "output")
        try:
            _require_own(scratch, staged)
            _restore(scratch, staged, place)
            if files is not None or place.is_file():
                _replacement(place, files or (), scratch, force=force, complete=complete)
        except BaseException:
            with suppress(OSError):  # a folder with a killed run's work stays, for a run that may continue it
                scratch.rmdir()
            raise
        try:
            _keep_only(scratch, staged, fingerprint)
            yield staged
            flush_all(staged)
            names = files_in(staged) if staged.is_dir() else ()
            replacement = _replacement(place, names, scratch, force=force, complete=complete)
            _put_in_place(staged, place, replacement, force=force)
            if replacement.gone:
                say(f"{target}: replaced {listed(replacement.gone)}")
        except OSError as error:
            where = str(error.filename2 or error.filename or target).replace(str(staged), str(target))
            said = f"{where}: cannot be written: {reason(error)}{room_advice(error)}"
            raise ConversionError(said) from error
        except CascadeError as error:  # the user knows the output, and not the place where it is made
            names = str(staged), str(target)
            error.args = tuple(part.replace(*names) if isinstance(part, str) else part for part in error.args)
            raise
        finally:
            if not (scratch / JOURNAL).exists():  # it exists while there is something to undo
                shutil.rmtree(scratch, ignore_errors=True)


def check_output(
    target: Path, *, force: bool, sources: Iterable[str | Path] = (), files: Collection[str] | None = None
) -> None:
    """Raise UsageError where `staged_output` would, for the same arguments, and where nothing can be written.

    Nothing is written or locked. A call before the sources are read needs neither these nor the names of the files."""
    place = locate(target)
    replaceable = place.exists() and os.access(place.parent, os.W_OK | os.X_OK)
    if not replaceable:
        require_writable(place)
    require_apart(place, sources)
    if files is not None or place.is_file():
        _replacement(place, files or (), _scratch_for(place), force=force)


@dataclass(frozen=True)
class _Replacement:
    """Files of the old output that go; `whole` when these are all, so that the folders can change places."""

    gone: tuple[str, ...] = ()
    whole: bool = False


def _replacement(
    place: Path, names: Collection[str], scratch: Path, *, force: bool, complete: bool = False
) -> _Replacement:
    """Return the replacement of files `names` below the folder `place`, or without `names` of the file `place`.

    Raises UsageError when it is not allowed."""
    if not names:
        require_free(place, force=force)
        return _Replacement((place.name,) if os.path.lexists(place) else ())
    if not place.is_dir():
        if os.path.lexists(place):
            raise UsageError(f"{place}: is a file; give a folder to write to")
        return _Replacement()
    if complete:
        return _Replacement(files_in(place, scratch), whole=True)
    _require_no_crossing(place, names)
    found = owned(place, names, scratch)
    if found and found.marker == MANIFEST_NAME and (found.foreign or MANIFEST_NAME not in names):
        _refuse_in_bundle(place, found.foreign, names)
    same = tuple(sorted(name for name in names if os.path.lexists(place / name)))
    whole = bool(found and not found.foreign and same and _is_of_kind(found.marker, names))
    gone = found.files if found and whole else same
    if same and not force:
        raise UsageError(
            f"{place}: exists already, with {listed(gone)}; give another output, or force=True to replace these"
        )
    if not whole:
        _require_no_mixture(place, names)
    return _Replacement(gone, whole)


def _is_of_kind(marker: str, names: Collection[str]) -> bool:
    """True when new files `names` can replace a whole folder with this marker. A model's need no index of their own."""
    return marker in names or (marker in MODEL_INDEXES and MANIFEST_NAME not in names)


def _refuse_in_bundle(place: Path, foreign: Collection[str], names: Collection[str]) -> None:
    if MANIFEST_NAME not in names:
        raise UsageError(f"{place}: is a bundle, which takes no other files; give another output")
    raise UsageError(
        f"{place}: exists already, a bundle with other files in it: {listed(sorted(foreign))}; move these away or give "
        "another output"
    )


def _require_no_crossing(place: Path, names: Collection[str]) -> None:
    """Raise UsageError for a file where a folder is to be, a folder where a file is to be, or a link as a folder."""
    for folder in sorted({parent for name in names for parent in Path(name).parents if parent.name}):
        path = place / folder
        if path.is_symlink():
            raise UsageError(f"{path}: is a link, where a folder is to be written; remove it or give another output")
        if os.path.lexists(path) and not path.is_dir():
            raise UsageError(f"{path}: is a file, where a folder is to be written; move it or give another output")
    for path in (place / name for name in names):
        if path.is_dir() and not path.is_symlink():
            raise UsageError(f"{path}: is a folder, where a file is to be written; move it or give another output")


def _require_no_mixture(place: Path, names: Collection[str]) -> None:
    """Raise UsageError when old files would be read together with the new ones as one model."""
    stale = list(stale_weights(place, names))
    if has_component(names):
        stale[:0] = [index for index in MODEL_INDEXES if index not in names and (place / index).is_file()]
    if stale:
        raise UsageError(
            f"{place}: has {listed(stale)} of another model, which would be read together with the new files; move "
            "these away or give another output"
        )


def _scratch_for(place: Path) -> Path:
    """The scratch folder: beside the output, or inside it where it is a mounted volume or its parent is read-only."""
    if place.is_dir() and (_is_mount(place) or not os.access(place.parent, os.W_OK | os.X_OK)):
        return place / INSIDE
    return place.parent / hidden_name(place.name)


def _is_mount(place: Path) -> bool:
    """True for a mount point. The kernel's list also has folders that are bound from the same disk."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        mounts = []
    escaped = str(place).replace("\\", "\\134").replace(" ", "\\040")
    return os.path.ismount(place) or any(line.split()[4] == escaped for line in mounts)


@contextmanager
def _locked(scratch: Path, target: Path) -> Iterator[None]:
    """Make the scratch folder and hold its lock."""

    def prepare() -> None:
        if scratch.is_symlink() or (scratch.exists() and not scratch.is_dir()):
            raise UsageError(f"{scratch}: is not a folder, but is needed for unfinished work; remove it")
        scratch.mkdir(parents=True, exist_ok=True)

    with ExitStack() as held:
        try:
            held.enter_context(locked(scratch, prepare))
        except BlockingIOError as error:
            raise UsageError(
                f"{target}: another process is writing it{holder_of(scratch)}; wait for that one or choose another "
                "output"
            ) from error
        except OSError as error:
            raise ConversionError(
                f"{target}: cannot be written: {error.strerror} ({error.filename}); choose another output"
            ) from error
        yield


@contextmanager
def _locked_bundle_at(place: Path, target: Path, *, force: bool) -> Iterator[None]:
    """With `force`, hold the lock of a bundle at `place`, which is to be replaced; without, nothing is.

    A bundle's lock is taken before that of a scratch folder, here as everywhere, so that no two wait for each other.
    Raises UsageError while GPU engines are built for the bundle, which may take hours."""
    if not force or not is_bundle(place):
        yield
        return
    with locked_bundle(place):
        if (place / BUILDING).is_dir():
            with _locked(place / BUILDING, target):
                pass
        yield


def _require_own(scratch: Path, staged: Path) -> None:
    """Raise UsageError when the folder has files that cascadekit did not leave there."""
    names = (path.name for path in scratch.iterdir())
    foreign = sorted(name for name in names if name not in RESERVED and not name.startswith(staged.name))
    if foreign:
        raise UsageError(f"{scratch}: is needed for unfinished work; move {listed(foreign)} out of it")


def _restore(scratch: Path, staged: Path, place: Path) -> None:
    """Restore the old output if a run was killed while it replaced it."""
    undo(scratch, staged, place)
    replaced = scratch / REPLACED
    if replaced.exists() and not replaced.is_symlink() and not os.path.lexists(place):
        replaced.rename(place)


def _keep_only(scratch: Path, staged: Path, fingerprint: str) -> None:
    """Empty the scratch folder, except for the work of a run with the same fingerprint."""
    note = scratch / NOTE
    known = note.is_file() and not note.is_symlink() and note.read_bytes() == fingerprint.encode()
    kept = {note, staged} if fingerprint and known and not staged.is_symlink() else set()
    for left in set(scratch.iterdir()) - kept:
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()
    if fingerprint:
        note.write_text(fingerprint, encoding="utf-8")


def _put_in_place(staged: Path, place: Path, replacement: _Replacement, *, force: bool) -> None:
    scratch = staged.parent
    is_beside = scratch.parent != place
    if staged.is_dir() and place.is_dir() and not (replacement.whole and is_beside):
        merge(staged, place, replacement.gone)
        (scratch / NOTE).unlink(missing_ok=True)
        finish(scratch)
        return
    # From here on the scratch folder may hold the old output, which no later run must take for its own work.
    (scratch / NOTE).unlink(missing_ok=True)
    flush(scratch)
    if place.is_dir():
        staged.chmod(place.stat().st_mode & 0o7777)
        exchange(staged, place)
    elif force or staged.is_dir():  # a folder never replaces a file or a folder that is not empty
        staged.replace(place)
    else:
        rename_new(staged, place)
    flush(place.parent)


@contextmanager
def scratch_folder(scratch: Path, target: Path) -> Iterator[Path]:
    """An empty, locked folder at `scratch` for files that go to `target` one by one; it is removed at the end.

    Leftovers of a killed process in it are removed first. Raises as `staged_output` does."""
    with _locked(scratch, target):
        try:
            _keep_only(scratch, scratch / target.name, "")
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
