"""Upper bounds on what is accepted, each checked before the work that it bounds."""

from collections.abc import Mapping

# Images to draw
MAX_IMAGE_SIDE = 8192  # pixels; the VQGAN takes 2480 bytes for each of them
MAX_STEPS = 1000  # of a stage; what conditions the prior is computed for all of them at once
MAX_IMAGES = 100_000  # of one prompt, and of one file of prompts; each is kept in a list before it is drawn
MAX_PIXELS_TOGETHER = 1 << 29  # of images drawn in one call, whose pixels and latents are kept to its end: 6.4 GB

# Prompts
MAX_PROMPT_CHARACTERS = 1 << 17  # fifty times what people write; read and tokenised in a fraction of a second
MAX_PROMPT_CHUNKS = 64  # of 75 tokens; the prior attends to all of them in every step
MAX_PROMPT_FILE_BYTES = 64 << 20  # read into memory as a whole
MAX_PROMPT_LINE = 1 << 20  # characters of a line of JSON, which takes many times its length in memory

# Pictures to look at
MAX_PICTURE_BYTES = 1_431_655_760  # in memory, before it is scaled: 8 for each pixel of the largest that Pillow opens
MAX_PICTURE_SIDE = 65_535  # pixels; JPEG's own, and what masks take a Python object for
JPEG_PIXELS = 32 << 20  # what a larger JPEG is reduced towards as it is decoded; no image to draw is larger
# Most bytes for each pixel while a picture is decoded and converted, by the formats that are read. The last three are
# decoded as a whole by libraries of their own before Pillow has them.
PICTURE_BYTES: Mapping[str, int] = {
    "PNG": 8,
    "JPEG": 8,
    "MPO": 8,  # several JPEGs in one file, as some cameras write
    "GIF": 8,
    "BMP": 8,
    "DIB": 8,
    "PPM": 8,
    "TGA": 8,
    "TIFF": 8,
    "WEBP": 18,
    "AVIF": 14,
    "JPEG2000": 22,
}
