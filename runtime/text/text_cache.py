"""The text encoder with a memory: rows of tokens met before are not encoded again."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.base import Run, Tensors

ROWS = 256  # kept, 400 kB each at CLIP bigG's width

Use = Callable[[], AbstractContextManager[Run]]


class CachedTextEncoder:
    """Ports of the text encoder; `use` brings the stage into memory, and is called only when rows are new."""

    def __init__(self, use: Use) -> None:
        self._use = use
        self._rows: OrderedDict[bytes, dict[str, NDArray[Any]]] = OrderedDict()  # the one used last comes last

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """input_ids and attention_mask (B, 77) int64 to prompt_embeds (B, 77, c) and pooled (B, 1, c) float32."""
        keys = [
            ids.tobytes() + mask.tobytes()
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        places = {key: place for place, key in enumerate(keys)}
        new = [place for key, place in places.items() if key not in self._rows]
        found = {key: self._rows[key] for key in places if key in self._rows}
        found |= {keys[place]: row for place, row in zip(new, self._encode(inputs, new), strict=True)}
        for key in keys:
            self._rows[key] = found[key]
            self._rows.move_to_end(key)
        while len(self._rows) > ROWS:
            self._rows.popitem(last=False)
        return {name: np.stack([found[key][name] for key in keys]) for name in found[keys[0]]}

    def _encode(self, inputs: Tensors, places: list[int]) -> list[dict[str, NDArray[Any]]]:
        if not places:
            return []
        with self._use() as encode:
            outputs = encode({name: value[places] for name, value in inputs.items()})
        return [{name: value[row] for name, value in outputs.items()} for row in range(len(places))]
