"""The base of the pydantic models that are written as JSON, and their numbers: JSON has neither infinity nor NaN."""

import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainSerializer, WithJsonSchema


class FrozenModel(BaseModel):
    """Values that cannot be changed, and that have no other fields than those declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _plain(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "number"}, {"enum": ["Infinity", "-Infinity", "NaN"]}]}

# A float that is written as the string "Infinity", "-Infinity" or "NaN" where it is none of JSON's numbers.
Number = Annotated[float, PlainSerializer(_plain, when_used="json"), WithJsonSchema(_SCHEMA)]
