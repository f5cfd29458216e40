"""The base and the common fields of the pydantic models that are written as JSON."""

import json
import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

from .fp16 import MAX_EXPONENT
from .json_text import well_formed
from .limits import MAX_DIMENSION, MAX_FILE_BYTES, MAX_SIDE


class FrozenModel(BaseModel):
    """Values that cannot be changed, and that have no other fields than those declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


def _plain(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "number"}, {"enum": ["Infinity", "-Infinity", "NaN"]}]}

# A float that is written as the string "Infinity", "-Infinity" or "NaN" where it is none of JSON's numbers.
Number = Annotated[float, PlainSerializer(_plain, when_used="json"), WithJsonSchema(_SCHEMA)]

Bytes = Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]
Dimension = Annotated[int, Field(ge=0, le=MAX_DIMENSION)]
Exponent = Annotated[int, Field(ge=0, le=MAX_EXPONENT)]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Capability = Annotated[str, Field(pattern=r"^sm[0-9]{2,3}$")]


# The name of a file outside the bundle, for people to read. Bytes that are not UTF-8 become escapes, because the
# manifest is UTF-8.
FileName = Annotated[str, BeforeValidator(lambda value: well_formed(value) if isinstance(value, str) else value)]


class LoraEntry(FrozenModel):
    """A LoRA that is merged into the weights, with its strengths in the UNets and in the text encoder."""

    name: FileName
    fingerprint: Sha256
    strength: Finite
    text_encoder_strength: Finite


def schema_text(model: type[BaseModel]) -> str:
    """The JSON schema of what a model writes, as JSON text."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **model.model_json_schema(mode="serialization"),
    }
    return json.dumps(schema, indent=2) + "\n"


def finite(value: Any) -> Any:
    """Return a value of JSON. Raises ValueError when it contains NaN or an infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected a finite number, found {value}")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        finite(part)
    return value
