"""Arguments that take one or several of a few values, given as the value itself or by its name."""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import PurePath
from typing import Any, TypeVar

from .errors import UsageError
from .stages import Stage

Kind = TypeVar("Kind", bound=StrEnum)


def one_of(kind: type[Kind], value: Any, name: str) -> Kind:
    """The member of `kind` that `value` names. Raises UsageError for any other value of the argument `name`."""
    require_one_of(kind, value, name)
    return kind(value)


def stages_of(stages: Stage | str | Sequence[Stage | str]) -> tuple[Stage, ...]:
    """The stages that are named; a single one may come without a list. Raises UsageError for other names."""
    return tuple(one_of(Stage, stage, "stages") for stage in several(stages))


def several(values: Any) -> tuple[Any, ...]:
    """The values of an argument that takes several; a single text or path may come without a list."""
    return (values,) if isinstance(values, str | PurePath) else tuple(values)


def require_one_of(known: Iterable[str], value: Any, name: str) -> None:
    """Raise UsageError unless the argument `name` has one of the values `known`."""
    known = tuple(known)
    if value not in known:
        raise UsageError(f"{name}={value!r}: expected one of {', '.join(known)}")
