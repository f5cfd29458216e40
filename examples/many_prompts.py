"""Generate one image for each of several prompts in one batch, each with a seed of its own.

python examples/many_prompts.py demo/bundle images
"""

import sys
from pathlib import Path

from cascadekit import Cascade

PROMPTS = ("a red castle", "a blue castle", "a castle at night")


def main(bundle: str, output: str) -> None:
    Path(output).mkdir(exist_ok=True)
    with Cascade.open(bundle) as cascade:
        seeds = range(len(PROMPTS))
        result = cascade.generate(list(PROMPTS), seed=list(seeds), prior_steps=10, decoder_steps=5)
    for seed, prompt, image in zip(seeds, PROMPTS, result.images, strict=True):
        path = Path(output, f"{seed}.png")
        image.save(path)
        print(f"wrote {path}: {prompt}")


if __name__ == "__main__":
    main(*sys.argv[1:])
