"""Prints the passports of files, for the commands that inspect."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..schemas.messages import listed
from .console import say_wrapped

if TYPE_CHECKING:
    from ..converters.passport_check import PassportState


def show_passports(states: "Iterable[PassportState]", root: Path) -> None:
    """Print for each file whether it is as written, who made it, how its values are stored, and its sources.

    Files in the same state come together, the changed ones first. Facts that their passports share are printed once."""
    states = list(states)
    by_state: dict[tuple[bool, str], list[PassportState]] = defaultdict(list)
    for state in states:
        by_state[state.good, state.text].append(state)
    for (_, text), alike in sorted(by_state.items()):
        for line in _lines(text, alike, states, root):
            say_wrapped(line)


def _lines(text: str, states: "Sequence[PassportState]", every: "Sequence[PassportState]", root: Path) -> Iterator[str]:
    """The lines about files in one state, which is `text`, among those of `every` file."""
    from ..converters.passport_check import facts_of, sources_of

    names = [_name(state.path, root) for state in states]
    facts = [facts_of(state.passport) if state.passport else {} for state in states]
    sources = [sources_of(state.passport) for state in states]
    if len(states) == 1:
        yield f"passport of {names[0]}: {text}"
        yield from _made(", ".join(facts[0].values()), sources[0])
        return
    yield f"passports of {len(states)} files: {text}"
    shared = _shared(facts)
    yield from _made(", ".join(shared.values()), [])
    for number, name in enumerate(names):
        own = [value for key, value in facts[number].items() if key not in shared]
        others = {source for each in every if each is not states[number] for source in sources_of(each.passport)}
        is_sum = len(sources[number]) > 1 and {*sources[number]} == others
        said = f"{name} {', '.join(own)}" if own else name
        yield from _made(said, ["the sources of the others"] if is_sum else sources[number])


def _made(facts: str, sources: Sequence[str]) -> Iterator[str]:
    if facts:
        yield f"  {facts}{f' from {listed(sources, 8)}' if sources else ''}"


def _shared(facts: Sequence[dict[str, str]]) -> dict[str, str]:
    """The facts that several files state, and all who state them state alike."""
    found: dict[str, list[str]] = defaultdict(list)
    for each in facts:
        for key, value in each.items():
            found[key].append(value)
    return {key: values[0] for key, values in found.items() if len(values) > 1 and len({*values}) == 1}


def _name(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path != root and path.is_relative_to(root) else path.name
