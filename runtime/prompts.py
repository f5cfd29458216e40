from typing import Any
from dataclasses import dataclass


@dataclass(frozen=True)
class Texts:
    clip_text: object
    pooled: object
    truncated: tuple


def encode_texts(texts: Any, tokenizer: Any, encode: Any, *, weighted: bool, long: bool) -> Any:
    t = tokenizer(texts)
    o = encode({"input_ids": t.input_ids, "attention_mask": t.attention_mask})
    return Texts(o["prompt_embeds"], o["pooled"], t.truncated)
