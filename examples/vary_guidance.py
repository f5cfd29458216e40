"""Generate one image with several guidances; prompt and noise stay the same.

python examples/vary_guidance.py demo/bundle "a fox, glossy style" sheet.png
"""

import sys

from PIL import Image

from cascadekit import Cascade

GUIDANCES = (1.5, 4.0, 8.0)


def main(bundle: str, prompt: str, output: str) -> None:
    with Cascade.open(bundle) as cascade:
        images = [
            cascade.generate(prompt, seed=7, prior_guidance=guidance, prior_steps=10, decoder_steps=5).images[0]
            for guidance in GUIDANCES
        ]
    sheet = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for number, image in enumerate(images):
        sheet.paste(image, (number * image.width, 0))
    sheet.save(output)
    print(f"wrote {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
