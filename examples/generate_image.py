"""Generate an image, one call for each stage, and watch the steps.

python examples/generate_image.py demo/bundle "a fox, glossy style" image.png
"""

import sys

from cascadekit import Cascade, to_images

SIZE = {"height": 256, "width": 256}


def main(bundle: str, prompt: str, output: str) -> None:
    with Cascade.open(bundle) as cascade:
        embeds = cascade.encode_prompt(prompt, negative="blurry")
        for step in cascade.prior(embeds, **SIZE, steps=10, guidance=4.0, seed=7):
            print(f"prior step {step.index + 1} of {step.steps}")
        prior_latents = step.latents  # (1, 16, h, w) float32
        for step in cascade.decode(prior_latents, embeds, **SIZE, steps=5, seed=7):
            print(f"decoder step {step.index + 1} of {step.steps}")
        to_images(cascade.pixels(step.latents))[0].save(output)
    print(f"wrote {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
