"""Generates each prompt's image alone, without a server: triton_alone.py BUNDLE FILE.npz.

The server's environment runs it, because numpy 1 rounds some scalars of the sampler differently from numpy 2."""

import sys
from pathlib import Path

import numpy as np
from triton_prompts import PROMPTS, QUICK

from cascadekit import Cascade
from cascadekit.runtime.engines.onnxruntime import OnnxRuntimeEngine
from cascadekit.runtime.text.tokenizer import ClipTokenizer
from cascadekit.storage.bundle import open_bundle

if __name__ == "__main__":
    opened = open_bundle(Path(sys.argv[1]))
    engine = OnnxRuntimeEngine(opened)
    engine.in_parts = ()  # whole graphs, as the server has them
    with Cascade(engine, opened.manifest, ClipTokenizer.open(None), rows=1) as cascade:
        found = {
            str(number): np.asarray(cascade.generate(prompt, negative="gray", seed=[number], **QUICK).images[0])
            for number, prompt in enumerate(PROMPTS)
        }
    np.savez(sys.argv[2], **found)
