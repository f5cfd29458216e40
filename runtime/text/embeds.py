"""What the text encoder makes of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..sampling.ddpm import F32


@dataclass(frozen=True)
class PromptEmbeds:
    """B prompts and their negatives, embedded, all float32; they may come from elsewhere. T is 77 for each chunk."""

    clip_text: F32  # (B, T, channels)
    pooled: F32  # (B, 1, channels)
    negative_clip_text: F32  # (B, T, channels)
    negative_pooled: F32  # (B, 1, channels)
    truncated: tuple[str, ...] = ()  # for each prompt, then each negative prompt, the text that did not fit

    def __len__(self) -> int:
        return len(self.clip_text)

    def repeated(self, count: int) -> "PromptEmbeds":
        """Every prompt `count` times in a row."""
        return PromptEmbeds(
            np.repeat(self.clip_text, count, axis=0),
            np.repeat(self.pooled, count, axis=0),
            np.repeat(self.negative_clip_text, count, axis=0),
            np.repeat(self.negative_pooled, count, axis=0),
            self.truncated,
        )


def as_texts(text: str | Sequence[str]) -> list[str]:
    """One text, or several, as a list."""
    return [text] if isinstance(text, str) else list(text)
