"""Upper bounds of accepted input; each is checked before the work that it bounds."""

from collections.abc import Mapping

# Headers of weights files
MAX_HEADER_BYTES = 100_000_000  # of a safetensors header; the library's own limit
MAX_HEADER_ITEMS = 4_000_000  # commas and brackets in it: about 1 GB once parsed; 300,000 tensors have 2,700,000

# Pickled checkpoints, whose pickle has about 200 bytes for each tensor
MAX_PICKLE_BYTES = 8 << 20  # of data.pkl, whose every byte may become an object of 64 bytes or more
MAX_PICKLE_ENTRIES = 200_000  # visited in all dictionaries; several may contain the same one
MAX_PICKLE_DEPTH = 32  # of nested dictionaries; one that contains itself has no end
MAX_PICKLE_NAME = 1000  # characters of a tensor's name, made of all keys that lead to it
MAX_ZIP_DIRECTORY = 16 << 20  # bytes; an entry of 50 bytes becomes an object of 600

# Bundles
MAX_MANIFEST_BYTES = 1 << 26  # a bundle of every stage with hundreds of plans has less than a megabyte
MAX_NAME_BYTES = 255  # of a file's name, on Linux and its file systems
MAX_PATH_PARTS = 16  # folders on the way to a file of a bundle; there are three at most
MAX_FILE_BYTES = (1 << 63) - 1  # file positions are signed 64-bit integers
MAX_DIMENSION = 1 << 40  # of a port: no tensor with such an axis fits into memory
MAX_SIDE = 1 << 16  # pixels of a side of an image: PNG writers and networks end before
VQGAN_SCALES = (1e-3, 1e3)  # least and largest; the layouts have 0.3764 and 0.43

# Tokenizers
MAX_TOKENIZER_BYTES = 1 << 25  # of a file of a tokenizer's folder; CLIP's largest has 3.6 MB
MAX_ADDED_TOKENS = 1 << 16  # textual inversions add a few tokens each

MAX_FOLDER_ENTRIES = 10_000  # files in a folder taken for a model; the largest repository has some hundred

MAX_LORA_TENSORS = 20_000  # of a LoRA file; these networks have 1,700 weights to change, with ten keys at most
MAX_PATTERNS = 4_000  # of an adapter's settings for single modules, of which PEFT itself writes one for each module
MAX_PATTERN_LENGTH = 500  # characters of such a pattern, which is a regular expression
MAX_PATTERN_PATHS = 1_000_000  # ways to try all of them on one name; a thousand names then take some seconds

# Images to generate
MAX_IMAGE_SIDE = 8192  # pixels; the VQGAN takes 2480 bytes for each of them
MAX_STEPS = 1000  # of a stage; the prior's conditioning is computed for all of them at once
MAX_IMAGES = 100_000  # of one prompt, and of one file of prompts; all are listed before the first is generated
MAX_PIXELS_TOGETHER = 1 << 29  # of the images of one call, whose pixels and latents are kept until it ends: 6.4 GB

# Prompts
MAX_PROMPT_CHARACTERS = 1 << 17  # fifty times the usual; read and tokenised in a fraction of a second
MAX_PROMPT_CHUNKS = 64  # of 75 tokens; the prior attends to all of them in every step
MAX_PROMPT_FILE_BYTES = 64 << 20  # read into memory as a whole
MAX_PROMPT_LINE = 1 << 20  # characters of a line of JSON, which takes many times its length in memory

# Pictures that are read
MAX_PICTURE_BYTES = 1_431_655_760  # in memory, before it is scaled: 8 for each pixel of the largest that Pillow opens
MAX_PICTURE_SIDE = 65_535  # pixels; JPEG's own limit, and masks need a Python object for each
JPEG_PIXELS = 32 << 20  # a larger JPEG is reduced towards this while it is decoded; no generated image is larger
# The most bytes for each pixel while a picture is decoded and converted, by format. The last four are decoded as a
# whole: a progressive JPEG keeps all coefficients until its end, and other libraries decode the rest for Pillow.
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
    "progressive JPEG": 12,
    "WEBP": 18,
    "AVIF": 14,
    "JPEG2000": 22,
}

# Settings and requests
MAX_WEIGHT = 1000  # guidance, shift and strengths; beyond it float32 latents overflow within a few steps
MAX_PICTURES = 64  # pictures, controls or LoRAs of one request; each is decoded before anything is generated

# Images with settings
MAX_SETTINGS = 4 << 20  # bytes of the JSON in a PNG; compressed text is not unpacked any further
MAX_SHOWN_PIXELS = 1 << 28  # of an image that the gallery shows; a browser decodes no larger ones

# The page's server
MAX_CONNECTIONS = 512  # each has a thread and a file descriptor; a program often has only 1024
MAX_BACKLOG = 1024  # connections that wait to be accepted; the kernel may allow fewer
MAX_HEAD = 64 << 10  # bytes of a request's line and headers
MAX_FIELDS = 16  # of a query
MAX_BODIES = 256 << 20  # bytes of all request bodies that are in memory at the same time
MAX_SHOWN_TEXT = 64 << 10  # characters of one setting in the gallery, which lists thousands of images
